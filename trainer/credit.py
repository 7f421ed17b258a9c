"""Credit: from rewards to one advantage per sampled token. Flat arrays, float64, no I/O, no torch.

`assign` is the whole way: rewards reach calls as far as the scope goes (`returns`), become advantages by GAE over a
critic's values (`gae`) or by comparison with the other runs of the group (`comparison`), and are normalised over
the tokens of a role, a model or the batch. It refuses returns invented from nothing. Credit is computed per choice,
before anything is packed. Called by the learner's step.

Layouts: `_B` one entry per choice, `_N` one per trained token, choices one after another (`token_starts`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.tracestore.records import Reward
from tracegrad.trainer.comparison import STD_EPSILON, Statistics, compare
from tracegrad.trainer.errors import BatchError, SampleError
from tracegrad.trainer.exchange import CriticValues
from tracegrad.trainer.gae import RunTokens, graph_gae
from tracegrad.trainer.returns import Scope, ScopedGraph, atoms_of, call_returns
from tracegrad.trainer.samples import ChoiceSample, Samples

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_WHITENED = ("gae", "reinforce++", "reinforce++-baseline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """Credit of a step, for the update and its metrics.

    `rewards_B`: what stands on the choice's own call, its role or its run, NaN where nothing does; `returns_B`: what
    reaches it in the scope. `targets_N`: the value head's, None without a critic. `counts` go into the metrics, `roles`
    into those of each role.
    """

    rewards_B: Floats
    returns_B: Floats
    advantages_N: Floats
    targets_N: Floats | None
    counts: Mapping[str, int]
    roles: Mapping[str, Mapping[str, int]]


def token_starts(choices: Sequence[ChoiceSample]) -> Ints:
    """Return (B + 1,) offsets: the tokens of choice b are ``starts[b]:starts[b + 1]`` of every `_N` array."""
    lengths = np.fromiter((len(choice.token_ids) for choice in choices), dtype=np.int64, count=len(choices))
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def behaviour_logprobs(choices: Sequence[ChoiceSample]) -> Floats:
    """Return the recorded logprobs of all choices, (N,), nats."""
    return np.concatenate([np.zeros(0)] + [np.asarray(choice.behaviour_logprobs) for choice in choices])


def spread(per_choice_B: Floats, starts: Ints) -> Floats:
    """Repeat each choice's number over its tokens: (B,) -> (N,)."""
    return np.repeat(per_choice_B, np.diff(starts))


def assign(
    samples: Samples,
    config: CreditConfig,
    values_N: Floats | None = None,
    token_rewards_N: Floats | None = None,
    batch: Statistics | None = None,
    *,
    foreign: Sequence[CriticValues] = (),
) -> Credit:
    """Turn the rewards of a step into advantages.

    `values_N`: the critic's, of the state each token was sampled in; needed under `gae`. `token_rewards_N`: what is
    added to the rewards token by token (a penalty for leaving the reference policy). `batch`: see `normalised`;
    `foreign`: see `gae_advantages`.

    Raises:
        SampleError: no counted reward reaches a choice (a missing reward is not 0; `build_batch` excludes these).
        BatchError: lengths disagree, or GAE has no values.
    """
    starts = token_starts(samples.choices)
    for name, array_N in (("values", values_N), ("token rewards", token_rewards_N)):
        if array_N is not None and len(array_N) != starts[-1]:
            raise BatchError(f"{len(array_N)} {name} and {starts[-1]} tokens do not fit")
    returns_B = choice_returns(samples, config, config.scope)
    if np.isnan(returns_B).any():
        lacking = samples.choices[int(np.flatnonzero(np.isnan(returns_B))[0])]
        raise SampleError(f"call {lacking.call_id} of run {lacking.run_id}: no reward reaches it; exclude it")
    rewards_B = returns_B if config.scope == "call" else choice_returns(samples, config, "call")
    unlinked = {graph_id: graph.unlinked() for graph_id, graph in samples.graphs.items()}
    counts = {"n_unlinked_choices": sum(c.call_id in unlinked[c.run_id] for c in samples.choices)}
    roles: Mapping[str, Mapping[str, int]] = {}
    targets_N = None
    if config.advantage == "gae":
        if values_N is None:
            raise BatchError("advantage gae needs the values of a critic")
        values = critic_values(samples, values_N, token_rewards_N)
        advantages_N = judged_N = gae_advantages(samples, config, values, foreign)
        if config.critic_lambda is not None:
            judged_N = gae_advantages(samples, config, values, foreign, critic=True)
        targets_N = values_N + judged_N
    else:
        penalties_B = None if token_rewards_N is None else np.add.reduceat(token_rewards_N, starts[:-1])
        returns_B = returns_B if penalties_B is None else returns_B + penalties_B
        compared = compare(
            samples.choices,
            returns_B,
            run_returns(samples.rewards, config.reward_weights),
            samples.run_groups,
            rule=config.advantage,
            cell=config.cell,
            penalties_B=penalties_B,
        )
        advantages_N = spread(compared.advantages_B, starts)
        counts |= asdict(compared.counts)
        roles = {role: asdict(counted) for role, counted in compared.roles.items()}
    return Credit(
        rewards_B=rewards_B,
        returns_B=returns_B,
        advantages_N=normalised(samples, advantages_N, config, batch),
        targets_N=targets_N,
        counts=counts,
        roles=roles,
    )


