"""Generalised advantage estimation: inside a call, and on through the run graph. Flat arrays, float64, no I/O.

Inside a call: over its sampled tokens, stepping over masked ones. Where other calls follow in the scope, the state
after the last token is the first state of what follows. If exactly one call follows directly and its value is known,
that value is bootstrapped from, and on a chain the result is GAE over the concatenated tokens. If several follow, their
values overlap (each holds what comes after the place where the branches meet), so none is taken: the distinct rewards
behind them are summed. A call without a known value (context only, or of another model that was not asked) is stepped
over: its rewards count, its tokens do not. Rewards of single tokens count in their call, and beyond it where a value
does.

Sources: GAE, Schulman et al. 2015 (arXiv 1506.02438, eq. 16); length-adaptive and decoupled lambda, VAPO, Yue et al.
2025 (arXiv 2504.05118). Called by `credit`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.trainer.errors import BatchError
from tracegrad.trainer.returns import Atom, Reach, ScopedGraph

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tail:
    """What comes after a call's last token, discounted to it: a value (or the rewards themselves) and an advantage."""

    value: float = 0.0
    advantage: float = 0.0


def gae(
    rewards_T: Floats,
    values_T: Floats,
    *,
    gamma: float,
    gae_lambda: float,
    mask_T: Bools | None = None,
    tail: Tail = Tail(),
) -> Floats:
    """Return (T,) advantages of one sequence: A_t = delta_t + gamma lambda A_t+1, delta_t = r_t + gamma V_t+1 - V_t.

    `values_T`: V of the state that each token was sampled in. `mask_T`: false where a token was not sampled (a tool's
    output inside the sequence): such tokens are stepped over as if they were not there, and get 0. After the last
    token comes `tail`; without one the value there is 0, also where the answer ended by `length`.

    Raises:
        BatchError: lengths disagree, or a reward stands on a masked token.
    """
    if len(rewards_T) != len(values_T) or (mask_T is not None and len(mask_T) != len(values_T)):
        raise BatchError(f"{len(rewards_T)} rewards and {len(values_T)} values (or their mask) do not fit")
    if mask_T is not None and bool((rewards_T[~mask_T] != 0.0).any()):
        raise BatchError("a reward stands on a token that was not sampled: put it on the last sampled one before")
    advantages_T = np.zeros(len(values_T))
    following, carried = tail.value, tail.advantage
    for token in reversed(range(len(values_T)) if mask_T is None else np.flatnonzero(mask_T).tolist()):
        carried += float(rewards_T[token]) + following - float(values_T[token])
        advantages_T[token] = carried
        following, carried = gamma * float(values_T[token]), gamma * gae_lambda * carried
    return advantages_T


def adaptive_lambda(length: int, alpha: float) -> float:
    """Return VAPO's lambda of an answer of `length` sampled tokens: 1 - 1 / (alpha length), not below 0."""
    return max(0.0, 1.0 - 1.0 / (alpha * length)) if length and alpha else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTokens:
    """The choices of one run that have values.

    `calls`: place in the graph -> its trained choices, by number in the batch. Every place of `values_N` that
    these choices have is set; the rest is not read.
    """

    view: ScopedGraph
    atoms: Sequence[Atom]
    calls: Mapping[int, Sequence[int]]


def graph_gae(
    run: RunTokens,
    values_N: Floats,
    starts: Ints,
    config: CreditConfig,
    *,
    critic: bool = False,
    token_rewards_N: Floats | None = None,
) -> dict[int, Floats]:
    """Return, per choice of `run.calls`, its tokens' advantages (T,). See the module for what follows a call.

    `critic`: with the lambda of the value targets. `token_rewards_N`: added to the rewards. Choices of one call share
    what follows it.

    Raises:
        BatchError: a choice has no tokens.
    """
    edge_lambda = config.turn_lambda
    if critic and config.critic_lambda is not None:
        edge_lambda = config.critic_lambda
    starting: dict[int, Tail] = {}
    """Of each call: its value and advantage at the first token; without a value of its own, what it is worth and 0."""
    steps = [config.turn_gamma * config.gamma ** (_longest(run.calls.get(n, ()), starts) - 1) for n in _places(run)]
    reach, paid = Reach(run.view, run.atoms), run.view.paid(run.atoms)
    branches = any(len(following) > 1 for following in run.view.next)
    weighed = reach.weights(steps if branches else [1.0 for _ in steps])
    found: dict[int, Floats] = {}
    for number, (following, weights) in enumerate(zip(run.view.next, weighed, strict=True)):
        tail = Tail()
        if len(following) == 1:
            after = starting[following[0]]
            tail = Tail(config.turn_gamma * after.value, config.turn_gamma * edge_lambda * after.advantage)
        elif following:
            tail = Tail(reach.total(reach.behind[number], weights))
        chosen = run.calls.get(number, ())
        for choice in chosen:
            tokens = slice(starts[choice], starts[choice + 1])
            rewards_T = np.zeros(len(values_N[tokens])) if token_rewards_N is None else token_rewards_N[tokens].copy()
            if not len(rewards_T):
                raise BatchError("a choice without tokens has no advantage: exclude it")
            rewards_T[-1] += paid[number]
            gae_lambda = _lambda(config, len(rewards_T), critic)
            found[choice] = gae(rewards_T, values_N[tokens], gamma=config.gamma, gae_lambda=gae_lambda, tail=tail)
        if chosen:
            value = float(np.mean([values_N[starts[choice]] for choice in chosen]))
            starting[number] = Tail(value, float(np.mean([found[choice][0] for choice in chosen])))
        else:
            starting[number] = Tail(paid[number] + tail.value + tail.advantage)
    return found


def _lambda(config: CreditConfig, length: int, critic: bool) -> float:
    if critic and config.critic_lambda is not None:
        return config.critic_lambda
    return config.gae_lambda if config.length_adaptive is None else adaptive_lambda(length, config.length_adaptive)


def _places(run: RunTokens) -> range:
    return range(len(run.view.following))


def _longest(choices: Sequence[int], starts: Ints) -> int:
    return max((int(starts[choice + 1] - starts[choice]) for choice in choices), default=1)
