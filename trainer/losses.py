"""The objective of a step on edges: surrogate, importance correction, value, KL penalty, entropy. No model, no I/O.

Every term is summed with the weight of its edge (`aggregation_weights`), which holds the denominator: of all trained
tokens of the minibatch, rejected ones included. So any split of a minibatch into rows gives the same gradient. It
refuses tensors of unequal length and terms without their tensors. Called by `ppo`.

Sources: the surrogates' and corrections' in `surrogates` and `corrections`; clipped value loss, the code of Schulman et
al. 2017 (baselines, ppo2); k1, k2, k3, Schulman 2020 ("Approximating KL divergence"); mean over sequences, GRPO (Shao
et al. 2024, arXiv 2402.03300, eq. 3); over tokens, DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 8); constant length,
Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, sec. 3.2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tracegrad.tracestore.algorithm import AlgorithmConfig, KlEstimator, LossConfig
from tracegrad.trainer.corrections import KEPT, Correction, correct
from tracegrad.trainer.errors import BatchError
from tracegrad.trainer.surrogates import Surrogate, surrogate


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """One entry per edge (E,), logprobs in nats. Only `policy_logprobs_E`, `values_E`, `entropy_E` carry gradients.

    `behaviour_logprobs_E`: recorded when sampled; `proximal_logprobs_E`: of the weights that the step starts with.
    `choice_E` (int64): the choice of each edge. `weight_E`: see `aggregation_weights`.
    `values_E`, `old_values_E`, `targets_E`: all or none.
    """

    policy_logprobs_E: Tensor
    proximal_logprobs_E: Tensor
    behaviour_logprobs_E: Tensor
    advantages_E: Tensor
    choice_E: Tensor
    weight_E: Tensor
    reference_logprobs_E: Tensor | None = None
    values_E: Tensor | None = None
    old_values_E: Tensor | None = None
    targets_E: Tensor | None = None
    entropy_E: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutputs:
    """`total` carries the gradient: minimise its sum over the rows of a minibatch. The rest is detached, (E,)."""

    total: Tensor
    surrogate: Surrogate
    correction: Correction


def objective(inputs: LossInputs, config: AlgorithmConfig) -> LossOutputs:
    """Return ``sum weight (policy + value_coef value + kept (kl_coef k(policy || reference) - entropy_coef H))``.

    Rejected edges (`correction`) have no policy term, KL or entropy: these are estimates on tokens that the policy
    would not have sampled. Their value term stays: the state was visited and its return is known.

    Raises:
        BatchError: lengths disagree, a term has a coefficient but not its tensors.
    """
    loss = config.loss
    _check(inputs, loss)
    correction = correct(inputs.proximal_logprobs_E, inputs.behaviour_logprobs_E, inputs.choice_E, config.correction)
    of_behaviour = config.correction.anchor == "behaviour"
    policy = surrogate(
        inputs.policy_logprobs_E,
        inputs.behaviour_logprobs_E if of_behaviour else inputs.proximal_logprobs_E,
        inputs.advantages_E,
        inputs.choice_E,
        loss,
    )
    kept_E = correction.rejected_E == KEPT
    term_E = torch.where(kept_E, correction.weight_E * policy.loss_E, 0.0)
    if inputs.reference_logprobs_E is not None and loss.kl_in == "loss":
        # Rejected edges are taken out before the exponential: 0 times the gradient of an infinity is NaN.
        sampled_E, other_E = (
            torch.where(kept_E, each_E, 0.0) for each_E in (inputs.policy_logprobs_E, inputs.reference_logprobs_E)
        )
        term_E = term_E + loss.kl_coef * kl_estimate(loss.kl_estimator, sampled_E, other_E)
    if inputs.entropy_E is not None and loss.entropy_coef:
        term_E = term_E - loss.entropy_coef * torch.where(kept_E, inputs.entropy_E, 0.0)
    if inputs.values_E is not None and inputs.old_values_E is not None and inputs.targets_E is not None:
        value_E = value_loss(inputs.values_E, inputs.old_values_E, inputs.targets_E, value_clip=loss.value_clip)
        term_E = term_E + loss.value_coef * value_E
    return LossOutputs(total=(inputs.weight_E * term_E).sum(), surrogate=policy, correction=correction)


def value_loss(values_E: Tensor, old_values_E: Tensor, targets_E: Tensor, *, value_clip: float | None) -> Tensor:
    """Return (E,) ``0.5 max((V - R)^2, (old + clip(V - old) - R)^2)``; without a clip ``0.5 (V - R)^2``."""
    error_E = (values_E - targets_E).square()
    if value_clip is not None:
        near_E = old_values_E + (values_E - old_values_E).clamp(-value_clip, value_clip)
        error_E = torch.maximum(error_E, (near_E - targets_E).square())
    return 0.5 * error_E


def kl_estimate(estimator: KlEstimator, sampled_logprobs_E: Tensor, other_logprobs_E: Tensor) -> Tensor:
    """Return (E,) Schulman's estimate of KL(sampled || other), nats; the tokens are samples of `sampled`.

    With d = other - sampled: k1 = -d (unbiased, any sign), k2 = d^2 / 2 (biased, >= 0), k3 = e^d - 1 - d (unbiased,
    >= 0). As a *loss* on sampled tokens their gradients differ: k2's is that of this KL; k3's that of KL(other ||
    sampled); k1's is 0 in expectation, so that it holds nothing back (see docs/concepts.md).
    """
    difference_E = other_logprobs_E - sampled_logprobs_E
    if estimator == "k1":
        return -difference_E
    if estimator == "k2":
        return 0.5 * difference_E.square()
    return torch.expm1(difference_E) - difference_E


def aggregation_weights(
    choice_E: Tensor, lengths_B: Tensor, *, n_tokens: int, n_choices: int, config: LossConfig
) -> Tensor:
    """Return (E,) float32: the weight of each edge of a row in its minibatch.

    `choice_E` (int64): the choice of each edge; `lengths_B`: the sampled tokens of every choice; `n_tokens`,
    `n_choices`: trained tokens and choices of the whole minibatch, whatever rows they lie in.

    * ``tokens``: 1 / n_tokens: each token alike (DAPO).
    * ``sequences``: 1 / (n_choices * length): each choice alike (GRPO, GSPO).
    * ``constant``: 1 / (n_choices * aggregate_tokens): each token alike in every minibatch of every step, and no
      step's length in the denominator (Dr. GRPO).
    """
    if config.aggregate == "tokens":
        return torch.full(choice_E.shape, 1.0 / n_tokens, device=choice_E.device)
    if config.aggregate == "sequences":
        return 1.0 / (n_choices * lengths_B[choice_E].float())
    assert config.aggregate_tokens is not None, "the configuration was checked"
    return torch.full(choice_E.shape, 1.0 / (n_choices * config.aggregate_tokens), device=choice_E.device)


def _check(inputs: LossInputs, loss: LossConfig) -> None:
    size = inputs.policy_logprobs_E.shape
    for name in LossInputs.__slots__:
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != size:
            raise BatchError(f"{name} has shape {tuple(tensor.shape)}; the row has {tuple(size)} edges")
    value = (inputs.values_E, inputs.old_values_E, inputs.targets_E)
    if any(tensor is None for tensor in value) and any(tensor is not None for tensor in value):
        raise BatchError("values_E, old_values_E and targets_E go together: give all or none")
    if loss.kl_coef != 0.0 and loss.kl_in == "loss" and inputs.reference_logprobs_E is None:
        raise BatchError("kl_coef is set but there are no reference_logprobs_E")
    if loss.entropy_coef != 0.0 and inputs.entropy_E is None:
        raise BatchError("entropy_coef is set but there is no entropy_E")
