"""Surrogates: the policy-gradient objectives, edge by edge. Tensors in, tensors out; the rest is configuration.

`r` is the ratio policy / anchor of an edge, the anchor being the proximal policy (or the recorded one, see
`losses`), `A` its advantage, `s` the geometric mean of `r` over the sampled tokens of its choice. Each returns a loss
per edge, to be minimised; weights, sums and denominators are the caller's (`losses`). Refuses nothing.

Sources: `ppo`, Schulman et al. 2017 (arXiv 1707.06347, eq. 7), with the dual clip of Ye et al. 2020 (arXiv 1912.09729,
eq. 5); `cispo`, MiniMax-M1 2025 (arXiv 2506.13585, eq. 4 and 5); `gspo` and `gspo_token`, Zheng et al. 2025 (arXiv
2507.18071, eq. 5 and 7, eq. 13 and 14).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tracegrad.tracestore.algorithm import LossConfig
from tracegrad.trainer.sequences import choice_means

_FAR = 20.0
"""Ratios are told apart up to e^20. Beyond it exp overflows in float32 sooner or later, and an infinite ratio makes the
gradient of the clip that holds it NaN (0 times infinity)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surrogate:
    """One entry per edge (E,). `loss_E` carries the gradient; the rest is detached.

    `ratio_E`: r, or s for `gspo` and `gspo_token`. `clipped_E`: the clip removed the edge's gradient (`ppo`, `gspo*`)
    or cut its weight (`cispo`); `dual_clipped_E`: the dual clip removed it. No edge is both.
    """

    loss_E: Tensor
    ratio_E: Tensor
    clipped_E: Tensor
    dual_clipped_E: Tensor


def surrogate(
    policy_logprobs_E: Tensor, anchor_logprobs_E: Tensor, advantages_E: Tensor, choice_E: Tensor, config: LossConfig
) -> Surrogate:
    """Return the configured objective. `choice_E` (int64) tells the choices of the row apart.

    * ``ppo``: ``-max(min(r A, clip(r) A), c A where A < 0)``, clip to [1 - low, 1 + high], c the dual clip.
    * ``cispo``: ``-sg(clip(r)) A log pi``: every token keeps its gradient, only its weight is bounded.
    * ``gspo``: as ppo with s for r, the gradient flowing through s into all tokens of the choice.
    * ``gspo_token``: as gspo, each token with the value of s and the gradient of its own logprob.
    """
    logratio_E = (policy_logprobs_E - anchor_logprobs_E).clamp(-_FAR, _FAR)
    low, high = config.bounds
    if config.objective == "cispo":
        return _cispo(policy_logprobs_E, logratio_E.detach().exp(), advantages_E, 1.0 - low, 1.0 + high)
    if config.objective == "gspo":
        logratio_E = choice_means(logratio_E, choice_E)
    elif config.objective == "gspo_token":
        own_E = policy_logprobs_E - policy_logprobs_E.detach()
        logratio_E = choice_means(logratio_E.detach(), choice_E) + own_E
    return _clipped(logratio_E.exp(), advantages_E, 1.0 - low, 1.0 + high, config.dual_clip)


def _clipped(ratio_E: Tensor, advantages_E: Tensor, lowest: float, highest: float, dual: float | None) -> Surrogate:
    free_E, bound_E = ratio_E * advantages_E, ratio_E.clamp(lowest, highest) * advantages_E
    gain_E = torch.minimum(free_E, bound_E)
    dual_clipped_E = torch.zeros_like(ratio_E, dtype=torch.bool)
    if dual is not None:
        floor_E = dual * advantages_E
        dual_clipped_E = (advantages_E < 0) & (gain_E < floor_E)
        gain_E = torch.where(dual_clipped_E, floor_E, gain_E)
    return Surrogate(
        loss_E=-gain_E,
        ratio_E=ratio_E.detach(),
        clipped_E=(bound_E < free_E) & ~dual_clipped_E,
        dual_clipped_E=dual_clipped_E,
    )


def _cispo(logprobs_E: Tensor, ratio_E: Tensor, advantages_E: Tensor, lowest: float, highest: float) -> Surrogate:
    weight_E = ratio_E.clamp(lowest, highest)
    return Surrogate(
        loss_E=-weight_E * advantages_E * logprobs_E,
        ratio_E=ratio_E,
        clipped_E=weight_E != ratio_E,
        dual_clipped_E=torch.zeros_like(ratio_E, dtype=torch.bool),
    )
