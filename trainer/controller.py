"""The controller: lease -> traces -> shares -> step -> checkpoint -> commit -> publish -> metrics -> prune, and again.

It owns no weights and imports no torch; worker groups do the arithmetic, one for each model that holds weights, and a
step is one for all models: one lease, one checkpoint, one commit. The commit is one transaction of the store
(`commit_step`): before it the step never happened, after it the step is never repeated, wherever the process dies.
Fail closed (law 9): a refused step, a failed publish or an unreachable store ends the run with its error; the service
keeps the last good version. What a gate rejects or a pin holds back is no failure: it is said, and the last good
version serves on. A batch with nothing to train in it is put aside and not leased again in its epoch. A lost lease
or a rollback behind its back throws the step away and restores the last committed weights that stand.
Offline (no publisher): versions are committed and not published, and the run ends when the store has no more ready
groups. Called by `tracegrad.trainer.command` and by tests.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import msgspec

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import Abandoned, LeaseLost
from tracegrad.tracestore.records import Lease, PolicyVersion
from tracegrad.tracestore.rules import lease_rule
from tracegrad.tracestore.step_records import NewVersion, StepCommit
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.time_shares import shares_of
from tracegrad.tracestore.trainers import TrainerPhase
from tracegrad.trainer.checkpoints import Checkpoint, prune
from tracegrad.trainer.crash_points import CrashPoints
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.errors import EngineError, NothingToTrain, PublishError, StepRefused
from tracegrad.trainer.gate import abandon_rejected
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.joint_metrics import joint_metrics
from tracegrad.trainer.lease_keeper import LeaseKeeper
from tracegrad.trainer.leased import commit_patiently, leased_shares, require_kept
from tracegrad.trainer.metrics import Console, MetricsLog
from tracegrad.trainer.publishing import Publishing
from tracegrad.trainer.startup import clear_orphans, find_weights
from tracegrad.trainer.tokenizer_match import check_recorded_models
from tracegrad.trainer.trackers import Tracker
from tracegrad.trainer.worker_groups import SavedModels, WorkerGroups

REFUSED_IN_A_ROW = 3
"""So many batches without anything to train are no chance: training stops, before the whole queue is put aside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a controller works with. `engines`: model -> its replicas; empty offline. `phase` is told what it does."""

    store: Store
    workers: WorkerGroups
    folder: JobFolder
    console: Console
    engines: Mapping[str, Sequence[EngineClient]] = field(default_factory=dict)
    trackers: Sequence[Tracker] = ()
    crash_points: CrashPoints = field(default_factory=CrashPoints)
    stop: Event = field(default_factory=Event)
    phase: Callable[[TrainerPhase, int], None] = lambda _phase, _step: None


class Controller:
    """One training job from start-up to its last step."""

    def __init__(self, config: Config, around: Surroundings) -> None:
        self.config = config
        self._around = around
        self._store, self._workers = around.store, around.workers
        self._job = config.trainer.job
        self._rule = lease_rule(config, offline=not around.engines)
        self._metrics = MetricsLog(around.folder.path, around.trackers, around.console.say)
        self._publishing: Publishing | None = None
        if around.engines:
            say, on_state, stopped = around.console.say, self._on_publish_state, around.stop.is_set
            self._publishing = Publishing(
                config, around.store, around.engines, say=say, on_state=on_state, stopped=stopped
            )
        self._versions: dict[str, PolicyVersion] = {}
        self._step = 0
        self._refused = 0
        self._idle_since = time.monotonic()

    @property
    def gave_up(self) -> str | None:
        """Why the gate ended the run before its last step."""
        return None if self._publishing is None else self._publishing.gave_up

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
        console, models = self._around.console, self.config.trained_models()
        self._around.phase("loading", self._step)
        if self._publishing is not None:
            self._publishing.end_left()
        check_recorded_models(self._store, self.config, self._rule, offline=not self._around.engines)
        self._store.register_job(self._job, models, msgspec.to_builtins(self.config.trainer))
        lease = self._store.reclaim(self._job, self.config.trainer.batch.lease_s)
        for name in clear_orphans(self._store, self.config, self._around.folder.checkpoints):
            console.say(f"removed {name}: it was written and never committed")
        self._leave_rejected()
        console.say(f"loading the weights of job {self._job!r}" + (f": {', '.join(models)}" if len(models) > 1 else ""))
        self._find_weights()
        last = self._store.last_checkpoint(self._job)
        self._metrics.reconcile(self._step, last.metrics if last is not None else None)
        if self._publishing is not None:
            if self._publishing.recover() and self._leave_rejected():
                self._find_weights()
            self._publishing.prove(self._versions, self._workers, self._around.folder)
            self._go_back()
        if lease is not None and lease.plan.step != self._step + 1:
            self._store.release(lease)
            lease = None
        self._idle_since = time.monotonic()
        return lease

    def _leave_rejected(self) -> bool:
        rejected = abandon_rejected(self._store, self.config)
        for version in rejected:
            self._around.console.say(f"version {version.version_id} was rejected by the gate: it is not built on")
        return bool(rejected)

    def _find_weights(self) -> None:
        """Load what the ledger says is the newest, all models of it."""
        self._versions = find_weights(self._store, self._workers, self.config, self._around.folder.checkpoints)
        last = self._store.last_checkpoint(self._job)
        self._step = last.step if last is not None else 0

    def _go_back(self) -> None:
        """Where a version was rejected or rolled back: load what the job goes on from."""
        if self._publishing is None or not self._publishing.went_back:
            return
        self._publishing.went_back = False
        self._find_weights()
        for version in self._versions.values():
            self._around.console.say(f"training goes on from version {version.version_id} (step {version.step})")

    def _on_publish_state(self, state: str) -> None:
        if state == "swapping":
            self._around.crash_points.reached("during-publish", self._step)

    # -- one step

    def _next_lease(self) -> Lease | None:
        """Lease the next step's groups, waiting for them; None on a stop, or offline where none will come."""
        batch = self.config.trainer.batch
        while not self._around.stop.is_set():
            step = self._step + 1
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
            self._around.phase("waiting", step)
            if self._publishing is not None:
                self._publishing.catch_up(self._versions, self._workers)
                self._go_back()
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
        self._around.phase("training", step)
        try:
            done = self._compute(lease, {"wait": waited})
        except (LeaseLost, Abandoned) as error:
            self._restore(error)
            return
        except NothingToTrain as error:
            self._go_on_without(error)
            return
        if done is None:
            self._around.stop.wait(self.config.trainer.batch.poll_s)
            return
        made, saved, metrics = done
        crash.reached("after-ledger", step)
        line = {**metrics, **_of_one_or_each("version", {m: v.version_id for m, v in made.items()}), "publish": None}
        try:
            if self._publishing is not None:
                self._around.phase("publishing", step)
                line |= _of_one_or_each("publish", self._publishing.publish(made, saved.by_model))
        except (EngineError, PublishError) as error:
            line["publish"] = {"error": str(error)}
            raise
        finally:
            line["seconds"] = {**metrics["seconds"], "total": time.monotonic() - started}
            line |= shares_of([line])
            self._metrics.record(line)
            self._around.console.step(line)
        self._go_back()
        crash.reached("after-publish", step)
        self._prune()
        self._idle_since = time.monotonic()

    def _compute(
        self, lease: Lease, seconds: dict[str, float]
    ) -> tuple[dict[str, PolicyVersion], SavedModels, dict[str, Any]] | None:
        """Train, write and commit under the lease, all models at once; afterwards the new versions are the current.

        None: everything in the lease has become too stale, so that it was returned. A refused step's lease is returned
        as well: who mends the reason, the rewards perhaps, wants them leased as they are then.
        """
        config, crash, step = self.config.trainer, self._around.crash_points, lease.plan.step
        probe_tokens = config.publish.probe_tokens if self._publishing is not None else 0
        version_ids = {model: version.version_id for model, version in self._versions.items()}
        with LeaseKeeper(self._store, lease, config.batch.lease_s) as keeper:
            require_kept(self._store, keeper.current, version_ids.values())
            shares, stale = leased_shares(
                self._store,
                lease,
                self._rule,
                scope=config.algorithm.credit.scope,
                updates={model: version.updates for model, version in self._versions.items()},
                say=self._around.console.say,
            )
            if stale and not shares.n_trained_tokens:
                self._store.release(keeper.current)
                return None
            try:
                results = self._workers.step(lease.plan, shares, version_ids=version_ids, probe_tokens=probe_tokens)
            except NothingToTrain:
                self._store.refuse(keeper.current, shares.consumption)
                raise
            except StepRefused:
                self._store.release(keeper.current)
                raise
            self._refused = 0
            crash.reached("after-step", step)
            crash.soon("during-checkpoint", step, delay_s=0.02)
            saved = self._workers.save(str(self._around.folder.checkpoints), step)
            crash.reached("after-checkpoint", step)
            metrics = _measured(joint_metrics(results, shares), step, len(stale), seconds, saved.checkpoint)
            commit = StepCommit(
                checkpoint_path=saved.checkpoint.path,
                checkpoint_hash=saved.checkpoint.hash,
                versions=[
                    NewVersion(model=model, path=saved.by_model[model].path, parent_id=version_ids[model])
                    for model in results
                ],
                consumption=shares.consumption,
                metrics=metrics,
                unchanged=[version_id for model, version_id in version_ids.items() if model not in results],
            )
            made = commit_patiently(self._store, keeper, commit)
        self._versions = {**self._versions, **made}
        self._step = step
        return made, saved, metrics

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

    def _restore(self, error: LeaseLost | Abandoned) -> None:
        """Throw the step away: load what the ledger says is the newest, and clear the folder nobody committed."""
        self._around.console.say(f"step {self._step + 1} is thrown away: {error}")
        self._find_weights()
        clear_orphans(self._store, self.config, self._around.folder.checkpoints)
        self._idle_since = time.monotonic()

    def _prune(self) -> None:
        """Remove old folders, never one that is live, being published, or the newest committed one."""
        protected = [version.checkpoint_path for version in self._versions.values()]
        if self._publishing is not None:
            protected += self._publishing.folders()
        prune(self._around.folder.checkpoints, keep_last=self.config.trainer.keep_checkpoints, protected=protected)


def _measured(
    metrics: dict[str, Any], step: int, n_stale: int, seconds: Mapping[str, float], made: Checkpoint
) -> dict[str, Any]:
    times = {**seconds, **metrics["seconds"], "checkpoint": made.write_s}
    return {**metrics, "step": step, "runs_stale": n_stale, "checkpoint_bytes": made.size_bytes, "seconds": times}


def _of_one_or_each(name: str, by_model: Mapping[str, Any]) -> dict[str, Any]:
    """What a metrics line says of each model: plainly where there is one."""
    return {name: next(iter(by_model.values())) if len(by_model) == 1 else {**by_model}}


def step_seed(seed: int, step: int) -> int:
    """Return the seed of everything random in a step: 32 bits, the same for every job with this seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:4], "big")
