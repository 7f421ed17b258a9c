"""The numbers of one step, for all choices and for each role, from flat arrays. Pure numpy.

A number that does not exist (no tokens by the current version, no critic, no reference) is None or absent, never 0
(law 6). Called by `ppo`, the learner and `joint_metrics`; keys are those of `metrics.jsonl`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracegrad.trainer.credit import Credit, spread
from tracegrad.trainer.packing import PackingStats
from tracegrad.trainer.samples import ChoiceSample, Samples

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepArrays:
    """Everything known of the trained tokens after a step, (N,) but for `starts` and `credit`.

    `policy_N`, `values_N`, `ratio_N`, `clipped_N`, `dual_clipped_N` are of the last epoch's training pass (before its
    own update); `old_values_N` and `entropy_N` of the proximal pass. `weight_N`: importance weights, 0 where rejected;
    `rejected_N`: 0, or the number (from 1) of a word in `reasons`. The critic's arrays are None under group advantages,
    the reference's without a KL penalty. `version_ages`: policy version -> steps; empty: not known.
    """

    starts: NDArray[np.int64]
    credit: Credit
    behaviour_N: Floats
    proximal_N: Floats
    policy_N: Floats
    reference_N: Floats | None
    entropy_N: Floats
    ratio_N: Floats
    clipped_N: Floats
    dual_clipped_N: Floats
    weight_N: Floats
    rejected_N: Floats
    values_N: Floats | None
    old_values_N: Floats | None
    reasons: tuple[str, ...] = ()
    version_ages: Mapping[int, int] = field(default_factory=dict)


def step_metrics(choices: Sequence[ChoiceSample], arrays: StepArrays, version_id: int | None) -> dict[str, Any]:
    """Return the metrics of all choices, and under "roles" those of each role."""
    everything = np.ones(len(choices), dtype=bool)
    roles = sorted({choice.role for choice in choices if choice.role is not None})
    metrics = {**_of(choices, everything, arrays, version_id), **arrays.credit.counts, "roles": {}}
    for role in roles:
        chosen_B = np.array([choice.role == role for choice in choices])
        numbers = _of(choices, chosen_B, arrays, version_id)
        metrics["roles"][role] = {**numbers, **arrays.credit.roles.get(role, {})}
    return metrics


def with_account(metrics: Mapping[str, Any], samples: Samples) -> dict[str, Any]:
    """Return a model's metrics with what was excluded of its tokens, and of those of each role in the account.

    A role of which nothing was trained has its counts alone. So has a model, whose `metrics` are then empty.
    """
    roles = {**metrics.get("roles", {})}
    for role, excluded in samples.excluded_by_role.items():
        roles[role] = {"choices": 0, "tokens_trained": 0, **roles.get(role, {}), "tokens_excluded": excluded}
    account = {"roles": roles, "tokens_excluded": samples.excluded_tokens}
    return {"choices": 0, "tokens_trained": 0, **metrics, **account}


def token_counts(batch: PackingStats, parts: Sequence[PackingStats]) -> dict[str, float]:
    """Return what packing saves: how many tokens a pass of updates computes, and how many it would have to.

    `batch`: of all choices together; `parts`: of each minibatch of one epoch (the last) as it is computed. `efficiency`
    is `tokens_unique` (each distinct context of the batch once) over `tokens_computed`: 1 where no token is computed
    twice, less where the end of a row, a minibatch or a rank's share cuts a shared prefix. `tokens_naive`: a row for
    each choice.
    """
    computed = sum(part.n_nodes for part in parts)
    return {
        "tokens_computed": computed,
        "tokens_unique": batch.n_unique,
        "tokens_naive": batch.n_naive,
        "efficiency": batch.n_unique / computed,
    }


def explained_variance(values_N: Floats, targets_N: Floats) -> float | None:
    """Return 1 - Var(target - value) / Var(target); None where the targets do not vary."""
    variance = float(np.var(targets_N))
    return None if variance == 0.0 else 1.0 - float(np.var(targets_N - values_N)) / variance


def _of(choices: Sequence[ChoiceSample], chosen_B: Bools, arrays: StepArrays, version_id: int | None) -> dict[str, Any]:
    mask_N = spread(chosen_B.astype(np.float64), arrays.starts).astype(bool)
    current_N = mask_N & np.array([version == version_id for choice in choices for version in choice.token_versions])
    ratio_N, weight_N = arrays.ratio_N[mask_N], arrays.weight_N[mask_N]
    advantages_N = arrays.credit.advantages_N[mask_N]
    difference_N = np.abs(arrays.proximal_N - arrays.behaviour_N)[current_N]
    divergences = _divergences(arrays, mask_N)
    return {
        "reward": _mean_over_runs(choices, chosen_B, arrays.credit.rewards_B),
        "return": _mean_over_runs(choices, chosen_B, arrays.credit.returns_B),
        "choices": int(chosen_B.sum()),
        "tokens_trained": int(mask_N.sum()),
        "advantage": float(advantages_N.mean()),
        "advantage_std": float(advantages_N.std()),
        "ratio_mean": float(ratio_N.mean()),
        "ratio_max": float(ratio_N.max()),
        "clip_fraction": float(arrays.clipped_N[mask_N].mean()),
        "dual_clip_fraction": float(arrays.dual_clipped_N[mask_N].mean()),
        "kl": divergences["behaviour"]["k3"],
        "kl_to": divergences,
        "entropy": float(arrays.entropy_N[mask_N].mean()),
        "weight_mean": float(weight_N.mean()),
        "weight_max": float(weight_N.max()),
        "tokens_masked": _rejections(arrays.rejected_N[mask_N], arrays.reasons),
        "logprob_abs_diff": float(difference_N.mean()) if len(difference_N) else None,
        "stale_tokens": int(mask_N.sum() - current_N.sum()),
        **_staleness(choices, chosen_B, arrays.version_ages),
        **_critic(arrays, mask_N),
    }


def _divergences(arrays: StepArrays, mask_N: Bools) -> dict[str, dict[str, float]]:
    """Return the mean k1 and k3, nats a token, of the KL between the policy and three others.

    The tokens are samples of the behaviour policy, and nearly so of the proximal one: KL(that || policy). To the
    reference it is KL(policy || reference), the one that a KL penalty holds down.
    """
    policy_N = arrays.policy_N
    pairs = {"behaviour": (arrays.behaviour_N, policy_N), "proximal": (arrays.proximal_N, policy_N)}
    if arrays.reference_N is not None:
        pairs["reference"] = (policy_N, arrays.reference_N)
    found = {}
    for name, (sampled_N, other_N) in pairs.items():
        difference_N = (other_N - sampled_N)[mask_N]
        k3_N = np.expm1(difference_N) - difference_N
        found[name] = {"k1": float(-difference_N.mean()), "k3": float(k3_N.mean())}
    return found


def _rejections(rejected_N: Floats, reasons: Sequence[str]) -> dict[str, int]:
    """Return reason -> tokens, for every reason that the configuration knows."""
    counts = np.bincount(rejected_N.astype(np.int64), minlength=len(reasons) + 1)
    totals: dict[str, int] = {}
    for reason, count in zip(reasons, counts[1:], strict=True):
        totals[reason] = totals.get(reason, 0) + int(count)
    return totals


def _staleness(choices: Sequence[ChoiceSample], chosen_B: Bools, ages: Mapping[int, int]) -> dict[str, float]:
    """Return the age of the tokens, in steps: in the mean, and of the oldest."""
    if not ages:
        return {}
    chosen = (choice for choice, is_chosen in zip(choices, chosen_B, strict=True) if is_chosen)
    ages_N = [ages[version] for choice in chosen for version in choice.token_versions]
    return {"staleness_mean": float(np.mean(ages_N)), "staleness_max": max(ages_N)}


def _critic(arrays: StepArrays, mask_N: Bools) -> dict[str, Any]:
    if arrays.values_N is None or arrays.old_values_N is None or arrays.credit.targets_N is None:
        return {}
    targets_N, old_values_N = arrays.credit.targets_N[mask_N], arrays.old_values_N[mask_N]
    return {
        "value_loss": float(0.5 * np.square(arrays.values_N[mask_N] - targets_N).mean()),
        "value_error": float(np.abs(old_values_N - targets_N).mean()),
        "explained_variance": explained_variance(old_values_N, targets_N),
    }


def _mean_over_runs(choices: Sequence[ChoiceSample], chosen_B: Bools, values_B: Floats) -> float | None:
    """Each run counts once, whatever its number of calls. NaN is no value; None: no run has any."""
    of_run: dict[str, list[float]] = {}
    for choice, chosen, value in zip(choices, chosen_B, values_B, strict=True):
        if chosen and not np.isnan(value):
            of_run.setdefault(choice.run_id, []).append(float(value))
    return float(np.mean([np.mean(values) for values in of_run.values()])) if of_run else None
