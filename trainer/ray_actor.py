"""Ray as the trainer uses it: started or joined, and actors that are called one method at a time.

A local Ray is started for the job and shut down with it: no dashboard, no usage statistics, no upload of the working
directory, nothing on the console. With an address the job joins that cluster instead; its nodes must then see the same
checkpoint folders. Errors come back as the classes they were raised as. Called by `workers` and `ray_groups`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from tracegrad.trainer.errors import TrainerError, WorkerFailed

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


@contextmanager
def ray_running(address: str | None, n_cpus: int) -> Iterator[None]:
    """Start a local Ray with room for `n_cpus`, or join the cluster at `address`; leave it afterwards."""
    os.environ.update({name: value for name, value in (_QUIET | _BOUNDED_CACHES).items() if name not in os.environ})
    import ray

    if address is None:
        ray.init(
            address="local",
            num_cpus=n_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


class RayActor:
    """One actor whose `call(method, args, kwargs)` does the work. `what`: how messages name it."""

    def __init__(
        self, made_of: type, *args: Any, what: str, n_cpus: int, address: str | None, bundle: Any = None
    ) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": n_cpus, "max_restarts": 0, "max_task_retries": 0}
        if address is not None:  # the workers of a cluster do not inherit our environment
            options["runtime_env"] = {"env_vars": _BOUNDED_CACHES}
        if bundle is not None:
            options["scheduling_strategy"] = bundle
        self._what = what
        self._actor: Any = ray.remote(**options)(made_of).remote(*args)

    def kill(self) -> None:
        """End its process."""
        import ray

        ray.kill(self._actor)

    def call(self, method: str, *args: Any, stop: Event | None = None, **kwargs: Any) -> Any:
        """Wait in slices, so that signals reach the process; raise what the method raised.

        Raises:
            WorkerFailed: the process died, something without a name of ours was raised, or `stop` was set meanwhile.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        reference = self._actor.call.remote(method, args, kwargs)
        while not ray.wait([reference], timeout=_WAIT_S)[0]:
            if stop is not None and stop.is_set():
                raise WorkerFailed(f"{method} of {self._what} is given up: another group has failed")
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, TrainerError):
                raise error.cause from error
            raise WorkerFailed(
                f"{method} failed in the worker of {self._what}: {type(error.cause).__name__}: {error.cause}"
            ) from error
        except RayActorError as error:
            raise WorkerFailed(
                f"the worker of {self._what} died during {method} ({error}); "
                "start again: training resumes from the last committed step"
            ) from error
