"""Workers: the learner in a Ray actor, one worker group per physical model (one worker in it now).

The controller's process imports no torch; the actor does, and sets its own threads. Errors come back as the classes
they were raised as. A local Ray is started for the job and shut down with it: no dashboard, no usage statistics, no
upload of the working directory, nothing on the console. With an address the job joins that cluster instead; its nodes
must then see the same checkpoint folders. Refuses a worker that dies (WorkerFailed): the next start resumes.
Called by `tracegrad.trainer.command`; the controller sees `Trains`, which a bare `Learner` fulfils as well.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.checkpoints import Checkpoint
from tracegrad.trainer.errors import TrainerError, WorkerFailed
from tracegrad.trainer.results import Saved, Scored, StepResult
from tracegrad.trainer.samples import Samples

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_BOUNDED_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""torch on CPUs keeps a compiled kernel per matrix shape, 1,024 of them. Every packed row has its own length, so the
learner grew by 80 MB a step (SmolLM2) for kernels it never used again; 128 hold those of one row."""
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
_WAIT_S = 0.5


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
        self._actor: Any = None
        self._owned = False

    def __enter__(self) -> "RayWorkers":
        os.environ.update({name: value for name, value in (_QUIET | _BOUNDED_CACHES).items() if name not in os.environ})
        import ray

        threads = self._config.trainer.threads
        if self._address is None:
            ray.init(
                address="local",
                num_cpus=threads,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
        else:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        self._owned = True
        options: dict[str, Any] = {"num_cpus": threads, "max_restarts": 0, "max_task_retries": 0}
        if self._address is not None:  # the workers of a cluster do not inherit our environment
            options["runtime_env"] = {"env_vars": _BOUNDED_CACHES}
        self._actor = ray.remote(**options)(LearnerActor).remote(self._config)
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._owned:
            if self._actor is not None:
                ray.kill(self._actor)
            ray.shutdown()

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
        """Wait in slices, so that signals reach the process; raise what the learner raised."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        reference = self._actor.call.remote(method, args, kwargs)
        while not ray.wait([reference], timeout=_WAIT_S)[0]:
            pass
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, TrainerError):
                raise error.cause from error
            raise WorkerFailed(
                f"{method} failed in the worker of model {self._config.trainer.model!r}: "
                f"{type(error.cause).__name__}: {error.cause}"
            ) from error
        except RayActorError as error:
            raise WorkerFailed(
                f"the worker of model {self._config.trainer.model!r} died during {method} ({error}); "
                "start again: training resumes from the last committed step"
            ) from error
