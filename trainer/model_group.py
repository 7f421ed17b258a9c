"""A worker group's models in one process: a full model, or the adapters of one base over one trunk.

Each model has its own learner: policy, critic, optimizer, refusal history. A step trains those of them that have
samples, one after another; a group that raises has no weights anybody may use until it is loaded again, to which
`worker_groups` sees. Called in a Ray actor by `tracegrad.trainer.ray_groups`, or directly by tests.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.comparison import Statistics
from tracegrad.trainer.exchange import CriticValues, Told
from tracegrad.trainer.learner import Learner, load_trunk
from tracegrad.trainer.ranks import ALONE, Ranks
from tracegrad.trainer.results import Saved, Scored, StepResult, Written
from tracegrad.trainer.samples import Samples


class ModelGroup:
    """The group of `name`, a key of `config.worker_groups()`; or what one of its ranks holds of it.

    All ranks of a group must be asked the same in the same order. Only the first writes files.
    """

    def __init__(self, config: Config, name: str, ranks: Ranks = ALONE) -> None:
        models = config.worker_groups()[name]
        trunk = cache(lambda: load_trunk(config, models, ranks))
        self.learners = {model: Learner(config, model, trunk, ranks=ranks) for model in models}

    def start(self) -> None:
        """Take every model as its job begins with it."""
        for learner in self.learners.values():
            learner.start()

    def restore(self, folder: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Take every model's weights and state out of its subfolder. `facts`: of each model, from the manifest.

        A folder without subfolders for models is of a job of one model, as such were written first.
        """
        for model, learner in self.learners.items():
            own = Path(folder) / model
            learner.restore(own if own.is_dir() else Path(folder), facts[model])

    def write(self, folder: str) -> dict[str, Written]:
        """Write every model into its subfolder, and score its last probe again."""
        return {model: self._write(learner, Path(folder) / model) for model, learner in self.learners.items()}

    def values(
        self, plan: BatchPlan, samples: Mapping[str, Samples], *, probe_tokens: int = 0
    ) -> dict[str, CriticValues]:
        """As `Learner.values`, of each model that has something to train."""
        return {
            model: learner.values(plan, samples[model], probe_tokens=probe_tokens)
            for model, learner in self.learners.items()
            if samples[model].choices
        }

    def appraise(
        self, plan: BatchPlan, samples: Mapping[str, Samples], *, probe_tokens: int = 0, told: Told | None = None
    ) -> dict[str, Statistics]:
        """As `Learner.appraise`, of each model that has something to train."""
        return {
            model: learner.appraise(plan, samples[model], probe_tokens=probe_tokens, told=told)
            for model, learner in self.learners.items()
            if samples[model].choices
        }

    def step(
        self,
        plan: BatchPlan,
        samples: Mapping[str, Samples],
        *,
        version_ids: Mapping[str, int | None],
        probe_tokens: int = 0,
        told: Told | None = None,
    ) -> dict[str, StepResult]:
        """Train one step of each model that has something to train; the others stay as they are, and are left out.

        `told`: as for `Learner.step`.

        Raises:
            StepRefused: by one model; those before it in the group have been trained.
        """
        return {
            model: learner.step(
                plan, samples[model], version_id=version_ids[model], probe_tokens=probe_tokens, told=told
            )
            for model, learner in self.learners.items()
            if samples[model].choices
        }

    def probe_sequences(self, model: str, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """As `Learner.probe_sequences`, of one model."""
        return self.learners[model].probe_sequences(n_tokens, seed)

    def score(self, model: str, sequences: tuple[Scored, ...], temperature: float = 1.0) -> tuple[Scored, ...]:
        """As `Learner.score`, of one model."""
        return self.learners[model].score(sequences, temperature)

    def perturbed(self, model: str, root: str, gap: float, sequences: tuple[Scored, ...], seed: int) -> Saved:
        """As `Learner.perturbed`, of one model."""
        return self.learners[model].perturbed(root, gap, sequences, seed)

    @staticmethod
    def _write(learner: Learner, folder: Path) -> Written:
        if learner.policy.ranks.leads:
            folder.mkdir()
        digests = learner.write(folder)
        previous, new = learner.probed()
        return Written(digests=digests, facts=learner.facts, previous=previous, new=new)
