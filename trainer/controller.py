"""The controller: lease -> traces -> samples -> step -> checkpoint -> commit -> publish -> metrics -> prune, and again.

It owns no weights and imports no torch; workers do the arithmetic. The commit is one transaction of the store
(`commit_step`): before it the step never happened, after it the step is never repeated, wherever the process dies.
Fail closed (law 9): a refused step, a failed publish or an unreachable store ends the run with its error; the service
keeps the last good version. What a gate rejects or a pin holds back is no failure: it is said, and the last good
version serves on. A batch with nothing to train in it is put aside and not leased again in its epoch. A lost lease
throws the step away and restores the last committed weights.
Offline (no publisher): versions are committed and not published, and the run ends when the store has no more ready
groups. Called by `tracegrad.trainer.command` and by tests.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import msgspec

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import LeaseLost, Pinned
from tracegrad.tracestore.records import Lease, PolicyVersion, StepCommit
from tracegrad.tracestore.rules import lease_rule
from tracegrad.tracestore.store import Store
from tracegrad.trainer.checkpoints import prune
from tracegrad.trainer.crash_points import CrashPoints
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishRejected
from tracegrad.trainer.errors import EngineError, NothingToTrain, PublishError, StepRefused
from tracegrad.trainer.gate import abandon_rejected, rejections_in_a_row, version_to_serve
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.lease_keeper import LeaseKeeper
from tracegrad.trainer.leased import commit_patiently, leased_samples
from tracegrad.trainer.metrics import Console, MetricsLog
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.results import Saved, Scored
from tracegrad.trainer.startup import (
    clear_orphans,
    find_weights,
    first_publish,
    probe_set,
    wait_for_engines,
)
from tracegrad.trainer.tokenizer_match import check_recorded_models
from tracegrad.trainer.trackers import Tracker
from tracegrad.trainer.workers import Trains

REFUSED_IN_A_ROW = 3
"""So many batches without anything to train are no chance: training stops, before the whole queue is put aside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a controller works with. `engines` (the replicas) is empty offline."""

    store: Store
    workers: Trains
    folder: JobFolder
    console: Console
    engines: Sequence[EngineClient] = ()
    trackers: Sequence[Tracker] = ()
    crash_points: CrashPoints = field(default_factory=CrashPoints)
    stop: Event = field(default_factory=Event)


class Controller:
    """One training job from start-up to its last step."""

    def __init__(self, config: Config, around: Surroundings) -> None:
        self.config = config
        self._around = around
        self._store, self._workers = around.store, around.workers
        self._job, self._model = config.trainer.job, config.trainer.model
        self._rule = lease_rule(config, offline=not around.engines)
        self._metrics = MetricsLog(around.folder.path, around.trackers, around.console.say)
        self._publisher: Publisher | None = None
        self._version: PolicyVersion | None = None
        self._step = 0
        self._unserved = False
        self._refused = 0
        self._idle_since = time.monotonic()
        self.gave_up: str | None = None
        """Why the gate ended the run before its last step."""

    def run(self) -> int:
        """Train until `trainer.steps`, a stop, or (offline) the end of the ready groups; return the last step.

        Ends also where the gate rejected too many versions in a row: `gave_up` says so.
        """
        try:
            lease = self._start()
            while not (self.gave_up or self._around.stop.is_set()) and self._step < self.config.trainer.steps:
                lease = lease or self._next_lease()
                if lease is None:
                    break
                self._train(lease)
                lease = None
        finally:
            self._metrics.close()
        return self._step

    # -- start

    def _start(self) -> Lease | None:
        """Bring the job to where its ledger says it is; return the lease that a former process left unfinished."""
        console, root = self._around.console, self._around.folder.checkpoints
        check_recorded_models(self._store, self.config, self._rule, offline=not self._around.engines)
        self._store.register_job(self._job, self._model, msgspec.to_builtins(self.config.trainer))
        lease = self._store.reclaim(self._job, self.config.trainer.batch.lease_s)
        for name in clear_orphans(self._store, self.config, root):
            console.say(f"removed {name}: it was written and never committed")
        for version in abandon_rejected(self._store, self.config):
            console.say(f"version {version.version_id} was rejected by the gate: it is not built on")
        console.say(f"loading the weights of job {self._job!r}")
        self._version = find_weights(self._store, self._workers, self.config, root)
        last = self._store.last_checkpoint(self._job)
        self._step = last.step if last is not None else 0
        self._metrics.reconcile(self._step, last.metrics if last is not None else None)
        if self._around.engines:
            self._start_publishing(self._version)
        if lease is not None and lease.plan.step != self._step + 1:
            self._store.release(lease)
            lease = None
        self._idle_since = time.monotonic()
        return lease

    def _start_publishing(self, version: PolicyVersion) -> None:
        console, engines = self._around.console, self._around.engines
        wait_for_engines(engines, self.config, console.say, self._around.stop.is_set)
        if self._around.stop.is_set():
            return
        self._publisher = Publisher(
            self._store,
            self._model,
            engines,
            self.config.trainer.publish,
            heartbeat_expires_s=self.config.proxy.heartbeat_expires_s,
            on_state=self._on_publish_state,
            stopped=self._around.stop.is_set,
        )
        ended = self._publisher.recover()
        if ended is not None:
            console.say(f"publish {ended.publish_id} had not finished: it is {ended.state} now")
            if abandon_rejected(self._store, self.config):
                version = find_weights(self._store, self._workers, self.config, self._around.folder.checkpoints)
                self._version = version
        self._prove(self._publisher, version_to_serve(self._store, version), version)

    def _prove(self, publisher: Publisher, served: PolicyVersion, newest: PolicyVersion) -> None:
        """Make `served` live and proven; the workers hold the newest weights before and after."""
        console = self._around.console
        if served.version_id != newest.version_id:
            self._unserved = True
            console.say(f"version {served.version_id} is served; version {newest.version_id}, the newest, is held back")
            self._workers.load(served.checkpoint_path, served.checkpoint_hash)
        try:
            report = first_publish(publisher, self._workers, self.config, served, self._around.folder.canary)
        except PublishRejected as rejected:
            if served.version_id != newest.version_id:
                raise
            self._rejected(rejected)
            return
        if report is not None:
            console.say(f"version {served.version_id} is live (publish {report.publish_id}, {report.total_s:.1f} s)")
        if served.version_id != newest.version_id:
            self._workers.load(newest.checkpoint_path, newest.checkpoint_hash)

    def _on_publish_state(self, state: str) -> None:
        if state == "swapping":
            self._around.crash_points.reached("during-publish", self._step)

    # -- one step

    def _next_lease(self) -> Lease | None:
        """Lease the next step's groups, waiting for them; None on a stop, or offline where none will come."""
        batch, step = self.config.trainer.batch, self._step + 1
        while not self._around.stop.is_set():
            lease = self._store.lease(
                self._job,
                self._rule,
                groups=batch.groups,
                lease_s=batch.lease_s,
                step=step,
                epoch=self._rule.epoch,
                seed=step_seed(self.config.trainer.seed, step),
            )
            if lease is not None:
                return lease
            self._catch_up()
            ready = self._store.backlog(self._job, self._rule).ready_groups
            if not self._around.engines:
                self._around.console.say(
                    f"stopped after step {self._step}: {ready} ready groups are left, a step takes {batch.groups}"
                )
                for model, runs in self._store.recorded_elsewhere(self._rule).items():
                    self._around.console.say(
                        f"{runs} runs have calls of these roles that {model!r} answered: --recorded-model {model} "
                        "trains them too"
                    )
                return None
            self._around.console.say(f"step {step} waits for runs: {ready} of {batch.groups} groups are ready")
            self._around.stop.wait(batch.poll_s)
        return None

    def _train(self, lease: Lease) -> None:
        started, crash, step = time.monotonic(), self._around.crash_points, lease.plan.step
        waited = started - self._idle_since
        crash.reached("after-lease", step)
        try:
            done = self._compute(lease, {"wait": waited})
        except LeaseLost as error:
            self._restore(error)
            return
        except NothingToTrain as error:
            self._go_on_without(error)
            return
        if done is None:
            self._around.stop.wait(self.config.trainer.batch.poll_s)
            return
        saved, metrics = done
        crash.reached("after-ledger", step)
        line = {**metrics, "version": self._current.version_id, "publish": None}
        try:
            line["publish"] = self._publish(saved.new, saved.previous)
        except (EngineError, PublishError) as error:
            line["publish"] = {"error": str(error)}
            raise
        finally:
            line["seconds"] = {**metrics["seconds"], "total": time.monotonic() - started}
            self._metrics.record(line)
            self._around.console.step(line)
        crash.reached("after-publish", step)
        self._prune()
        self._idle_since = time.monotonic()

    def _compute(self, lease: Lease, seconds: dict[str, float]) -> tuple[Saved, dict[str, Any]] | None:
        """Train, write and commit under the lease; afterwards the new version is the current one.

        None: everything in the lease has become too stale, so that it was returned. A refused step's lease is returned
        as well: who mends the reason, the rewards perhaps, wants them leased as they are then.
        """
        config, crash, step = self.config.trainer, self._around.crash_points, lease.plan.step
        probe_tokens = config.publish.probe_tokens if self._publisher is not None else 0
        with LeaseKeeper(self._store, lease, config.batch.lease_s) as keeper:
            parent = self._current
            scope, say = config.algorithm.credit.scope, self._around.console.say
            samples, stale = leased_samples(
                self._store, lease, self._rule, scope=scope, current_step=parent.step, say=say
            )
            if stale and not samples.choices:
                self._store.release(keeper.current)
                return None
            try:
                result = self._workers.step(
                    lease.plan, samples, version_id=parent.version_id, probe_tokens=probe_tokens
                )
            except NothingToTrain:
                self._store.refuse(keeper.current, samples.consumption)
                raise
            except StepRefused:
                self._store.release(keeper.current)
                raise
            self._refused = 0
            crash.reached("after-step", step)
            crash.soon("during-checkpoint", step, delay_s=0.02)
            saved = self._workers.save(str(self._around.folder.checkpoints), step)
            crash.reached("after-checkpoint", step)
            made = saved.checkpoint
            times = {**seconds, **result.metrics["seconds"], "checkpoint": made.write_s}
            metrics = {**result.metrics, "step": step, "runs_stale": len(stale)}
            metrics |= {"checkpoint_bytes": made.size_bytes, "seconds": times}
            commit = StepCommit(
                checkpoint_path=made.path,
                checkpoint_hash=made.hash,
                model=self._model,
                parent_version_id=parent.version_id,
                consumption=result.consumption,
                metrics=metrics,
            )
            self._version = commit_patiently(self._store, keeper, commit)
        self._step = step
        return saved, metrics

    def _publish(self, new: tuple[Scored, ...], previous: tuple[Scored, ...] | None = None) -> dict[str, Any] | None:
        """Publish the current version; a pin or the gate may hold it back, which is said and no failure."""
        if self._publisher is None:
            return None
        try:
            report = self._publisher.publish(self._current.version_id, probe_set(new, previous))
        except Pinned as pinned:
            self._unserved = True
            self._store.skip_publish(self._current.version_id, str(pinned))
            self._around.console.say(f"version {self._current.version_id} is not published: {pinned}")
            return {"skipped": str(pinned)}
        except PublishRejected as rejected:
            self._rejected(rejected)
            return rejected.as_json()
        self._unserved = False
        return report.as_json()

    def _rejected(self, rejected: PublishRejected) -> None:
        """Say it, and do what the configuration says of rejected versions."""
        gate, console = self.config.trainer.publish.gate, self._around.console
        assert gate is not None, "only a gate rejects"
        console.say(str(rejected))
        live = self._store.live_version(self._model)
        if gate.rejected.then == "return" and rejected.decision.judged and live is not None:
            self._store.abandon_version(self._current.version_id)
            self._workers.load(live.checkpoint_path, live.checkpoint_hash)
            self._version = live
            console.say(f"training goes on from version {live.version_id} (step {live.step})")
        row, most = rejections_in_a_row(self._store, self._model), gate.rejected.stop_after
        if most is not None and row >= most:
            self.gave_up = f"the gate rejected {row} versions in a row (trainer.publish.gate.rejected.stop_after)"

    def _catch_up(self) -> None:
        """Publish the newest version once a pin no longer holds it back. Called while there is nothing to train."""
        if not self._unserved or self._publisher is None or self._store.pinned(self._model) is not None:
            return
        self._unserved = False
        if version_to_serve(self._store, self._current).version_id != self._current.version_id:
            return  # it was judged against
        settings = self.config.trainer
        sequences = self._workers.probe_sequences(settings.publish.probe_tokens, settings.seed)
        if "result" in (self._publish(sequences) or {}):
            self._around.console.say(f"the pin is off: version {self._current.version_id} is live")

    def _go_on_without(self, error: NothingToTrain) -> None:
        """The runs are put aside and leased no more in this epoch. One such batch may be chance, a row of them is not.

        Raises:
            NothingToTrain: it was one of a row.
        """
        self._refused += 1
        if self._refused == REFUSED_IN_A_ROW:
            raise NothingToTrain(f"{error} The same of {REFUSED_IN_A_ROW} batches in a row: stopped") from error
        self._around.console.say(f"{error} Its runs are put aside: `tracegrad queue --dead`")
        self._idle_since = time.monotonic()

    # -- afterwards

    def _restore(self, error: LeaseLost) -> None:
        """Throw the step away: load what the ledger says is the newest, and clear the folder nobody committed."""
        self._around.console.say(f"step {self._step + 1} is thrown away: {error}")
        root = self._around.folder.checkpoints
        self._version = find_weights(self._store, self._workers, self.config, root)
        last = self._store.last_checkpoint(self._job)
        self._step = last.step if last is not None else 0
        clear_orphans(self._store, self.config, root)
        self._idle_since = time.monotonic()

    def _prune(self) -> None:
        """Remove old folders, never one that is live, being published, or the newest committed one."""
        live, publish = self._store.live_version(self._model), self._store.last_publish(self._model)
        protected = [self._current.checkpoint_path]
        if live is not None:
            protected.append(live.checkpoint_path)
        if publish is not None:
            protected.append(self._store.get_version(publish.version_id).checkpoint_path)
        prune(self._around.folder.checkpoints, keep_last=self.config.trainer.keep_checkpoints, protected=protected)

    @property
    def _current(self) -> PolicyVersion:
        assert self._version is not None, "start-up sets the version before the first step"
        return self._version


def step_seed(seed: int, step: int) -> int:
    """Return the seed of everything random in a step: 32 bits, the same for every job with this seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:4], "big")
