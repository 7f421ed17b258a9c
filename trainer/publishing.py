"""Every trained model of a job on its way to its engines: recovered and proven at the start, published after each step.

One model after the other, each by its own publisher: only calls to that one are held meanwhile. What a gate rejects or
a pin holds back is no failure: it is said, and the last good version serves on. A rollback under way is waited for, and
what it abandoned is not published. Refuses (EngineError, PublishError)
what `publish` refuses: models that come later are not published then, and the next start does. Called by the
controller.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import Abandoned, Pinned, PublishUnderWay
from tracegrad.tracestore.gating import rejections_in_a_row
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishRejected
from tracegrad.trainer.gate import version_to_serve
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.probe import ProbeSet
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.publish_report import PublishReport
from tracegrad.trainer.results import Scored
from tracegrad.trainer.startup import first_publish, probe_set, wait_for_engines
from tracegrad.trainer.worker_groups import SavedModel, WorkerGroups

Versions = Mapping[str, PolicyVersion]
"""Model -> the version that its weights in memory are."""
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
            )
            for model, clients in engines.items()
        }

    # -- start

    def recover(self) -> bool:
        """Wait for the engines, end what a dead publisher left; return whether there was such."""
        wait_for_engines(self._engines, self._config, self._say, self._stopped)
        ended = [] if self._stopped() else [publisher.recover() for publisher in self._publishers.values()]
        for publish in ended:
            if publish is not None:
                self._say(f"publish {publish.publish_id} had not finished: it is {publish.state} now")
        return any(publish is not None for publish in ended)

    def prove(self, versions: Versions, workers: WorkerGroups, folder: JobFolder) -> None:
        """Make of each model what is to be served live and proven; the workers hold the newest before and after."""
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
                workers.load(served.checkpoint_path, served.checkpoint_hash)
            try:
                report = first_publish(self._publishers[model], workers, self._config, served, folder.canary)
            except PublishRejected as rejected:
                if held_back:
                    raise
                self._rejected(newest, rejected)
                continue
            if report is not None:
                self._say(f"version {served.version_id} is live (publish {report.publish_id}, {report.total_s:.1f} s)")
            if held_back:
                workers.load(newest.checkpoint_path, newest.checkpoint_hash)

    # -- after a step

    def publish(self, versions: Versions, saved: Mapping[str, SavedModel]) -> dict[str, Any]:
        """Publish the versions of a step; return model -> report. `saved` has the probes."""
        reports = {}
        for model, version in versions.items():
            if self.went_back:
                break
            report, last = (
                self._publish(version, saved[model].new, saved[model].previous),
                self._store.last_publish(model),
            )
            reports[model] = {**report, "paused_s": 0.0 if last is None else last.paused_s}
        return reports

    def catch_up(self, versions: Versions, workers: WorkerGroups) -> None:
        """Publish the newest versions once a pin no longer holds them back. Called while there is nothing to train.

        A pin at an older version took the newest out of service: it is remembered, too.
        """
        settings = self._config.trainer
        for model in sorted(self._publishers):
            version = versions[model]
            if (pinned := self._store.pinned(model)) not in (None, version.version_id):
                self._unserved.add(model)
            if pinned is not None or model not in self._unserved:
                continue
            self._unserved.discard(model)
            live = self._store.live_version(model)
            if live is not None and live.version_id == version.version_id:
                continue
            if version_to_serve(self._store, version).version_id != version.version_id:
                continue  # it was judged against
            sequences = workers.probe_sequences(model, settings.publish.probe_tokens, settings.seed)
            if "result" in self._publish(version, sequences):
                self._say(f"the pin is off: version {version.version_id} is live")

    def folders(self) -> list[str]:
        """Return the checkpoints that are live or on their way: they must stay."""
        paths = []
        for model in self._publishers:
            live, publish = self._store.live_version(model), self._store.last_publish(model)
            paths += [] if live is None else [live.checkpoint_path]
            paths += [] if publish is None else [self._store.get_version(publish.version_id).checkpoint_path]
        return paths

    # -- inside

    def _publish(
        self, version: PolicyVersion, new: tuple[Scored, ...], previous: tuple[Scored, ...] | None = None
    ) -> dict[str, Any]:
        try:
            report = self._in_turn(version, probe_set(new, previous))
        except Abandoned as gone:
            self._say(f"version {version.version_id} is not published: {gone}")
            self.went_back = True
            return {"skipped": str(gone)}
        except Pinned as pinned:
            self._unserved.add(version.model)
            self._store.skip_publish(version.version_id, str(pinned))
            self._say(f"version {version.version_id} is not published: {pinned}")
            return {"skipped": str(pinned)}
        except PublishRejected as rejected:
            self._rejected(version, rejected)
            return rejected.as_json()
        self._unserved.discard(version.model)
        return report.as_json()

    def _in_turn(self, version: PolicyVersion, probe: ProbeSet) -> PublishReport:
        """Publish, once a rollback or a pin that publishes at this moment is over."""
        settings, said = self._config.trainer.publish, False
        deadline = time.monotonic() + settings.drain_timeout_s + settings.swap_timeout_s
        while True:
            try:
                return self._publishers[version.model].publish(version.version_id, probe)
            except PublishUnderWay as other:
                if self._stopped() or time.monotonic() > deadline:
                    raise
                if not said:
                    self._say(f"version {version.version_id} is published later: {other}")
                said = True
            time.sleep(POLL_S)

    def _rejected(self, version: PolicyVersion, rejected: PublishRejected) -> None:
        """Say it, and do what the configuration says of rejected versions."""
        gate, store = self._config.trainer.publish.gate, self._store
        assert gate is not None, "only a gate rejects"
        self._say(str(rejected))
        live = store.live_version(version.model)
        if gate.rejected.then == "return" and rejected.decision.judged and live is not None:
            for each in store.list_versions(version.model):
                newer = each.version_id > live.version_id and each.job_id == version.job_id
                if newer and each.kind == "step" and not each.abandoned:
                    store.abandon_version(each.version_id)
            self.went_back = True
        row, most = rejections_in_a_row(store.list_publishes(version.model)), gate.rejected.stop_after
        if most is not None and row >= most:
            self.gave_up = f"the gate rejected {row} versions in a row (trainer.publish.gate.rejected.stop_after)"
