"""Every worker group of a job, stepped in parallel, checkpointed as one, and stopped as one (law 9).

A step succeeds for all models or for none: once a group has failed or refused, the others' weights in memory belong to
no committed step, so all of them refuse everything but `load` and `create` from then on. A worker that dies in a step
is started again, once, and all groups begin the step anew from the checkpoint they stood on. One folder with one
manifest holds all models, each in a subfolder of its name. Refuses a checkpoint of other models. No torch, no Ray:
groups are whatever fulfils `TrainsModels`. Called by the controller.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Protocol, TypeVar

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.checkpoints import Checkpoint, step_folder, verify_checkpoint, write_checkpoint
from tracegrad.trainer.comparison import Statistics
from tracegrad.trainer.errors import CheckpointError, TrainerError, WorkerDied
from tracegrad.trainer.exchange import CriticValues, Told
from tracegrad.trainer.refusals import nothing_to_train
from tracegrad.trainer.results import Saved, Scored, StepResult, Written
from tracegrad.trainer.samples import Samples, excluded_by_reason
from tracegrad.trainer.shares import Shares

T = TypeVar("T")
_WAIT_S = 0.5


class TrainsModels(Protocol):
    """What is needed of one worker group. See `tracegrad.trainer.model_group.ModelGroup`."""

    def start(self) -> None:
        """Take every model as its job begins with it."""
        ...

    def restore(self, folder: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Take every model out of its subfolder."""
        ...

    def write(self, folder: str) -> dict[str, Written]:
        """Write every model into its subfolder."""
        ...

    def values(
        self, plan: BatchPlan, samples: Mapping[str, Samples], *, probe_tokens: int = 0
    ) -> dict[str, CriticValues]:
        """Begin a step of each model that has something to train; `appraise` and `step` go on from there."""
        ...

    def appraise(
        self, plan: BatchPlan, samples: Mapping[str, Samples], *, probe_tokens: int = 0, told: Told | None = None
    ) -> dict[str, Statistics]:
        """The same, or go on where something is told."""
        ...

    def step(
        self,
        plan: BatchPlan,
        samples: Mapping[str, Samples],
        *,
        version_ids: Mapping[str, int | None],
        probe_tokens: int = 0,
        told: Told | None = None,
    ) -> dict[str, StepResult]:
        """Train one step of each model that has something to train. `told`: what all models said of theirs."""
        ...

    def probe_sequences(self, model: str, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """Sample and score sequences from the current weights of a model."""
        ...

    def perturbed(self, model: str, root: str, gap: float, sequences: tuple[Scored, ...], seed: int) -> Saved:
        """Write visibly changed weights of a model for the canary."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """One model of a checkpoint: `path` is what its engine loads; scores as in `results.Saved`."""

    path: str
    previous: tuple[Scored, ...] = ()
    new: tuple[Scored, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModels:
    """One checkpoint of all models. A version row of a model names its `path` and the checkpoint's hash."""

    checkpoint: Checkpoint
    by_model: Mapping[str, SavedModel]


class WorkerGroups:
    """The groups of the job of `config`, by the names of its `worker_groups`.

    `stop` is set as soon as a group has failed: a group that waits for a process of its own gives up then.
    """

    def __init__(self, groups: Mapping[str, TrainsModels], config: Config, stop: Event | None = None) -> None:
        self._groups, self._models = groups, config.worker_groups()
        self._holding = {name: group for group, names in self._models.items() for name in names}
        credit = config.trainer.algorithm.credit
        self._over_batch, self._all_critics = credit.normalise == "batch", credit.bootstrap == "all"
        self._stop = stop or Event()
        self._sound = False
        self._begun: tuple[str, str | None] = ("", None)
        """The checkpoint whose weights the groups hold, but for steps since."""

    def create(self, root: str) -> SavedModels:
        """Take every model as the job begins with it and write the checkpoint of step 0 under `root`."""
        self._load(lambda _name, group: group.start())
        return self.save(root, 0)

    def load(self, path: str, expected_hash: str | None = None) -> int:
        """Verify a checkpoint (or a model's subfolder of it), take all models from it, bitwise; return its step.

        Raises:
            CheckpointError: it is damaged, is not the one the row names, or holds other models than the job trains.
        """
        manifest = verify_checkpoint(path, expected_hash)
        facts = manifest["facts"].get("models") or {manifest["facts"].get("model"): manifest["facts"]}
        if set(facts) != set(self._holding):
            raise CheckpointError(
                f"checkpoint {path} holds {', '.join(sorted(map(str, facts)))}, the job trains "
                f"{', '.join(self._holding)}: give a job of other models another name"
            )
        folder = str(step_folder(path))
        self._load(lambda _name, group: group.restore(folder, facts))
        self._begun = (path, expected_hash)
        return int(manifest["step"])

    def step(
        self,
        plan: BatchPlan,
        shares: Shares,
        *,
        version_ids: Mapping[str, int | None],
        probe_tokens: int = 0,
    ) -> dict[str, StepResult]:
        """Train one step of every model that has something to train, groups in parallel; model -> its result.

        A model without a result keeps its weights. What is committed with the step is the account of `shares`.

        Raises:
            NothingToTrain: no model has anything to train; nothing changed.
            StepRefused: one refused: load before going on.
            WorkerFailed: a worker died once more, or failed; the same.
        """
        self._check_sound()
        if not any(samples.choices for samples in shares.by_model.values()):
            raise nothing_to_train(plan, excluded_by_reason(shares.consumption))

        def train() -> dict[str, StepResult]:
            told = self._told(plan, shares, probe_tokens)

            def one(name: str, group: TrainsModels) -> dict[str, StepResult]:
                own = self._own(name, shares)
                return group.step(plan, own, version_ids=version_ids, probe_tokens=probe_tokens, told=told)

            return _joined(self._all(one))

        try:
            return train()
        except WorkerDied:
            self.load(*self._begun)
            again = train()
            return {m: replace(done, metrics={**done.metrics, "workers_restarted": 1}) for m, done in again.items()}

    def save(self, root: str, step: int) -> SavedModels:
        """Write all models into one folder, groups in parallel; meanwhile they score their probes again."""
        self._check_sound()
        written: dict[str, Written] = {}
        facts: dict[str, Any] = {"models": {}}  # known with the files: the manifest is made of both afterwards

        def fill(folder: Path) -> dict[str, str]:
            written.update(_joined(self._all(lambda _name, group: group.write(str(folder)))))
            facts["models"].update({model: each.facts for model, each in written.items()})
            return {
                f"{model}/{file}": digest for model, each in written.items() for file, digest in each.digests.items()
            }

        made = write_checkpoint(Path(root), step, fill, facts)
        self._begun = (made.path, made.hash)
        return SavedModels(
            checkpoint=made,
            by_model={
                model: SavedModel(path=str(Path(made.path) / model), previous=each.previous, new=each.new)
                for model, each in written.items()
            },
        )

    def probe_sequences(self, model: str, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """Sample sequences from the current weights of a model and score them."""
        self._check_sound()
        return self._groups[self._holding[model]].probe_sequences(model, n_tokens, seed)

    def perturbed(self, model: str, root: str, gap: float, sequences: tuple[Scored, ...], seed: int) -> Saved:
        """Write visibly changed weights of a model, with their scores; those in memory are the same afterwards."""
        self._check_sound()
        return self._groups[self._holding[model]].perturbed(model, root, gap, sequences, seed)

    # -- inside

    def _own(self, name: str, shares: Shares) -> dict[str, Samples]:
        return {model: shares.by_model[model] for model in self._models[name]}

    def _told(self, plan: BatchPlan, shares: Shares, probe_tokens: int) -> Told | None:
        """What models must hear of one another before any can train; None where each knows enough by itself.

        First the values of all critics (`bootstrap: all`), then with them the advantages (`normalise: batch`).
        """
        if sum(bool(samples.choices) for samples in shares.by_model.values()) < 2:
            return None

        def values(name: str, group: TrainsModels) -> dict[str, CriticValues]:
            return group.values(plan, self._own(name, shares), probe_tokens=probe_tokens)

        def appraise(name: str, group: TrainsModels) -> dict[str, Statistics]:
            return group.appraise(plan, self._own(name, shares), probe_tokens=probe_tokens, told=told)

        told = Told(values=_joined(self._all(values))) if self._all_critics else None
        if not self._over_batch:
            return told
        found = _joined(self._all(appraise))
        batch = Statistics.joined([found[model] for model in self._holding if model in found])
        return replace(told or Told(), batch=batch)

    def _load(self, call: Callable[[str, TrainsModels], None]) -> None:
        self._stop.clear()
        self._all(call)
        self._sound = True

    def _check_sound(self) -> None:
        if not self._sound:
            raise TrainerError(
                "the models in memory are of no committed step: a group failed, or none was loaded; load a checkpoint"
            )

    def _all(self, call: Callable[[str, TrainsModels], T]) -> dict[str, T]:
        """Call every group at once. The first failure is raised, and nothing in memory counts from then on."""
        with ThreadPoolExecutor(len(self._groups)) as pool:
            futures = {pool.submit(call, name, group): name for name, group in self._groups.items()}
            done = False
            try:
                _wait(futures)
                done = True
            finally:
                if not done:
                    self._sound = False
                    self._stop.set()
            return {name: future.result() for future, name in futures.items()}


def _wait(futures: Mapping[Future[T], str]) -> None:
    """Wait for all, or for the first that fails, and raise what it raised. In slices: signals reach the process."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=_WAIT_S, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _joined(by_group: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    return {model: result for results in by_group.values() for model, result in results.items()}
