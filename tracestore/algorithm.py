"""The configuration of the algorithm: credit and loss (`trainer.algorithm`).

Refuses what cannot be meant (`wrong_algorithm`). Called by `config`; read by the trainer's maths.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from tracegrad.tracestore.section import Section

_AtLeastZero = Annotated[float, msgspec.Meta(ge=0.0)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Positive = Annotated[float, msgspec.Meta(gt=0.0)]

UNGROUPED = frozenset({"gae"})
"""Values of `trainer.algorithm.credit.advantage` under which no run is compared with others of its group."""


class LossConfig(Section, frozen=True, kw_only=True):
    """What is minimised (`trainer.algorithm.loss`). Defaults: PPO's clipped surrogate with a value head."""

    clip_low: _AtLeastZero = 0.2
    clip_high: _AtLeastZero = 0.2
    dual_clip: _Positive | None = 3.0
    value_clip: _Positive | None = 0.2
    value_coef: _AtLeastZero = 0.5
    kl_coef: _AtLeastZero = 0.0


class CreditConfig(Section, frozen=True, kw_only=True):
    """From rewards to advantages (`trainer.algorithm.credit`)."""

    advantage: Literal["gae", "grpo", "dr_grpo"] = "gae"
    gamma: _Share = 1.0
    gae_lambda: _Share = 0.95
    normalise: Literal["batch", "off"] = "batch"
    """Over which tokens GAE's advantages get mean 0 and deviation 1."""
    reward_weights: Mapping[str, float] = {}
    """Reward name -> weight. Empty: every name counts with weight 1; otherwise names not listed count 0."""

    @property
    def grouped(self) -> bool:
        """Whether a run is compared with the other runs of its group, so that it needs some."""
        return self.advantage not in UNGROUPED


class AlgorithmConfig(Section, frozen=True, kw_only=True):
    """Credit and loss. Defaults are those of PPO with a value head (Schulman et al. 2017, GAE 2015)."""

    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
