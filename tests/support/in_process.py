"""The worker groups of a job in this process: no Ray. Used by the tests of the controller."""

from collections.abc import Sequence

from tracegrad.tracestore.config import Config
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.model_group import ModelGroup
from tracegrad.trainer.results import Scored
from tracegrad.trainer.worker_groups import WorkerGroups


class InProcess(WorkerGroups):
    """Tests subclass it to fail, or to see, at a step or a save."""

    def __init__(self, config: Config) -> None:
        models = config.worker_groups()
        groups = {name: ModelGroup(config, name) for name in models}
        super().__init__(groups, config)
        self.learners: dict[str, Learner] = {
            model: learner for group in groups.values() for model, learner in group.learners.items()
        }

    def score(self, sequences: Sequence[Scored], temperature: float = 1.0) -> tuple[Scored, ...]:
        """Return the logprobs of the first model."""
        return next(iter(self.learners.values())).score(sequences, temperature)
