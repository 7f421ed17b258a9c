"""Percentile bootstrap intervals of a mean and of a paired difference, in the standard library only.

Refuses empty samples. Called by the evaluation report and by the publish gate's rule; cost is about 0.1 us per draw
(200 values and 10,000 resamples: a third of a second).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean of `n` values and the ends of its interval."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval:
    """Return the mean of `values` with its percentile-bootstrap interval at `level`; the same for the same seed.

    Quantiles interpolate linearly between order statistics.

    Raises:
        ValueError: no values, or a level outside (0, 1).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    n = len(values)
    if n == 0 or not 0.0 < level < 1.0:
        raise ValueError(f"a bootstrap needs values and a level in (0, 1), got {n} values and {level}")
    draw = random.Random(seed).choices
    means = sorted(sum(draw(values, k=n)) / n for _ in range(resamples))
    tail = (1.0 - level) / 2.0
    return Interval(mean=sum(values) / n, low=quantile(means, tail), high=quantile(means, 1.0 - tail), n=n)


def bootstrap_difference(
    after: Sequence[float],
    before: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """Return the mean of ``after[i] - before[i]`` with its interval: pairs are resampled, never the two sides apart.

    Raises:
        ValueError: the two have different lengths, or as `bootstrap_mean`.
    """
    if len(after) != len(before):
        raise ValueError(f"pairs need equal lengths, got {len(after)} and {len(before)}")
    differences = [a - b for a, b in zip(after, before, strict=True)]
    return bootstrap_mean(differences, seed=seed, resamples=resamples, level=level)


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return the `q`-quantile of ascending values, interpolating linearly at position ``q * (len - 1)``."""
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
