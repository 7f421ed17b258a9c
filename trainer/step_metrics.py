"""The numbers of one step, for all choices and for each role, from flat arrays. Pure numpy.

A number that does not exist (no tokens by the current version, no critic) is None, never 0 (law 6). Called by the
learner; keys are those of `metrics.jsonl`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracegrad.tracestore.algorithm import LossConfig
from tracegrad.trainer.credit import spread
from tracegrad.trainer.samples import ChoiceSample

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepArrays:
    """Everything known of the trained tokens after a step.

    `policy_N`, `values_N` are of the last epoch's training pass (before its own update); `old_values_N` and
    `entropy_N` of the proximal pass. The critic's arrays are None under group advantages.
    """

    starts: NDArray[np.int64]
    returns_B: Floats
    behaviour_N: Floats
    proximal_N: Floats
    policy_N: Floats
    advantages_N: Floats
    entropy_N: Floats
    values_N: Floats | None
    old_values_N: Floats | None
    targets_N: Floats | None


def step_metrics(
    choices: Sequence[ChoiceSample], arrays: StepArrays, loss: LossConfig, version_id: int | None
) -> dict[str, Any]:
    """Return the metrics of all choices, and under "roles" those of each role."""
    everything = np.ones(len(choices), dtype=bool)
    roles = sorted({choice.role for choice in choices if choice.role is not None})
    metrics = _of(choices, everything, arrays, loss, version_id)
    metrics["roles"] = {
        role: _of(choices, np.array([choice.role == role for choice in choices]), arrays, loss, version_id)
        for role in roles
    }
    return metrics


def explained_variance(values_N: Floats, targets_N: Floats) -> float | None:
    """Return 1 - Var(target - value) / Var(target); None where the targets do not vary."""
    variance = float(np.var(targets_N))
    return None if variance == 0.0 else 1.0 - float(np.var(targets_N - values_N)) / variance


def _of(
    choices: Sequence[ChoiceSample],
    chosen_B: Bools,
    arrays: StepArrays,
    loss: LossConfig,
    version_id: int | None,
) -> dict[str, Any]:
    mask_N = spread(chosen_B.astype(np.float64), arrays.starts).astype(bool)
    current_B = np.array([choice.version_id == version_id for choice in choices])
    current_N = mask_N & spread(current_B.astype(np.float64), arrays.starts).astype(bool)
    ratio_N = np.exp(arrays.policy_N[mask_N] - arrays.proximal_N[mask_N])
    advantages_N = arrays.advantages_N[mask_N]
    clipped_N = np.clip(ratio_N, 1 - loss.clip_low, 1 + loss.clip_high)
    drift_N = arrays.policy_N[mask_N] - arrays.behaviour_N[mask_N]
    difference_N = np.abs(arrays.proximal_N - arrays.behaviour_N)[current_N]
    metrics = {
        "reward": _mean_over_runs(choices, chosen_B, arrays.returns_B),
        "choices": int(chosen_B.sum()),
        "tokens_trained": int(mask_N.sum()),
        "advantage": float(advantages_N.mean()),
        "advantage_std": float(advantages_N.std()),
        "ratio_mean": float(ratio_N.mean()),
        "ratio_max": float(ratio_N.max()),
        "clip_fraction": float((clipped_N * advantages_N < ratio_N * advantages_N).mean()),
        "kl": float((np.exp(drift_N) - 1.0 - drift_N).mean()),
        "entropy": float(arrays.entropy_N[mask_N].mean()),
        "logprob_abs_diff": float(difference_N.mean()) if len(difference_N) else None,
        "stale_tokens": int(mask_N.sum() - current_N.sum()),
    }
    if arrays.values_N is not None and arrays.old_values_N is not None and arrays.targets_N is not None:
        targets_N = arrays.targets_N[mask_N]
        metrics["value_loss"] = float(0.5 * np.square(arrays.values_N[mask_N] - targets_N).mean())
        metrics["explained_variance"] = explained_variance(arrays.old_values_N[mask_N], targets_N)
    return metrics


def _mean_over_runs(choices: Sequence[ChoiceSample], chosen_B: Bools, returns_B: Floats) -> float:
    """Each run counts once, whatever its number of calls."""
    of_run: dict[str, list[float]] = {}
    for choice, chosen, value in zip(choices, chosen_B, returns_B, strict=True):
        if chosen:
            of_run.setdefault(choice.run_id, []).append(float(value))
    return float(np.mean([np.mean(values) for values in of_run.values()]))
