"""Ray as the trainer uses it: started for the job or joined, and room reserved for all of its workers at once.

A local Ray is started for the job and shut down with it: no dashboard, no usage statistics, no upload of the working
directory, nothing on the console. With an address the job joins that cluster instead; its nodes must then have this
package and see the same checkpoint folders. The workers' resources are one placement group, so a job gets all its
processes or none. Refuses a cluster without room for them (WorkerFailed). Called by `workers` and `ray_groups`.
"""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tracegrad.tracestore.config import WorkersConfig
from tracegrad.trainer.errors import WorkerFailed

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_OF_WORKERS = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""torch on CPUs keeps a compiled kernel per matrix shape, 1,024 of them. Every packed row has its own length, so the
learner grew by 80 MB a step (SmolLM2) for kernels it never used again; 128 hold those of one row. cuBLAS is
deterministic only with a workspace of fixed size."""
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
_ROOM_TIMEOUT_S = 60.0
_REACH_TIMEOUT_S = 10.0


@contextmanager
def ray_running(address: str | None, n_cpus: int) -> Iterator[None]:
    """Start a local Ray with room for `n_cpus`, or join the cluster at `address`; leave it afterwards.

    Raises:
        WorkerFailed: there is no cluster at the address, or it does not take us.
    """
    os.environ.update({name: value for name, value in (_QUIET | _OF_WORKERS).items() if name not in os.environ})
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
        _join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    """Join, where something listens: Ray itself tries for longer than anybody waits, deaf to signals."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host, int(port)), _REACH_TIMEOUT_S).close()
        import ray

        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkerFailed(
            f"cannot join a Ray cluster at {address!r}: {error}. Start one (`ray start --head`) and name HOST:PORT, or "
            "leave the address out for a Ray of the job's own. A cluster that asks for a token (it does where "
            "~/.ray/auth_token lies) wants RAY_AUTH_MODE=token here too"
        ) from error


def places(
    groups: Sequence[str], workers: WorkersConfig, *, address: str | None
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Reserve room for every worker of every group; return for each group the options of its actors.

    Raises:
        WorkerFailed: the cluster has no room for all of them.
    """
    from ray.util import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpus = {"GPU": 1.0} if workers.device == "cuda" else {}
    room = placement_group([{"CPU": workers.threads, **gpus}] * (len(groups) * workers.per_group), strategy="PACK")
    if not room.wait(_ROOM_TIMEOUT_S):
        each = f"{workers.threads} CPUs{' and a GPU' if gpus else ''}"
        raise WorkerFailed(
            f"no room for the workers of {', '.join(groups)} ({workers.per_group} each, {each} a worker) within "
            f"{_ROOM_TIMEOUT_S:g} s: lower trainer.workers.per_group or .threads, or give the cluster more nodes"
        )
    options: dict[str, Any] = {
        "num_cpus": workers.threads,
        "num_gpus": len(gpus),
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    if address is not None:  # the workers of a cluster do not inherit our environment
        options["runtime_env"] = {"env_vars": _OF_WORKERS}

    def place(bundle: int) -> dict[str, Any]:
        where = PlacementGroupSchedulingStrategy(placement_group=room, placement_group_bundle_index=bundle)
        return {**options, "scheduling_strategy": where}

    size = workers.per_group
    return [(name, [place(first * size + rank) for rank in range(size)]) for first, name in enumerate(groups)]
