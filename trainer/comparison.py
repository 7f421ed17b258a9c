"""Group-relative advantages: a choice's return against those of the other runs. One number per choice; no I/O.

A cell is (group, role, turn), or (group, role). Each run counts once in a cell, with the mean return of its choices
there, whatever their number. Four published rules, x a choice's return, m_r the mean of run r in its cell:

    grpo                    (x - mean m) / (std m + 1e-6)      Shao et al. 2024, arXiv 2402.03300 (sample std here)
    dr_grpo                 x - mean m                         Liu et al. 2025, arXiv 2503.20783
    rloo                    x - mean of the other runs' m      Ahmadian et al. 2024, arXiv 2402.14740
    reinforce++-baseline    x - mean m, whitened afterwards    Hu et al. 2025, arXiv 2501.03262
    reinforce++             x, whitened afterwards over the batch: no cells

A cell of one run has nothing to compare: the run's own rewards stand against those of the group's other runs, so that
no other role's reward leaks in; that is counted. A run with nobody to compare with gets 0. To either is added the
choice's own penalty as it is: a cell takes it from the returns that it compares, here there are none of its kind to
compare it with, and divided by how much the rewards differ it would grow without bound where they hardly do.
Called by `credit`.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tracegrad.trainer.errors import BatchError
from tracegrad.trainer.samples import ChoiceSample

Floats = NDArray[np.float64]
Rule = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"]
Cell = Literal["turn", "role"]

STD_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How often there was something to compare.

    `n_cells`: cells with two or more runs. `n_single_cells`: cells of one run, which fell back to the run-level
    advantage. `n_zero_variance`: groups (among those with two or more runs) in which every cell's statistics are
    constant, so that nothing is learned. `n_lone_runs`: runs with nobody to compare with.
    """

    n_cells: int = 0
    n_single_cells: int = 0
    n_zero_variance: int = 0
    n_lone_runs: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """(B,) advantages, with the counts over all and per role."""

    advantages_B: Floats
    counts: Counts
    roles: Mapping[str, Counts]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the runs of a cell, or of values. `std`: sample standard deviation; exactly 0 where all are equal."""

    count: int
    mean: float
    std: float

    @staticmethod
    def of(values: Sequence[float]) -> "Statistics":
        """Measure the values, at least one."""
        if len(values) < 2 or max(values) == min(values):
            return Statistics(len(values), float(values[0]), 0.0)
        return Statistics(len(values), float(np.mean(values)), float(np.std(values, ddof=1)))

    @staticmethod
    def joined(parts: Sequence["Statistics"]) -> "Statistics":
        """Return those of all values together, from those of at least one part.

        Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
        """
        count = sum(part.count for part in parts)
        mean = sum(part.count * part.mean for part in parts) / count
        if all(part.std == 0.0 and part.mean == parts[0].mean for part in parts):
            return Statistics(count, parts[0].mean, 0.0)
        squares = sum((part.count - 1) * part.std**2 + part.count * (part.mean - mean) ** 2 for part in parts)
        return Statistics(count, mean, math.sqrt(squares / (count - 1)))


@dataclass(frozen=True, slots=True)
class _Compared:
    """What a choice was compared in: the key of its cell, and whether it varied; None: with nobody."""

    cell: Hashable
    single: bool
    varied: bool | None


def compare(
    choices: Sequence[ChoiceSample],
    returns_B: Floats,
    run_level: Mapping[str, float],
    run_groups: Mapping[str, str],
    *,
    rule: Rule = "grpo",
    cell: Cell = "turn",
    penalties_B: Floats | None = None,
) -> Comparison:
    """Return the advantages of all choices under `rule`.

    `run_level`: run -> its own rewards, of every run of the groups that has some, also of those without a trainable
    choice; `run_groups`: run -> group. `penalties_B`: what of each return is the choice's own (for leaving the
    reference policy), and no reward of the app's; None: nothing.

    Raises:
        BatchError: the returns, or the penalties, are not one for each choice.
    """
    for name, array_B in (("returns", returns_B), ("penalties", penalties_B)):
        if array_B is not None and len(array_B) != len(choices):
            raise BatchError(f"{len(choices)} choices and {len(array_B)} {name} do not fit")
    if rule == "reinforce++":
        return Comparison(advantages_B=returns_B.copy(), counts=Counts(), roles={})
    cells = [_cell(choice, cell) for choice in choices]
    sums: dict[Hashable, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for choice, key, value in zip(choices, cells, returns_B, strict=True):
        sums[key][choice.run_id].append(float(value))
    means = {key: {run: float(np.mean(values)) for run, values in runs.items()} for key, runs in sums.items()}
    of_group: dict[str, dict[str, float]] = defaultdict(dict)
    for run_id, value in run_level.items():
        of_group[run_groups[run_id]][run_id] = value
    measured = {key: Statistics.of(list(runs.values())) for key, runs in means.items()}
    groups = {group: Statistics.of(list(runs.values())) for group, runs in of_group.items()}

    advantages_B = np.zeros(len(choices))
    compared: list[_Compared] = []
    for index, (choice, key) in enumerate(zip(choices, cells, strict=True)):
        statistics, value, own = measured[key], float(returns_B[index]), means[key][choice.run_id]
        if single := statistics.count < 2:
            advantages_B[index] = 0.0 if penalties_B is None else penalties_B[index]
            if choice.run_id not in run_level or groups[choice.group_key].count < 2:
                compared.append(_Compared(key, True, None))
                continue
            statistics, value, own = groups[choice.group_key], run_level[choice.run_id], run_level[choice.run_id]
        advantages_B[index] += _advantage(rule, statistics, value, own)
        compared.append(_Compared(key, single, statistics.std > 0.0))
    roles = sorted({choice.role for choice in choices if choice.role is not None})
    return Comparison(
        advantages_B=advantages_B,
        counts=_count(choices, compared),
        roles={role: _count(choices, compared, role) for role in roles},
    )


def _advantage(rule: Rule, statistics: Statistics, value: float, own: float) -> float:
    if rule == "rloo":
        others = (statistics.count * statistics.mean - own) / (statistics.count - 1)
        return value - (statistics.mean if statistics.std == 0.0 else others)
    if rule != "grpo":
        return value - statistics.mean
    return 0.0 if statistics.std == 0.0 else (value - statistics.mean) / (statistics.std + STD_EPSILON)


def _count(choices: Sequence[ChoiceSample], compared: Sequence[_Compared], role: str | None = None) -> Counts:
    """Count over all choices, or over those of one role."""
    kept = [(c, one) for c, one in zip(choices, compared, strict=True) if role is None or c.role == role]
    varied: dict[str, bool] = {}
    for choice, one in kept:
        if one.varied is not None:
            varied[choice.group_key] = varied.get(choice.group_key, False) or one.varied
    return Counts(
        n_cells=len({one.cell for _, one in kept if not one.single}),
        n_single_cells=len({one.cell for _, one in kept if one.single}),
        n_zero_variance=sum(not any_variance for any_variance in varied.values()),
        n_lone_runs=len({choice.run_id for choice, one in kept if one.varied is None}),
    )


def _cell(choice: ChoiceSample, cell: Cell) -> Hashable:
    key = (choice.group_key, choice.role)
    return (*key, choice.turn) if cell == "turn" else key
