"""Worker groups as Ray actors: one process for each model that holds weights, all reserved together.

The groups' resources are one placement group, so a job gets all its processes or none: it refuses to start on a
cluster without room for them. Each actor has its own threads and its own torch. A call gives up waiting when another
group has failed. Refuses a worker that dies (WorkerFailed). To be called by the command of a job of several models.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import Any

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.errors import WorkerFailed
from tracegrad.trainer.ray_actor import RayActor, ray_running
from tracegrad.trainer.results import Saved, Scored, StepResult, Written
from tracegrad.trainer.samples import Samples
from tracegrad.trainer.worker_groups import WorkerGroups

_ROOM_TIMEOUT_S = 60.0


class GroupActor:
    """Runs inside the Ray worker; torch is imported here and not before."""

    def __init__(self, config: Config, name: str) -> None:
        from tracegrad.trainer.model_group import ModelGroup

        self._group = ModelGroup(config, name)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the group."""
        return os.getpid() if method == "process" else getattr(self._group, method)(*args, **kwargs)


class RayGroup:
    """One group in its process. Fulfils `workers.TrainsModels`; the methods are `ModelGroup`'s."""

    def __init__(self, actor: RayActor, stop: Event) -> None:
        self._actor, self._stop = actor, stop

    def start(self) -> None:
        """As `ModelGroup.start`."""
        self._actor.call("start", stop=self._stop)

    def restore(self, folder: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """As `ModelGroup.restore`."""
        self._actor.call("restore", folder, facts, stop=self._stop)

    def write(self, folder: str) -> dict[str, Written]:
        """As `ModelGroup.write`."""
        written: dict[str, Written] = self._actor.call("write", folder, stop=self._stop)
        return written

    def step(
        self,
        plan: BatchPlan,
        samples: Mapping[str, Samples],
        *,
        version_ids: Mapping[str, int | None],
        probe_tokens: int = 0,
    ) -> dict[str, StepResult]:
        """As `ModelGroup.step`."""
        results: dict[str, StepResult] = self._actor.call(
            "step", plan, samples, version_ids=version_ids, probe_tokens=probe_tokens, stop=self._stop
        )
        return results

    def process(self) -> int:
        """Return the id of the process that the group runs in."""
        return int(self._actor.call("process"))

    def probe_sequences(self, model: str, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """As `ModelGroup.probe_sequences`."""
        return tuple(self._actor.call("probe_sequences", model, n_tokens, seed))

    def score(self, model: str, sequences: tuple[Scored, ...], temperature: float = 1.0) -> tuple[Scored, ...]:
        """As `ModelGroup.score`."""
        return tuple(self._actor.call("score", model, sequences, temperature))

    def perturbed(self, model: str, root: str, gap: float, sequences: tuple[Scored, ...], seed: int) -> Saved:
        """As `ModelGroup.perturbed`."""
        saved: Saved = self._actor.call("perturbed", model, root, gap, sequences, seed)
        return saved


@contextmanager
def ray_groups(config: Config, *, address: str | None = None) -> Iterator[tuple[WorkerGroups, dict[str, RayGroup]]]:
    """Start every worker group of the job in a process of its own: the workers over them, and each by name.

    The body's end ends them all.

    Raises:
        WorkerFailed: the cluster has no room for all of them.
    """
    models, threads, stop = config.worker_groups(), config.trainer.workers.threads, Event()
    with ExitStack() as cleanup:
        cleanup.enter_context(ray_running(address, threads * len(models)))
        groups = {}
        for name, bundle in zip(models, _reserved(list(models), threads), strict=True):
            what = f"group {name!r}"
            actor = RayActor(GroupActor, config, name, what=what, n_cpus=threads, address=address, bundle=bundle)
            cleanup.callback(actor.kill)
            groups[name] = RayGroup(actor, stop)
        yield WorkerGroups(groups, models, stop), groups


def _reserved(names: list[str], threads: int) -> list[Any]:
    """Reserve room for every group at once; return where each goes."""
    from ray.util import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    room = placement_group([{"CPU": threads} for _ in names], strategy="PACK")
    if not room.wait(_ROOM_TIMEOUT_S):
        raise WorkerFailed(
            f"no room for the worker groups of {', '.join(names)} ({threads} CPUs each) within {_ROOM_TIMEOUT_S:g} s: "
            "lower trainer.workers.threads, or give the cluster more nodes"
        )
    return [
        PlacementGroupSchedulingStrategy(placement_group=room, placement_group_bundle_index=index)
        for index in range(len(names))
    ]
