"""Workers: the learner of a job of one model in Ray actors, one for each worker of its group.

The controller's process imports no torch; the actors do, and set their own threads. A worker that dies in a step is
started again, once, from the weights that the step began with. Refuses a second death, and any elsewhere (WorkerDied):
the next start resumes. Jobs of several models have `ray_groups`. Called by
`tracegrad.trainer.command`; the controller sees `Trains`, which a bare `Learner` fulfils as well.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.checkpoints import Checkpoint
from tracegrad.trainer.errors import WorkerDied
from tracegrad.trainer.ray_cluster import places, ray_running
from tracegrad.trainer.ray_team import RayTeam
from tracegrad.trainer.results import Saved, Scored, StepResult
from tracegrad.trainer.samples import Samples

if TYPE_CHECKING:
    from tracegrad.trainer.learner import Learner
    from tracegrad.trainer.ranks import Ranks


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


class RayWorkers:
    """The worker group of `config.trainer.model`. A context manager: leaving it ends what entering it started."""

    def __init__(self, config: Config, *, address: str | None = None) -> None:
        self._config, self._address = config, address
        self._team: RayTeam | None = None
        self._begun: tuple[str, str | None] = ("", None)
        """The checkpoint whose weights the workers hold, but for steps since."""
        self._cleanup = ExitStack()

    def __enter__(self) -> "RayWorkers":
        model, workers = self._config.trainer.model, self._config.trainer.workers
        self._cleanup.enter_context(ray_running(self._address, workers.threads * workers.per_group))
        ((_, of_group),) = places([model], workers, address=self._address)
        self._team = RayTeam(_made, self._config, what=f"model {model!r}", places=of_group)
        self._cleanup.callback(self._team.end)
        self._team.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def create(self, root: str) -> Checkpoint:
        """As `Learner.create`."""
        made: Checkpoint = self._call("create", root)
        self._begun = (made.path, made.hash)
        return made

    def load(self, path: str, expected_hash: str | None = None) -> int:
        """As `Learner.load`."""
        self._begun = (path, expected_hash)
        return self._call("load", path, expected_hash)

    def save(self, root: str, step: int) -> Saved:
        """As `Learner.save`."""
        saved: Saved = self._call("save", root, step)
        self._begun = (saved.checkpoint.path, saved.checkpoint.hash)
        return saved

    def step(self, plan: BatchPlan, samples: Samples, *, version_id: int | None, probe_tokens: int = 0) -> StepResult:
        """As `Learner.step`. Where a worker dies, the step begins once more."""
        try:
            return self._call("step", plan, samples, version_id=version_id, probe_tokens=probe_tokens)
        except WorkerDied:
            self._call("load", *self._begun)
            done: StepResult = self._call("step", plan, samples, version_id=version_id, probe_tokens=probe_tokens)
            return replace(done, metrics={**done.metrics, "workers_restarted": 1})

    def probe_sequences(self, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """As `Learner.probe_sequences`."""
        return self._call("probe_sequences", n_tokens, seed)

    def score(self, sequences: Sequence[Scored], temperature: float = 1.0) -> tuple[Scored, ...]:
        """As `Learner.score`."""
        return self._call("score", sequences, temperature)

    def perturbed(self, root: str, gap: float, sequences: Sequence[Scored], seed: int) -> Saved:
        """As `Learner.perturbed`."""
        return self._call("perturbed", root, gap, sequences, seed)

    def processes(self) -> list[int]:
        """Return the id of each worker's process."""
        assert self._team is not None, "enter the worker group first"
        return self._team.processes()

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        assert self._team is not None, "enter the worker group first"
        return self._team.call(method, *args, **kwargs)


def _made(config: Config, ranks: "Ranks") -> "Learner":
    from tracegrad.trainer.learner import Learner

    return Learner(config, ranks=ranks)
