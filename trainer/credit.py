"""Credit: from rewards to one advantage per sampled token. Flat arrays, float64, no I/O, no torch.

Returns are per choice: the weighted rewards on its run, its role and its call; never those of another role or
call. Advantages are either group-relative (one number per choice, spread over its tokens) or token-level GAE inside
the call. It refuses returns invented from nothing. Credit is computed before anything is packed. Called by the learner.

Layouts: `_B` one entry per choice, `_N` one per trained token, choices one after another (`token_starts`).
Sources: GAE, Schulman et al. 2015 (arXiv 1506.02438); group-relative, Shao et al. 2024 (arXiv 2402.03300).
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tracegrad.tracestore.records import Reward
from tracegrad.trainer.errors import BatchError, SampleError
from tracegrad.trainer.samples import ChoiceSample, reaches

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STD_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAdvantages:
    """Group-relative credit with its counts.

    `advantages_B`: one per choice. `n_cells`: cells with two or more runs. `n_single_cells`: cells of one run, which
    fell back to the run-level advantage. `n_zero_variance`: groups (among those with two or more runs) in which every
    cell's statistics are constant, so that nothing is learned. `n_lone_runs`: runs with nobody to compare with.
    """

    advantages_B: Floats
    n_cells: int
    n_single_cells: int
    n_zero_variance: int
    n_lone_runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GaeAdvantages:
    """Token-level credit: `advantages_N` and the value head's `targets_N` (advantage + old value)."""

    advantages_N: Floats
    targets_N: Floats


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


def choice_returns(
    choices: Sequence[ChoiceSample],
    rewards: Mapping[str, Sequence[Reward]],
    weights: Mapping[str, float] | None = None,
) -> Floats:
    """Return (B,): the weighted sum of the rewards that reach each choice.

    `weights`: name -> weight; empty or None weighs every name 1, otherwise names not listed do not count.

    Raises:
        SampleError: no counted reward reaches a choice (a missing reward is not 0; `build_batch` excludes these).
    """
    returns_B = np.zeros(len(choices))
    for index, choice in enumerate(choices):
        reaching = [
            reward.value * _weight(reward, weights)
            for reward in rewards[choice.run_id]
            if _counts(reward, weights) and reaches(reward, role=choice.role, call_id=choice.call_id)
        ]
        if not reaching:
            raise SampleError(f"call {choice.call_id} of run {choice.run_id}: no reward reaches it; exclude it")
        returns_B[index] = sum(reaching)
    return returns_B


