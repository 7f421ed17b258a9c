"""Workers: the learner of a job of one model in a Ray actor (one worker in its group now).

The controller's process imports no torch; the actor does, and sets its own threads. Refuses a worker that dies
(WorkerFailed): the next start resumes. Jobs of several models have `ray_groups`. Called by
`tracegrad.trainer.command`; the controller sees `Trains`, which a bare `Learner` fulfils as well.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.checkpoints import Checkpoint
from tracegrad.trainer.ray_actor import RayActor, ray_running
from tracegrad.trainer.results import Saved, Scored, StepResult
from tracegrad.trainer.samples import Samples


class Trains(Protocol):
    """What the controller needs of a model's worker group. See `tracegrad.trainer.learner.Learner`."""

    def create(self, root: str) -> Checkpoint:
        """Write the checkpoint of step 0 from the base model."""
        ...

    def load(self, path: str, expected_hash: str | None = None) -> int:
        """Verify a folder and take its weights; return its step."""
        ...

    def save(self, root: str, step: int) -> Saved:
        """Write the folder of `step` and score its probe again."""
        ...

    def step(self, plan: BatchPlan, samples: Samples, *, version_id: int | None, probe_tokens: int = 0) -> StepResult:
        """Train one step."""
        ...

    def probe_sequences(self, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """Sample and score sequences from the current weights."""
        ...

    def score(self, sequences: Sequence[Scored], temperature: float = 1.0) -> tuple[Scored, ...]:
        """Score sequences under the current weights."""
        ...

    def perturbed(self, root: str, gap: float, sequences: Sequence[Scored], seed: int) -> Saved:
        """Write visibly changed weights for the canary."""
        ...


class LearnerActor:
    """Runs inside the Ray worker; torch is imported here and not before."""

    def __init__(self, config: Config) -> None:
        from tracegrad.trainer.learner import Learner

        self._learner = Learner(config)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the learner."""
        return getattr(self._learner, method)(*args, **kwargs)


class RayWorkers:
    """The worker group of `config.trainer.model`. A context manager: leaving it ends what entering it started."""

    def __init__(self, config: Config, *, address: str | None = None) -> None:
        self._config, self._address = config, address
        self._actor: RayActor | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> "RayWorkers":
        threads = self._config.trainer.workers.threads
        self._cleanup.enter_context(ray_running(self._address, threads))
        self._actor = RayActor(
            LearnerActor,
            self._config,
            what=f"model {self._config.trainer.model!r}",
            n_cpus=threads,
            address=self._address,
        )
        self._cleanup.callback(self._actor.kill)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def create(self, root: str) -> Checkpoint:
        """As `Learner.create`."""
        return self._call("create", root)

    def load(self, path: str, expected_hash: str | None = None) -> int:
        """As `Learner.load`."""
        return self._call("load", path, expected_hash)

    def save(self, root: str, step: int) -> Saved:
        """As `Learner.save`."""
        return self._call("save", root, step)

    def step(self, plan: BatchPlan, samples: Samples, *, version_id: int | None, probe_tokens: int = 0) -> StepResult:
        """As `Learner.step`."""
        return self._call("step", plan, samples, version_id=version_id, probe_tokens=probe_tokens)

    def probe_sequences(self, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """As `Learner.probe_sequences`."""
        return self._call("probe_sequences", n_tokens, seed)

    def score(self, sequences: Sequence[Scored], temperature: float = 1.0) -> tuple[Scored, ...]:
        """As `Learner.score`."""
        return self._call("score", sequences, temperature)

    def perturbed(self, root: str, gap: float, sequences: Sequence[Scored], seed: int) -> Saved:
        """As `Learner.perturbed`."""
        return self._call("perturbed", root, gap, sequences, seed)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        assert self._actor is not None, "enter the worker group first"
        return self._actor.call(method, *args, **kwargs)
