"""What a learner remembers of its steps to refuse the next one: usual gradient norms, and steps without reward.

Kept in the checkpoint's manifest, so that a resumed trainer refuses what an undisturbed one would have refused. No I/O,
no torch. Called by the learner, by `ppo` and by `worker_groups`.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tracegrad.tracestore.algorithm import RefusalConfig
from tracegrad.tracestore.reasons import sentences
from tracegrad.tracestore.records import BatchPlan, Reward
from tracegrad.trainer.errors import NothingToTrain, StepRefused

_ENOUGH_NORMS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class StepHistory:
    """`grad_norms`: of the last steps before clipping, without zeros, oldest first; `silent_steps`: without reward."""

    grad_norms: tuple[float, ...] = ()
    silent_steps: int = 0

    def after(self, grad_norm: float, silent: bool, config: RefusalConfig) -> "StepHistory":
        """Return the history with one more step."""
        norms = (*self.grad_norms, grad_norm) if grad_norm > 0.0 else self.grad_norms
        return StepHistory(
            grad_norms=norms[-config.grad_norm_history :], silent_steps=self.silent_steps + 1 if silent else 0
        )

    def check_norm(self, step: int, norm: float, *, max_grad_norm: float, config: RefusalConfig) -> None:
        """Refuse a gradient that explodes: far above what is usual, and so far above what clipping leaves of it.

        Where most groups are solved, usual norms are near 0 and one surprising token is a hundred times as much.

        Raises:
            StepRefused: it is above `grad_norm_factor` times the median of at least five remembered norms, and times
                `max_grad_norm`.
        """
        if config.grad_norm_factor is None or len(self.grad_norms) < _ENOUGH_NORMS or norm <= max_grad_norm:
            return
        usual = statistics.median(self.grad_norms)
        if norm > config.grad_norm_factor * max(usual, max_grad_norm):
            raise StepRefused(
                f"step {step}: the gradient norm is {norm:.3g}, in the last {len(self.grad_norms)} steps {usual:.3g} "
                "in the median: the loss explodes. The weights are unchanged. Look at the rewards and at "
                "`logprob_abs_diff` in metrics.jsonl, lower the learning rate, or raise "
                f"trainer.algorithm.refuse.grad_norm_factor ({config.grad_norm_factor:g})"
            )

    def check_reward(self, step: int, silent: bool, config: RefusalConfig) -> None:
        """Refuse to go on where nothing has earned anything for long.

        Raises:
            StepRefused: with this one, `silent_steps` steps in a row were silent.
        """
        if config.silent_steps is None or not silent or self.silent_steps + 1 < config.silent_steps:
            return
        raise StepRefused(
            f"step {step}: no run has earned anything for {self.silent_steps + 1} steps: within each, all rewards of a "
            "name were equal and none was above 0. Training stops here; the weights are unchanged. Look at the reward "
            "function and at some runs (`tracegrad runs`, `tracegrad show RUN`), or set "
            "trainer.algorithm.refuse.silent_steps to null"
        )

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {"grad_norms": list(self.grad_norms), "silent_steps": self.silent_steps}

    @staticmethod
    def from_json(stored: Mapping[str, Any] | None) -> "StepHistory":
        """Read a manifest's entry; None, of a checkpoint without one, is an empty history."""
        if stored is None:
            return StepHistory()
        return StepHistory(grad_norms=tuple(stored["grad_norms"]), silent_steps=int(stored["silent_steps"]))


def is_silent(rewards: Iterable[Iterable[Reward]]) -> bool:
    """Whether nothing was earned: of every name all values are equal and not above 0. `rewards`: of each run.

    All runs solved is not silence, nor is a batch in which one run lost more than another: both can be learned from.
    """
    values: dict[str, set[float]] = {}
    for given in rewards:
        for reward in given:
            values.setdefault(reward.name, set()).add(reward.value)
    return all(len(each) == 1 and max(each) <= 0.0 for each in values.values())


def nothing_to_train(plan: BatchPlan, excluded_tokens: Mapping[str, int]) -> NothingToTrain:
    """Return the refusal of a batch of which no choice may be trained: why, and of how many tokens."""
    return NothingToTrain(
        f"step {plan.step}: nothing to train in {len(plan.run_ids)} runs. " + ". ".join(sentences(excluded_tokens))
    )
