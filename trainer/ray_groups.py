"""Worker groups as Ray actors: the workers of each model that holds weights, in processes of their own.

Each worker has its own threads and its own torch. A call gives up waiting when another group has failed. Refuses a
worker that dies (WorkerDied). Called by the command.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.comparison import Statistics
from tracegrad.trainer.exchange import CriticValues, Told
from tracegrad.trainer.ray_cluster import places, ray_running
from tracegrad.trainer.ray_team import RayTeam
from tracegrad.trainer.results import Saved, Scored, StepResult, Written
from tracegrad.trainer.samples import Samples
from tracegrad.trainer.worker_groups import WorkerGroups

if TYPE_CHECKING:
    from tracegrad.trainer.model_group import ModelGroup
    from tracegrad.trainer.ranks import Ranks


class RayGroup:
    """One group in its processes. Fulfils `worker_groups.TrainsModels`; the methods are `ModelGroup`'s."""

    def __init__(self, team: RayTeam, stop: Event) -> None:
        self._team, self._stop = team, stop

    def start(self) -> None:
        """As `ModelGroup.start`."""
        self._team.call("start", stop=self._stop)

    def restore(self, folder: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """As `ModelGroup.restore`."""
        self._team.call("restore", folder, facts, stop=self._stop)

    def write(self, folder: str) -> dict[str, Written]:
        """As `ModelGroup.write`."""
        written: dict[str, Written] = self._team.call("write", folder, stop=self._stop)
        return written

    def values(
        self, plan: BatchPlan, samples: Mapping[str, Samples], *, probe_tokens: int = 0
    ) -> dict[str, CriticValues]:
        """As `ModelGroup.values`."""
        found: dict[str, CriticValues] = self._team.call(
            "values", plan, samples, probe_tokens=probe_tokens, stop=self._stop
        )
        return found

    def appraise(
        self, plan: BatchPlan, samples: Mapping[str, Samples], *, probe_tokens: int = 0, told: Told | None = None
    ) -> dict[str, Statistics]:
        """As `ModelGroup.appraise`."""
        found: dict[str, Statistics] = self._team.call(
            "appraise", plan, samples, probe_tokens=probe_tokens, told=told, stop=self._stop
        )
        return found

    def step(
        self,
        plan: BatchPlan,
        samples: Mapping[str, Samples],
        *,
        version_ids: Mapping[str, int | None],
        probe_tokens: int = 0,
        told: Told | None = None,
    ) -> dict[str, StepResult]:
        """As `ModelGroup.step`."""
        results: dict[str, StepResult] = self._team.call(
            "step", plan, samples, version_ids=version_ids, probe_tokens=probe_tokens, told=told, stop=self._stop
        )
        return results

    def processes(self) -> list[int]:
        """Return the id of each worker's process."""
        return self._team.processes()

    def probe_sequences(self, model: str, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """As `ModelGroup.probe_sequences`."""
        return tuple(self._team.call("probe_sequences", model, n_tokens, seed))

    def score(self, model: str, sequences: tuple[Scored, ...], temperature: float = 1.0) -> tuple[Scored, ...]:
        """As `ModelGroup.score`."""
        return tuple(self._team.call("score", model, sequences, temperature))

    def perturbed(self, model: str, root: str, gap: float, sequences: tuple[Scored, ...], seed: int) -> Saved:
        """As `ModelGroup.perturbed`."""
        saved: Saved = self._team.call("perturbed", model, root, gap, sequences, seed)
        return saved


@contextmanager
def ray_groups(config: Config, *, address: str | None = None) -> Iterator[tuple[WorkerGroups, dict[str, RayGroup]]]:
    """Start the workers of every group of the job: what trains with all of them, and each group by name.

    The body's end ends them all.

    Raises:
        WorkerFailed: the cluster has no room for all of them.
    """
    models, workers, stop = config.worker_groups(), config.trainer.workers, Event()
    with ExitStack() as cleanup:
        cleanup.enter_context(ray_running(address, workers.threads * workers.per_group * len(models)))
        groups = {}
        for name, of_group in places(list(models), workers, address=address):
            team = RayTeam(partial(_made, name), config, what=f"group {name!r}", places=of_group)
            cleanup.callback(team.end)
            team.start()
            groups[name] = RayGroup(team, stop)
        yield WorkerGroups(groups, config, stop), groups


def _made(name: str, config: Config, ranks: "Ranks") -> "ModelGroup":
    from tracegrad.trainer.model_group import ModelGroup

    return ModelGroup(config, name, ranks)
