"""The controller: lease -> traces -> samples -> step -> checkpoint -> commit -> publish -> metrics -> prune, and again.

It owns no weights and imports no torch; workers do the arithmetic. The commit is one transaction of the store
(`commit_step`): before it the step never happened, after it the step is never repeated, wherever the process dies.
Fail closed (law 9): a refused step, a failed publish or an unreachable store ends the run with its error; the service
keeps the last good version. A lost lease throws the step away and restores the last committed weights.
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
from tracegrad.tracestore.errors import LeaseLost, StoreUnavailable
from tracegrad.tracestore.records import Lease, PolicyVersion, StepCommit
from tracegrad.tracestore.rules import lease_rule
from tracegrad.tracestore.store import Store
from tracegrad.trainer.checkpoints import prune
from tracegrad.trainer.crash_points import CrashPoints
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.errors import EngineError, PublishError, StepRefused
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.lease_keeper import LeaseKeeper
from tracegrad.trainer.metrics import Console, MetricsLog
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.results import Saved
from tracegrad.trainer.samples import Samples, build_batch
from tracegrad.trainer.staleness import without_stale_runs
from tracegrad.trainer.startup import (
    clear_orphans,
    find_weights,
    first_publish,
    probe_set,
    wait_for_engines,
)
from tracegrad.trainer.trackers import Tracker
from tracegrad.trainer.workers import Trains

_COMMIT_TRIES = 5
_COMMIT_PAUSE_S = 1.0


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
        self._idle_since = time.monotonic()

    def run(self) -> int:
        """Train until `trainer.steps`, a stop, or (offline) the end of the ready groups; return the last step."""
        try:
            lease = self._start()
            while not self._around.stop.is_set() and self._step < self.config.trainer.steps:
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
        self._store.register_job(self._job, self._model, msgspec.to_builtins(self.config.trainer))
        lease = self._store.reclaim(self._job, self.config.trainer.batch.lease_s)
        for name in clear_orphans(self._store, self.config, root):
            console.say(f"removed {name}: it was written and never committed")
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
        )
        failed = self._publisher.recover()
        if failed is not None:
            console.say(f"publish {failed.publish_id} had not finished: its version is published again")
        report = first_publish(self._publisher, self._workers, self.config, version, self._around.folder.canary)
        if report is not None:
            console.say(f"version {version.version_id} is live (publish {report.publish_id}, {report.total_s:.1f} s)")

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
            ready = self._store.backlog(self._job, self._rule).ready_groups
            if not self._around.engines:
                self._around.console.say(
                    f"stopped after step {self._step}: {ready} ready groups are left, a step takes {batch.groups}"
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
        if done is None:
            self._around.stop.wait(self.config.trainer.batch.poll_s)
            return
        saved, metrics = done
        crash.reached("after-ledger", step)
        line = {**metrics, "version": self._current.version_id, "publish": None}
        try:
            line["publish"] = self._publish(saved)
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
            samples, stale = self._samples(lease)
            if stale and not samples.choices:
                self._store.release(keeper.current)
                return None
            try:
                result = self._workers.step(
                    lease.plan, samples, version_id=parent.version_id, probe_tokens=probe_tokens
                )
            except StepRefused:
                self._store.release(keeper.current)
                raise
            crash.reached("after-step", step)
            crash.soon("during-checkpoint", step, delay_s=0.02)
            saved = self._workers.save(str(self._around.folder.checkpoints), step)
            crash.reached("after-checkpoint", step)
            made = saved.checkpoint
            times = {**seconds, **result.metrics["seconds"], "checkpoint": made.write_s}
            metrics = {
                **result.metrics,
                "step": step,
                "runs_stale": len(stale),
                "checkpoint_bytes": made.size_bytes,
                "seconds": times,
            }
            commit = StepCommit(
                checkpoint_path=made.path,
                checkpoint_hash=made.hash,
                model=self._model,
                parent_version_id=parent.version_id,
                consumption=result.consumption,
                metrics=metrics,
            )
            self._version = self._commit(keeper, commit)
        self._step = step
        return saved, metrics

    def _commit(self, keeper: LeaseKeeper, commit: StepCommit) -> PolicyVersion:
        """Commit; a store that is away for a moment is asked again, which it knows how to answer."""
        for attempt in range(1, _COMMIT_TRIES + 1):
            try:
                return self._store.commit_step(keeper.current, commit)
            except StoreUnavailable:
                if attempt == _COMMIT_TRIES:
                    raise
                time.sleep(_COMMIT_PAUSE_S)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _samples(self, lease: Lease) -> tuple[Samples, frozenset[str]]:
        """Return what the lease has to train, and the runs in it that have become too stale meanwhile."""
        samples = build_batch(
            self._store.lease_traces(lease),
            model=self._model,
            role_model=self.config.model_of,
            reward_weights=self.config.trainer.algorithm.credit.reward_weights,
            scope=self.config.trainer.algorithm.credit.scope,
        )
        samples, stale = without_stale_runs(
            samples,
            lambda version_id: self._store.get_version(version_id).step,
            step=self._current.step,
            max_staleness=self._rule.max_staleness,
        )
        if stale:
            self._around.console.say(
                f"step {lease.plan.step}: {len(stale)} of {len(lease.plan.run_ids)} runs became too stale since they "
                f"were leased and are {'left out' if samples.choices else 'returned'}"
            )
        return samples, stale

    def _publish(self, saved: Saved) -> dict[str, Any] | None:
        if self._publisher is None:
            return None
        probe = probe_set(saved.new, saved.previous)
        return self._publisher.publish(self._current.version_id, probe).as_json()

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
