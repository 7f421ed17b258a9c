"""Losses: PPO on edges, as sums with counts. Named tensors in, named tensors out; no model, no I/O.

Every sum is over the edges given; the caller divides by the global count of trained tokens of the minibatch, so that
rows of unequal size weigh each token alike and any split into rows gives the same gradient. It refuses tensors of
unequal length. Called by the learner.

Sources: PPO clip, Schulman et al. 2017 (arXiv 1707.06347); dual clip, Ye et al. 2020 (arXiv 1912.09729, eq. 5);
decoupled proximal policy, Hilton et al. 2021 (arXiv 2110.00641); k3, Schulman 2020 ("Approximating KL divergence").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tracegrad.tracestore.algorithm import LossConfig
from tracegrad.trainer.errors import BatchError


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """One entry per edge (E,). Only `policy_logprobs_E`, `values_E` and `entropy_E` carry gradients.

    `behaviour_logprobs_E` are the recorded ones: the ratio's denominator. With `proximal_logprobs_E` (the policy at
    the start of the step) the ratio is against those, and each token is weighed by proximal / behaviour instead.
    `values_E`, `old_values_E`, `targets_E`: all or none.
    """

    policy_logprobs_E: Tensor
    behaviour_logprobs_E: Tensor
    advantages_E: Tensor
    proximal_logprobs_E: Tensor | None = None
    reference_logprobs_E: Tensor | None = None
    values_E: Tensor | None = None
    old_values_E: Tensor | None = None
    targets_E: Tensor | None = None
    entropy_E: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """Coefficients and bounds. None switches a bound off; a coefficient of 0 switches a term off."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    value_clip: float | None = 0.2
    value_coef: float = 0.5
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    importance_cap: float = 2.0
    """Bound on proximal / behaviour; counts only where proximal logprobs are given."""

    @staticmethod
    def from_config(config: LossConfig) -> "LossSettings":
        """Take what the configuration file says."""
        return LossSettings(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            value_clip=config.value_clip,
            value_coef=config.value_coef,
            kl_coef=config.kl_coef,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """`loss_sum` carries the gradient; the rest is detached. Ratios are policy / (proximal or behaviour).

    `approx_kl_sum`: k3 of KL(behaviour || policy), nats summed over edges. `n_clipped`: edges whose gradient the clip
    (either side) removed; `n_dual_clipped`: those removed by the dual clip. `importance_sum`: weights summed.
    """

    loss_sum: Tensor
    n_tokens: int
    ratio_sum: Tensor
    ratio_max: Tensor
    ratio_min: Tensor
    abs_logratio_sum: Tensor
    approx_kl_sum: Tensor
    n_clipped: Tensor
    n_dual_clipped: Tensor
    importance_sum: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueLoss:
    """`loss_sum` carries the gradient; `n_clipped` counts edges where the clipped error was the larger one."""

    loss_sum: Tensor
    n_clipped: Tensor
    squared_error_sum: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutputs:
    """The whole objective of some edges. Minimise ``total_sum / global count``. Absent terms are None, not 0."""

    total_sum: Tensor
    policy: PolicyLoss
    value: ValueLoss | None
    reference_kl_sum: Tensor | None
    entropy_sum: Tensor | None


def ppo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """Return policy + value_coef * value + kl_coef * k3(policy || reference) - entropy_coef * entropy, summed.

    Raises:
        BatchError: lengths disagree, a term has a coefficient but not its tensors.
    """
    _check(inputs, settings)
    policy = policy_loss(
        inputs.policy_logprobs_E,
        inputs.behaviour_logprobs_E,
        inputs.advantages_E,
        proximal_logprobs_E=inputs.proximal_logprobs_E,
        settings=settings,
    )
    total, value, reference_kl, entropy = policy.loss_sum, None, None, None
    if inputs.values_E is not None and inputs.old_values_E is not None and inputs.targets_E is not None:
        value = value_loss(inputs.values_E, inputs.old_values_E, inputs.targets_E, value_clip=settings.value_clip)
        total = total + settings.value_coef * value.loss_sum
    if inputs.reference_logprobs_E is not None:
        reference_kl = k3(inputs.policy_logprobs_E, inputs.reference_logprobs_E).sum()
        total = total + settings.kl_coef * reference_kl
    if inputs.entropy_E is not None:
        entropy = inputs.entropy_E.sum()
        total = total - settings.entropy_coef * entropy
    return LossOutputs(
        total_sum=total,
        policy=policy,
        value=value,
        reference_kl_sum=None if reference_kl is None else reference_kl.detach(),
        entropy_sum=None if entropy is None else entropy.detach(),
    )


def policy_loss(
    policy_logprobs_E: Tensor,
    behaviour_logprobs_E: Tensor,
    advantages_E: Tensor,
    *,
    settings: LossSettings,
    proximal_logprobs_E: Tensor | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate, ``-sum w * min(r A, clip(r) A)``, with the dual clip ``max(., c A)`` for A < 0.

    r = exp(policy - anchor), clip(r) to [1 - clip_low, 1 + clip_high]. The anchor is the behaviour policy, w = 1; or
    the proximal policy, w = min(exp(proximal - behaviour), importance_cap).
    """
    anchor_E = behaviour_logprobs_E if proximal_logprobs_E is None else proximal_logprobs_E
    logratio_E = policy_logprobs_E - anchor_E
    ratio_E = logratio_E.exp()
    clipped_E = ratio_E.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    free_E, bound_E = ratio_E * advantages_E, clipped_E * advantages_E
    surrogate_E = torch.minimum(free_E, bound_E)
    dual_E = torch.zeros_like(ratio_E, dtype=torch.bool)
    if settings.dual_clip is not None:
        floor_E = settings.dual_clip * advantages_E
        dual_E = (advantages_E < 0) & (surrogate_E < floor_E)
        surrogate_E = torch.where(dual_E, floor_E, surrogate_E)
    weight_E = torch.ones_like(ratio_E)
    if proximal_logprobs_E is not None:
        weight_E = (proximal_logprobs_E - behaviour_logprobs_E).exp().clamp(max=settings.importance_cap).detach()
    loss_sum = -(weight_E * surrogate_E).sum()
    with torch.no_grad():
        return PolicyLoss(
            loss_sum=loss_sum,
            n_tokens=ratio_E.numel(),
            ratio_sum=ratio_E.sum(),
            ratio_max=ratio_E.amax() if ratio_E.numel() else ratio_E.new_ones(()),
            ratio_min=ratio_E.amin() if ratio_E.numel() else ratio_E.new_ones(()),
            abs_logratio_sum=(policy_logprobs_E - behaviour_logprobs_E).abs().sum(),
            approx_kl_sum=k3(behaviour_logprobs_E, policy_logprobs_E).sum(),
            n_clipped=((bound_E < free_E) & ~dual_E).sum(),
            n_dual_clipped=dual_E.sum(),
            importance_sum=weight_E.sum(),
        )


def value_loss(values_E: Tensor, old_values_E: Tensor, targets_E: Tensor, *, value_clip: float | None) -> ValueLoss:
    """Return ``0.5 * sum max((V - R)^2, (old + clip(V - old) - R)^2)``; without a clip ``0.5 * sum (V - R)^2``."""
    error_E = (values_E - targets_E).square()
    worst_E, clipped_E = error_E, torch.zeros_like(error_E, dtype=torch.bool)
    if value_clip is not None:
        near_E = old_values_E + (values_E - old_values_E).clamp(-value_clip, value_clip)
        near_error_E = (near_E - targets_E).square()
        worst_E, clipped_E = torch.maximum(error_E, near_error_E), near_error_E > error_E
    return ValueLoss(
        loss_sum=0.5 * worst_E.sum(),
        n_clipped=clipped_E.detach().sum(),
        squared_error_sum=error_E.detach().sum(),
    )


def k3(sampled_logprobs_E: Tensor, other_logprobs_E: Tensor) -> Tensor:
    """Return Schulman's k3 of KL(sampled || other) per edge (>= 0): e^d - 1 - d, d = other - sampled."""
    difference_E = other_logprobs_E - sampled_logprobs_E
    return difference_E.exp() - 1.0 - difference_E


def _check(inputs: LossInputs, settings: LossSettings) -> None:
    size = inputs.policy_logprobs_E.shape
    for name in LossInputs.__slots__:
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != size:
            raise BatchError(f"{name} has shape {tuple(tensor.shape)}; the row has {tuple(size)} edges")
    value = (inputs.values_E, inputs.old_values_E, inputs.targets_E)
    if any(tensor is None for tensor in value) and any(tensor is not None for tensor in value):
        raise BatchError("values_E, old_values_E and targets_E go together: give all or none")
    if settings.kl_coef != 0.0 and inputs.reference_logprobs_E is None:
        raise BatchError("kl_coef is set but there are no reference_logprobs_E")
    if settings.entropy_coef != 0.0 and inputs.entropy_E is None:
        raise BatchError("entropy_coef is set but there is no entropy_E")
