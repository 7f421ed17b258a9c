"""PPO steps of this process that tell what they evaluated, and what credit their updates were made with."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from tracegrad.trainer.credit import Credit
from tracegrad.trainer.evaluation import Before
from tracegrad.trainer.ppo import PpoStep
from tracegrad.trainer.samples import Samples


@dataclass(frozen=True)
class Step:
    """One model's, in the order in which they came to their updates."""

    samples: Samples
    before: Before
    credit: Credit


@dataclass(frozen=True)
class Seen:
    """`evaluations`: "policy" or "reference" for each pass over the choices of a step."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[str] = field(default_factory=list)


def watched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watch the steps of all learners that take their weights from now on."""
    seen = Seen()

    class Watched(PpoStep):
        def _fixed(self, samples: Samples, before: Before, credit: Credit) -> Any:
            seen.steps.append(Step(samples, before, credit))
            return super()._fixed(samples, before, credit)

        def evaluate(self, choices: Any, *, full: bool = False) -> Any:
            seen.evaluations.append("policy")
            return super().evaluate(choices, full=full)

        def reference_logprobs(self, choices: Any) -> Any:
            seen.evaluations.append("reference")
            return super().reference_logprobs(choices)

    monkeypatch.setattr("tracegrad.trainer.learner.PpoStep", Watched)
    return seen
