"""The configuration of the algorithm: credit and loss (`trainer.algorithm`).

Refuses what cannot be meant (`wrong_algorithm`). Called by `config`; read by the trainer's maths.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from tracegrad.tracestore.section import AtLeastZero, Count, Positive, Section, Share

UNGROUPED = frozenset({"gae", "reinforce++"})
"""Values of `trainer.algorithm.credit.advantage` under which no run is compared with others of its group."""


Objective = Literal["ppo", "cispo", "gspo", "gspo_token"]
KlEstimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence", "geometric"]
"""Of a ratio of probabilities: each token's, its choice's product, or the geometric mean over its choice."""

_BOUNDS: Mapping[Objective, tuple[float, float]] = {
    "ppo": (0.2, 0.2),
    "cispo": (1.0, 4.0),
    "gspo": (3e-4, 4e-4),
    "gspo_token": (3e-4, 4e-4),
}
"""How far below and above 1 the ratio counts. PPO's; CISPO without a lower bound (MiniMax-M1) and weights up to 5
(ScaleRL, arXiv 2510.13786); GSPO's of its paper, whose ratio is a mean over the whole choice."""


class LossConfig(Section, frozen=True, kw_only=True):
    """What is minimised (`trainer.algorithm.loss`). Defaults: PPO's clipped surrogate with a value head."""

    objective: Objective = "ppo"
    clip_low: AtLeastZero | None = None
    """How far below 1 the ratio counts. None: the objective's own (ppo 0.2, cispo 1.0: no bound, gspo 0.0003)."""
    clip_high: AtLeastZero | None = None
    """How far above 1 the ratio counts. None: the objective's own (ppo 0.2, cispo 4.0, gspo 0.0004)."""
    dual_clip: Positive | None = 3.0
    """Bound on the ratio where the advantage is negative; not for cispo, whose weights are bounded anyway."""
    value_clip: Positive | None = 0.2
    value_coef: AtLeastZero = 0.5
    kl_coef: AtLeastZero = 0.0
    """Of the KL penalty to the model's own checkpoint, the reference. Above 0 a second copy of the model is held."""
    kl_estimator: KlEstimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: AtLeastZero = 0.0
    aggregate: Literal["tokens", "sequences", "constant"] = "tokens"
    """Mean over all tokens, mean over choices of their means, or sums over a constant length (`aggregate_tokens`)."""
    aggregate_tokens: Count | None = None
    """The constant length of `aggregate: constant`: the most tokens an answer may have."""

    @property
    def bounds(self) -> tuple[float, float]:
        """How far below and above 1 the ratio counts."""
        low, high = _BOUNDS[self.objective]
        return low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high


class Rejection(Section, frozen=True, kw_only=True):
    """Tokens whose ratio proximal / behaviour lies outside count nothing; they stay in the denominators."""

    level: Level = "token"
    low: Positive | None = None
    high: Positive | None = None


class CorrectionConfig(Section, frozen=True, kw_only=True):
    """What a token counts for that older weights, or an engine that computes otherwise, sampled."""

    anchor: Literal["proximal", "behaviour"] = "proximal"
    """What the surrogate's ratio is taken against: the weights at the start of the step, or what was recorded."""
    weights: Literal["off"] | Level = "token"
    """Weigh each token by proximal / behaviour, at this level."""
    cap: Positive | None = 2.0
    """The largest weight. None: not bounded, for use with `reject`."""
    reject: tuple[Rejection, ...] = ()
    """In order; the first that holds is the one counted."""


class CreditConfig(Section, frozen=True, kw_only=True):
    """From rewards to advantages (`trainer.algorithm.credit`)."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"] = "gae"
    """GAE has a critic; the others compare a run with the rest of its group (`reinforce++`: of the batch)."""
    scope: Literal["call", "role", "graph"] = "call"
    """How far a reward reaches: what it stands on; also earlier calls of the role; also all ancestors in the graph."""
    cell: Literal["turn", "role"] = "turn"
    """Which calls of a group are compared: those of one role at one place in the graph, or all of the role."""
    normalise: Literal["role", "model", "batch", "off"] | None = None
    """Whose tokens share mean 0 and deviation 1. None: a role's under gae and reinforce++, off where cells compare."""
    gamma: Share = 1.0
    """Discount for each sampled token inside a call."""
    gae_lambda: Share = 0.95
    critic_lambda: Share | None = None
    """Lambda of the critic's targets, inside calls and between them (VAPO: 1). None: that of the advantages."""
    length_adaptive: Positive | None = None
    """VAPO's alpha: lambda = 1 - 1 / (alpha length) inside a call, in place of `gae_lambda`."""
    turn_gamma: Share = 1.0
    """Discount for each call between a call and the reward."""
    turn_lambda: Share = 1.0
    """Lambda from a call to the one after it; below 1 it trusts the critic's value of that call."""
    bootstrap: Literal["own", "all"] = "own"
    """Along the graph, whose critics' values count: the model's own, other models' calls being stepped over; or all."""
    reward_weights: Mapping[str, float] = {}
    """Reward name -> weight. Empty: every name counts with weight 1; otherwise names not listed count 0."""

    @property
    def grouped(self) -> bool:
        """Whether a run is compared with the other runs of its group, so that it needs some."""
        return self.advantage not in UNGROUPED


class RefusalConfig(Section, frozen=True, kw_only=True):
    """When a step is refused although every number in it is finite. A refused step changes no weight."""

    grad_norm_factor: Positive | None = 100.0
    """A gradient explodes where its norm is above this many times the usual (median) one and `max_grad_norm`."""
    grad_norm_history: Annotated[int, msgspec.Meta(ge=5)] = 20
    """How many steps' norms are remembered; the first five are never refused."""
    silent_steps: Count | None = 20
    """Stop after so many steps in a row in which no run earned anything. None: never."""


class AlgorithmConfig(Section, frozen=True, kw_only=True):
    """Credit and loss. Defaults are those of PPO with a value head (Schulman et al. 2017, GAE 2015)."""

    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    correction: CorrectionConfig = CorrectionConfig()
    refuse: RefusalConfig = RefusalConfig()


def wrong_algorithm(algorithm: AlgorithmConfig) -> str | None:
    """Return what is wrong with `trainer.algorithm`, None where nothing is."""
    credit, loss, correction = algorithm.credit, algorithm.loss, algorithm.correction
    if credit.bootstrap == "all" and (credit.advantage, credit.scope) != ("gae", "graph"):
        return (
            "credit.bootstrap is all: values pass between models along the run graph alone, so it needs "
            f"credit.advantage gae and credit.scope graph (they are {credit.advantage} and {credit.scope})"
        )
    if loss.aggregate == "constant" and loss.aggregate_tokens is None:
        return "loss.aggregate is constant: set loss.aggregate_tokens, the most tokens an answer may have"
    if correction.anchor == "behaviour" and correction.weights != "off":
        return "correction.anchor is behaviour, whose ratio holds the correction already: set correction.weights to off"
    for number, rule in enumerate(correction.reject):
        if rule.low is None and rule.high is None:
            return f"correction.reject[{number}] has no bound: give it low, high or both"
        if rule.low is not None and rule.high is not None and rule.low >= rule.high:
            return f"correction.reject[{number}] keeps nothing: low {rule.low} is not below high {rule.high}"
    return None
