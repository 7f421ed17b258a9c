"""Every trained model of a job on its way to its engines: recovered and proven at the start, published after each step.

One model after the other, each by its own publisher: only calls to that one are held meanwhile. With a gate, the
versions of a step go through it as one (see `gated`). What a gate rejects or a pin holds back is no failure: it is
said, and the last good version serves on; what is not pinned is judged beside what is. A rollback under way is waited
for, and what it abandoned is not published. Refuses (EngineError, PublishError) what `publish` refuses: models that
come later are not published then, and the next start does. Called by the controller.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import Abandoned, Pinned, PublishUnderWay
from tracegrad.tracestore.gating import rejections_in_a_row
from tracegrad.tracestore.pins import held_at
from tracegrad.tracestore.publishes import UNFINISHED
from tracegrad.tracestore.records import PolicyVersion, Publish
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishRejected
from tracegrad.trainer.gate import needs_gate, version_to_serve
from tracegrad.trainer.gated import Candidate, Passage
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.probe import ProbeSet
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.publish_report import PublishReport
from tracegrad.trainer.startup import first_publish, probe_set, wait_for_engines
from tracegrad.trainer.worker_groups import SavedModel, WorkerGroups

Versions = Mapping[str, PolicyVersion]
"""Model -> the version that its weights in memory are."""
Offered = Mapping[str, tuple[PolicyVersion, ProbeSet]]
"""Model -> a version to publish, and what proves it."""
POLL_S = 0.1


class Publishing:
    """The publishers of a job. `on_state` is told each state that a publish enters."""

    def __init__(
        self,
        config: Config,
        store: Store,
        engines: Mapping[str, Sequence[EngineClient]],
        *,
        say: Callable[[str], None],
        on_state: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self._config, self._store, self._engines = config, store, engines
        self._say, self._stopped = say, stopped
        self._unserved: set[str] = set()
        self.went_back = False
        """Whether a version that was rejected or rolled back made the job go back: its weights are to be found anew."""
        self.gave_up: str | None = None
        """Why the gate ends the run before its last step."""
        self._publishers = {
            model: Publisher(
                store,
                model,
                clients,
                config.trainer.publish,
                heartbeat_expires_s=config.proxy.heartbeat_expires_s,
                on_state=on_state,
                stopped=stopped,
                judged=config.trained_models(),
            )
            for model, clients in engines.items()
        }

    # -- start

    def end_left(self) -> None:
        """End what a dead publisher left, before anything is loaded: calls are held for it, and loading may fail.

        Where nothing had been swapped that needs no engine; else engines are waited for. Raises as `recover`.
        """
        for publisher in self._publishers.values():
            self._say_ended(publisher.end_unswapped())
        last = [self._store.last_publish(model) for model in self._publishers]
        if any(publish is not None and publish.state in UNFINISHED for publish in last):
            self.recover()

    def recover(self) -> bool:
        """Wait for the engines, end what a dead publisher left, and see that they serve what is live.

        Returns whether there was something to be ended.
        """
        wait_for_engines(self._engines, self._config, self._say, self._stopped)
        found = [] if self._stopped() else [publisher.recover() for publisher in self._publishers.values()]
        ended = [publish for publish in found if publish is not None]
        self._say_ended(ended)
        return bool(ended)

    def _say_ended(self, ended: Sequence[Publish]) -> None:
        for publish in ended:
            self._say(f"publish {publish.publish_id} had not finished: it is {publish.state} now")

    def prove(self, versions: Versions, workers: WorkerGroups, folder: JobFolder) -> None:
        """Make of each model what is to be served live and proven; the workers hold the newest before and after.

        Where several models have versions to be judged, the path is proven with what is live, and they follow as one.
        """
        newest_step, held, waiting = max(versions.values(), key=lambda version: version.step), False, []
        for model, newest in versions.items():
            if self._stopped() or self.went_back:
                return
            served = version_to_serve(self._store, newest)
            held_back = served.version_id != newest.version_id
            if held_back:
                self._unserved.add(model)
                self._say(
                    f"version {served.version_id} is served; version {newest.version_id}, the newest, is held back"
                )
            elif len(versions) > 1 and (live := self._live_before(newest)) is not None:
                waiting.append(model)
                served = live
            if (other := served.version_id != newest.version_id) or held:
                load = served if other else newest_step
                workers.load(load.checkpoint_path, load.checkpoint_hash)
                held = other
            if self._config.trainer.publish.canary:
                self._say(f"proving the engines of {model}: perturbed weights first, then version {served.version_id}")
            try:
                report = first_publish(self._publishers[model], workers, self._config, served, folder.canary)
            except PublishRejected as rejected:
                if held_back:
                    raise
                self._rejected([newest], rejected)
                continue
            if report is not None:
                self._say(f"version {served.version_id} is live (publish {report.publish_id}, {report.total_s:.1f} s)")
        if held:
            workers.load(newest_step.checkpoint_path, newest_step.checkpoint_hash)
        self._publish(self._probed([versions[model] for model in waiting], workers))

    def _live_before(self, version: PolicyVersion) -> PolicyVersion | None:
        """Return what serves while a version is judged; None where it need not be."""
        live = self._store.live_version(version.model)
        gated = self._config.trainer.publish.gate is not None and live is not None
        return live if gated and needs_gate(self._store, version, live) else None

    # -- after a step

    def publish(self, versions: Versions, saved: Mapping[str, SavedModel]) -> dict[str, Any]:
        """Publish the versions of a step; return model -> report. `saved` has the probes."""
        offered = {m: (v, probe_set(saved[m].new, saved[m].previous)) for m, v in versions.items()}
        as_one = self._config.trainer.publish.gate is not None
        reports: dict[str, Any] = {}
        for part in [offered] if as_one else [{model: each} for model, each in offered.items()]:
            if self.went_back:
                break
            reports |= self._publish(part)
        for model in reports:
            last = self._store.last_publish(model)
            reports[model] = {**reports[model], "paused_s": 0.0 if last is None else last.paused_s}
        return reports

    def catch_up(self, versions: Versions, workers: WorkerGroups) -> None:
        """Publish the newest versions once a pin no longer holds them back. Called while there is nothing to train.

        A pin at an older version took the newest out of service: it is remembered, too.
        """
        kept = []
        for model in sorted(self._publishers):
            version = versions[model]
            if (pinned := self._store.pinned(model)) not in (None, version.version_id):
                self._unserved.add(model)
            if pinned is not None or model not in self._unserved:
                continue
            self._unserved.discard(model)
            live = self._store.live_version(model)
            is_live = live is not None and live.version_id == version.version_id
            if not is_live and version_to_serve(self._store, version).version_id == version.version_id:
                kept.append(version)  # and it was not judged against
        for part in [[version] for version in kept] if self._config.trainer.publish.gate is None else [kept]:
            reports = self._publish(self._probed(part, workers))
            for model, report in reports.items():
                if "rejected" not in report and "skipped" not in report:
                    self._say(f"the pin is off: version {versions[model].version_id} is live")

    def folders(self) -> list[str]:
        """Return the checkpoints that are live or on their way: they must stay."""
        paths = []
        for model in self._publishers:
            live, publish = self._store.live_version(model), self._store.last_publish(model)
            paths += [] if live is None else [live.checkpoint_path]
            paths += [] if publish is None else [self._store.get_version(publish.version_id).checkpoint_path]
        return paths

    # -- inside

    def _probed(self, versions: Sequence[PolicyVersion], workers: WorkerGroups) -> Offered:
        settings = self._config.trainer
        return {
            version.model: (
                version,
                probe_set(workers.probe_sequences(version.model, settings.publish.probe_tokens, settings.seed)),
            )
            for version in versions
        }

    def _publish(self, offered: Offered) -> dict[str, dict[str, Any]]:
        """Publish versions, with a gate as one; return model -> what metrics say. What is pinned stays behind."""
        reports: dict[str, dict[str, Any]] = {}
        while offered:
            try:
                made = self._in_turn(offered)
            except Abandoned as gone:
                for version, _ in offered.values():
                    self._say(f"version {version.version_id} is not published: {gone}")
                self.went_back = True
                return reports | {model: {"skipped": str(gone)} for model in offered}
            except Pinned:
                held = {model: self._skip_pinned(version) for model, (version, _) in offered.items()}
                reports |= {model: {"skipped": why} for model, why in held.items() if why is not None}
                offered = {model: each for model, each in offered.items() if held[model] is None}
                continue
            except PublishRejected as rejected:
                self._rejected([version for version, _ in offered.values()], rejected)
                return reports | {model: rejected.as_json(model) for model in offered}
            self._unserved.difference_update(made)
            return reports | {model: report.as_json() for model, report in made.items()}
        return reports

    def _skip_pinned(self, version: PolicyVersion) -> str | None:
        """Write down that a pin holds a version back; None where there is no such pin."""
        pin = self._store.pinned(version.model)
        if pin is None or pin == version.version_id:
            return None
        why = held_at(version.model, pin)
        self._unserved.add(version.model)
        self._store.skip_publish(version.version_id, why)
        self._say(f"version {version.version_id} is not published: {why}")
        return why

    def _in_turn(self, offered: Offered) -> dict[str, PublishReport]:
        """Publish, once a rollback or a pin that publishes at this moment is over."""
        settings, said = self._config.trainer.publish, False
        deadline = time.monotonic() + settings.drain_timeout_s + settings.swap_timeout_s
        while True:
            try:
                return self._at_once(offered)
            except PublishUnderWay as other:
                if self._stopped() or time.monotonic() > deadline:
                    raise
                if not said:
                    ids = ", ".join(str(version.version_id) for version, _ in offered.values())
                    self._say(f"version {ids} is published later: {other}")
                said = True
            time.sleep(POLL_S)

    def _at_once(self, offered: Offered) -> dict[str, PublishReport]:
        judged: list[Candidate] = []
        reports = {}
        for model, (version, probe) in offered.items():
            publisher = self._publishers[model]
            if (candidate := publisher.candidate(version.version_id, probe)) is not None:
                judged.append(candidate)
            else:
                reports[model] = publisher.publish(version.version_id, probe)
        gate = next((each.publisher.gate for each in judged), None)
        return reports if gate is None else reports | Passage(gate, judged).run()

    def _rejected(self, versions: Sequence[PolicyVersion], rejected: PublishRejected) -> None:
        """Say it, and do what the configuration says of rejected versions."""
        gate, store = self._config.trainer.publish.gate, self._store
        assert gate is not None, "only a gate rejects"
        self._say(str(rejected))
        for version in versions:
            live = store.live_version(version.model)
            if gate.rejected.then == "return" and rejected.decision.judged and live is not None:
                for each in store.list_versions(version.model):
                    newer = each.version_id > live.version_id and each.job_id == version.job_id
                    if newer and each.kind == "step" and not each.abandoned:
                        store.abandon_version(each.version_id)
                self.went_back = True
        row = max(rejections_in_a_row(store.list_publishes(version.model)) for version in versions)
        if (most := gate.rejected.stop_after) is not None and row >= most:
            self.gave_up = f"the gate rejected {row} versions in a row (trainer.publish.gate.rejected.stop_after)"
