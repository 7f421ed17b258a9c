"""Importance correction: what a sampled token counts for when it was sampled by other weights, or another program.

Three policies meet in a step: *behaviour* (what the engine recorded), *proximal* (the trainer's weights at the start of
the step) and *current* (being trained). The surrogate holds current near proximal; the weight proximal / behaviour
corrects for the rest: older weights, and an engine that computes otherwise than the trainer. A weight can be bounded
from above (truncated), and tokens whose ratio leaves given bounds can be rejected (masked): their weight is 0, and
they stay in every denominator. Refuses nothing. Called by `losses`.

Sources: decoupled objective, Hilton et al. 2021 (arXiv 2110.00641, sec. 3), as AReaL uses it (Fu et al. 2025, arXiv
2505.24298, eq. 5); truncated weights, Espeholt et al. 2018 (arXiv 1802.01561, sec. 4.1), between engine and trainer Yao
et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training"); two-sided token masks, Ling
Team 2025 (arXiv 2510.18855, IcePop); sequence and geometric masks, Liu et al. 2025 ("When speed kills stability").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tracegrad.tracestore.algorithm import CorrectionConfig, Level
from tracegrad.trainer.sequences import choice_means, choice_sums

KEPT = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One entry per edge (E,), detached.

    `weight_E`: what the edge's surrogate is multiplied by, 0 where rejected. `rejected_E` (int64): KEPT, or 1 + the
    place in `rejection_reasons` of the first rule that rejected it.
    """

    weight_E: Tensor
    rejected_E: Tensor


@torch.no_grad()
def correct(
    proximal_logprobs_E: Tensor, behaviour_logprobs_E: Tensor, choice_E: Tensor, config: CorrectionConfig
) -> Correction:
    """Return weight and rejection of each edge. `choice_E` (int64) tells the choices of the row apart."""
    logratio_E = proximal_logprobs_E - behaviour_logprobs_E
    weight_E = torch.ones_like(logratio_E)
    if config.weights != "off":
        weight_E = _at_level(logratio_E, choice_E, config.weights).exp()
        if config.cap is not None:
            weight_E = weight_E.clamp(max=config.cap)
    rejected_E = torch.full_like(choice_E, KEPT)
    for number, rule in enumerate(config.reject):
        ratio_E = _at_level(logratio_E, choice_E, rule.level).exp()
        for side, bound in ((1, rule.low), (2, rule.high)):
            if bound is not None:
                outside_E = ratio_E < bound if side == 1 else ratio_E > bound
                rejected_E = torch.where((rejected_E == KEPT) & outside_E, 2 * number + side, rejected_E)
    return Correction(weight_E=torch.where(rejected_E == KEPT, weight_E, 0.0), rejected_E=rejected_E)


def rejection_reasons(config: CorrectionConfig) -> tuple[str, ...]:
    """Return the words of the codes 1, 2, ... in `rejected_E`: two for each rule, "token ratio low", "... high"."""
    return tuple(f"{rule.level} ratio {side}" for rule in config.reject for side in ("low", "high"))


def _at_level(logratio_E: Tensor, choice_E: Tensor, level: Level) -> Tensor:
    """Return the logarithm of the ratio: the token's own, its choice's, or the choice's mean per token."""
    if level == "token":
        return logratio_E
    if level == "sequence":
        return choice_sums(logratio_E, choice_E)[0]
    return choice_means(logratio_E, choice_E)