def choice_returns(samples: Samples, config: CreditConfig, scope: Scope) -> Floats:
    """Return (B,): the sum of the weighted rewards that reach each choice in `scope`; NaN where none does."""
    found: dict[tuple[str, str], float | None] = {}
    for run_id in {choice.run_id for choice in samples.choices}:
        graph = samples.graphs[run_id]
        atoms = atoms_of(graph, samples.rewards[run_id], config.reward_weights)
        returns = call_returns(ScopedGraph(graph, scope, atoms), atoms, turn_gamma=config.turn_gamma)
        found |= {(run_id, node.call_id): value for node, value in zip(graph.nodes, returns, strict=True)}
    of_choices = [found[choice.run_id, choice.call_id] for choice in samples.choices]
    return np.array([np.nan if value is None else value for value in of_choices], dtype=np.float64)


def run_returns(
    rewards: Mapping[str, Sequence[Reward]], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return run -> the weighted sum of the rewards on the run itself. Runs without one are absent, not 0."""
    totals: dict[str, float] = {}
    for run_id, given in rewards.items():
        own = [r for r in given if r.role is None and r.call_id is None and (not weights or r.name in weights)]
        if own:
            totals[run_id] = sum(reward.value * (weights[reward.name] if weights else 1.0) for reward in own)
    return totals


def critic_values(samples: Samples, values_N: Floats, token_rewards_N: Floats | None = None) -> CriticValues:
    """Return what the model's critic says of its choices, as credit takes it and other models may be told it."""
    return CriticValues(
        calls=tuple((choice.run_id, choice.call_id) for choice in samples.choices),
        starts=token_starts(samples.choices),
        values_N=values_N,
        token_rewards_N=token_rewards_N,
    )


def gae_advantages(
    samples: Samples,
    config: CreditConfig,
    values: CriticValues,
    foreign: Sequence[CriticValues] = (),
    *,
    critic: bool = False,
) -> Floats:
    """Return (N,) GAE advantages, not normalised, in the scope of `config`; `critic`: with the targets' lambda.

    `values`: of these choices. `foreign`: of those that other models train on; their calls are bootstrapped from and
    gone through like the model's own. Without, they are stepped over.
    """
    every = CriticValues.joined([values, *foreign])
    numbers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (run_id, call_id) in enumerate(every.calls):
        numbers[run_id][call_id].append(number)
    advantages_N = np.zeros(len(values.values_N))
    for run_id in dict.fromkeys(choice.run_id for choice in samples.choices):
        graph = samples.graphs[run_id]
        place = graph.index()
        atoms = atoms_of(graph, samples.rewards[run_id], config.reward_weights)
        run = RunTokens(
            view=ScopedGraph(graph, config.scope, atoms),
            atoms=atoms,
            calls={place[call_id]: chosen for call_id, chosen in numbers[run_id].items()},
        )
        found = graph_gae(
            run, every.values_N, every.starts, config, critic=critic, token_rewards_N=every.token_rewards_N
        )
        for number, advantages_T in found.items():
            if number < len(samples.choices):
                advantages_N[every.starts[number] : every.starts[number + 1]] = advantages_T
    return advantages_N


def normalised(samples: Samples, advantages_N: Floats, config: CreditConfig, batch: Statistics | None = None) -> Floats:
    """Return advantages with mean 0 and sample std 1 over the tokens that `config.normalise` puts together.

    Where all of a set are equal they become 0. `batch`: of the advantages of all models that the step trains, for
    `normalise: batch`; None: these samples are all of them.
    """
    over = config.normalise or ("role" if config.advantage in _WHITENED else "off")
    if over == "off":
        return advantages_N
    if over != "role":
        return whitened(advantages_N, batch if over == "batch" else None)
    starts = token_starts(samples.choices)
    roles = [choice.role for choice in samples.choices]
    result_N = np.zeros_like(advantages_N)
    for role in set(roles):
        mask_N = spread(np.array([float(one == role) for one in roles]), starts).astype(bool)
        if mask_N.any():
            result_N[mask_N] = whitened(advantages_N[mask_N])
    return result_N


def whitened(values: Floats, among: Statistics | None = None) -> Floats:
    """Return the values with mean 0 and sample std 1, as part of those that were measured; equal ones become 0.

    None: as all of them, at least one.
    """
    measured = among or Statistics.of(values.tolist())
    return np.zeros_like(values) if measured.std == 0.0 else (values - measured.mean) / (measured.std + STD_EPSILON)