def run_returns(
    rewards: Mapping[str, Sequence[Reward]], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return run -> the weighted sum of the rewards on the run itself. Runs without one are absent, not 0."""
    totals: dict[str, float] = {}
    for run_id, given in rewards.items():
        own = [r for r in given if r.role is None and r.call_id is None and _counts(r, weights)]
        if own:
            totals[run_id] = sum(reward.value * _weight(reward, weights) for reward in own)
    return totals


def group_advantages(
    choices: Sequence[ChoiceSample],
    returns_B: Floats,
    run_level: Mapping[str, float],
    run_groups: Mapping[str, str],
    *,
    normalise_std: bool = True,
    cell: Literal["turn", "role"] = "turn",
) -> GroupAdvantages:
    """Compare each choice with the other runs of its group in the same cell.

    A cell is (group, role, turn), or (group, role). Each run contributes the mean return of its choices in the cell
    once, whatever their number; advantage = return - mean over the runs [/ (std + 1e-6), sample std]. A cell with one
    run falls back to the run-level advantage: the run's own reward against those of the group (`run_level`,
    `run_groups`), so that no other role's reward leaks in. A run with nobody to compare with gets 0.
    """
    cells = [_cell(choice, cell) for choice in choices]
    by_run: dict[Hashable, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for choice, key, value in zip(choices, cells, returns_B, strict=True):
        by_run[key][choice.run_id].append(float(value))
    statistics = {key: _statistics([float(np.mean(v)) for v in runs.values()]) for key, runs in by_run.items()}
    of_group: dict[str, list[float]] = defaultdict(list)
    for run_id, value in run_level.items():
        of_group[run_groups[run_id]].append(value)
    group_statistics = {group: _statistics(values) for group, values in of_group.items()}

    advantages_B = np.zeros(len(choices))
    varied: dict[str, bool] = {}
    lone: set[str] = set()
    for index, (choice, key) in enumerate(zip(choices, cells, strict=True)):
        compared, value = statistics[key], float(returns_B[index])
        if len(by_run[key]) < 2:
            of_runs = group_statistics.get(choice.group_key)
            if of_runs is None or of_runs.count < 2 or choice.run_id not in run_level:
                lone.add(choice.run_id)
                continue
            compared, value = of_runs, run_level[choice.run_id]
        advantages_B[index] = compared.advantage(value, normalise_std)
        varied[choice.group_key] = varied.get(choice.group_key, False) or compared.std > 0.0
    single = sum(len(runs) < 2 for runs in by_run.values())
    return GroupAdvantages(
        advantages_B=advantages_B,
        n_cells=len(by_run) - single,
        n_single_cells=single,
        n_zero_variance=sum(not any_variance for any_variance in varied.values()),
        n_lone_runs=len(lone),
    )


def gae_advantages(
    returns_B: Floats, values_N: Floats, starts: Ints, *, gamma: float, gae_lambda: float
) -> GaeAdvantages:
    """Token-level GAE inside each call.

    `values_N`: V at the edge parent of each token (the state it was sampled in). The return is paid at the last
    token; the value after it is 0, also where the choice ended by `length` (trained with what it got, not
    bootstrapped). Nothing crosses from one choice to the next.

    Raises:
        BatchError: lengths disagree.
    """
    if len(returns_B) + 1 != len(starts) or len(values_N) != starts[-1]:
        raise BatchError(f"{len(returns_B)} returns, {len(values_N)} values and {starts[-1]} tokens do not fit")
    advantages_N = np.zeros(len(values_N))
    for index, reward in enumerate(returns_B):
        first, last = int(starts[index]), int(starts[index + 1]) - 1
        carried, next_value, paid = 0.0, 0.0, float(reward)
        for token in range(last, first - 1, -1):
            delta = paid + gamma * next_value - values_N[token]
            carried = delta + gamma * gae_lambda * carried
            advantages_N[token] = carried
            next_value, paid = values_N[token], 0.0
    return GaeAdvantages(advantages_N=advantages_N, targets_N=advantages_N + values_N)


def normalise(advantages_N: Floats) -> Floats:
    """Return advantages with mean 0 and sample std 1 over the trained tokens; constant ones become 0."""
    if len(advantages_N) == 0:
        return advantages_N
    return _statistics([float(value) for value in advantages_N]).normalised(advantages_N)


@dataclass(frozen=True, slots=True)
class _Statistics:
    count: int
    mean: float
    std: float
    """Sample standard deviation; exactly 0 where all values are equal."""

    def advantage(self, value: float, normalise_std: bool) -> float:
        scale = self.std + STD_EPSILON if normalise_std else 1.0
        return 0.0 if self.std == 0.0 else (value - self.mean) / scale

    def normalised(self, values: Floats) -> Floats:
        return np.zeros_like(values) if self.std == 0.0 else (values - self.mean) / (self.std + STD_EPSILON)


def _statistics(values: Sequence[float]) -> _Statistics:
    constant = len(values) < 2 or max(values) == min(values)
    return _Statistics(len(values), float(np.mean(values)), 0.0 if constant else float(np.std(values, ddof=1)))


def _cell(choice: ChoiceSample, cell: Literal["turn", "role"]) -> Hashable:
    key = (choice.group_key, choice.role)
    return (*key, choice.turn) if cell == "turn" else key


def _counts(reward: Reward, weights: Mapping[str, float] | None) -> bool:
    return not weights or reward.name in weights


def _weight(reward: Reward, weights: Mapping[str, float] | None) -> float:
    return weights[reward.name] if weights else 1.0
