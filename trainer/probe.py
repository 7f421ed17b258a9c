"""Does the engine serve the new weights? Compares logprobs; no torch, no I/O.

On the same tokens stand three series of logprobs at temperature 1: the engine's (e), the new trainer weights' (n) and
the previous ones' (p). An engine with the new weights differs from n by numerical noise only; one that kept the old
weights is at p; one that kept a part of them (a tied output head) lies between. `judge` tells these apart, and says
"unresolved" where the step was too small to see. Called by `tracegrad.trainer.publish`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["new", "unresolved", "stale", "mismatch"]
STALE_SHARE = 0.25
"""Share of the step from p to n that the engine may lack before it is called stale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSequence:
    """Token ids of a prompt and what was sampled after it; ``1 <= n_prompt < len(ids)``."""

    ids: tuple[int, ...]
    n_prompt: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens that are compared."""
        return len(self.ids) - self.n_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSet:
    """Sequences with the trainer's logprobs of their sampled tokens under the new and the previous weights.

    The logprobs are taken at temperature 1, whatever the tokens were sampled at, one series a sequence, as long as
    its ``n_tokens``. `previous_logprobs` is None where there are no previous weights.
    """

    sequences: tuple[ProbeSequence, ...]
    new_logprobs: tuple[tuple[float, ...], ...]
    previous_logprobs: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        """Refuse series that do not fit their sequences.

        Raises:
            ValueError: lengths disagree, a sequence has no prompt or nothing after it, or there is no sequence.
        """
        sizes = [s.n_tokens for s in self.sequences]
        if not sizes or any(s.n_prompt < 1 or s.n_tokens < 1 for s in self.sequences):
            raise ValueError("a probe needs sequences, each with a prompt and at least one token after it")
        for name, series in (("new", self.new_logprobs), ("previous", self.previous_logprobs)):
            if series is not None and [len(s) for s in series] != sizes:
                raise ValueError(f"the probe's {name} logprobs do not have one value for each sampled token")

    @property
    def n_tokens(self) -> int:
        """Number of tokens that are compared, over all sequences."""
        return sum(s.n_tokens for s in self.sequences)

    def fitting(self, max_model_len: int | None) -> "ProbeSet":
        """Return the probe without the sequences an engine of that length cannot score (it samples one more token)."""
        if max_model_len is None or all(len(s.ids) < max_model_len for s in self.sequences):
            return self
        kept = [i for i, s in enumerate(self.sequences) if len(s.ids) < max_model_len]
        previous = self.previous_logprobs
        return ProbeSet(
            sequences=tuple(self.sequences[i] for i in kept),
            new_logprobs=tuple(self.new_logprobs[i] for i in kept),
            previous_logprobs=None if previous is None else tuple(previous[i] for i in kept),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What `judge` saw. Means are of absolute differences in nats.

    `gap` is mean |new - previous|: the size of the step. `stale_share` is how much of the step the engine lacks, by
    least squares: 0 has all of it, 1 none. Both, and `mean_abs_previous`, are None without previous weights.
    """

    verdict: Verdict
    mean_abs_new: float
    mean_abs_previous: float | None
    gap: float | None
    stale_share: float | None
    n_tokens: int
    bound: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object; a value that is no number becomes None."""
        fields = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def judge(
    engine: Sequence[float],
    new: Sequence[float],
    previous: Sequence[float] | None,
    bound: float,
    *,
    noise: float | None = None,
    min_tokens: int = 0,
) -> ProbeResult:
    """Say whose logprobs the engine gives.

    `bound` is the largest mean |engine - new| that is accepted. `noise` is the mean |engine - trainer| of an engine
    known to be right, where one was measured. Fewer than `min_tokens` tokens never give more than "unresolved".

    * "stale": the step is visible, and the engine is significantly (3 standard errors) nearer the previous weights, or
      lacks at least a quarter of the step.
    * "mismatch": neither, yet farther from the new weights than `bound`, or not finite.
    * "new": the step is visible and the engine is significantly (2 standard errors) nearer the new weights; without
      previous weights, within the bound.
    * "unresolved": within the bound, but the step is lost in the noise.
    """
    n_tokens = len(engine)
    away = mean_abs(engine, new)
    if previous is None:
        verdict: Verdict = "mismatch" if not away <= bound else "new" if n_tokens >= min_tokens else "unresolved"
        return _result(verdict, n_tokens, bound, away)
    back, gap = mean_abs(engine, previous), mean_abs(new, previous)
    share, share_error = _stale_share(engine, new, previous)
    if not all(math.isfinite(x) for x in (away, back, gap)):
        return _result("mismatch", n_tokens, bound, away, back=back, gap=gap)
    nearer_new, nearer_error = _mean_and_error([abs(e - p) - abs(e - n) for e, n, p in _rows(engine, new, previous)])
    floor = min(x for x in (noise, bound, away, back) if x is not None)
    visible = gap > floor
    lacks_part = gap >= 2 * floor and share - 3 * share_error >= STALE_SHARE
    if visible and (nearer_new < -3 * nearer_error or lacks_part):
        verdict = "stale"
    elif away > bound:
        verdict = "mismatch"
    elif visible and nearer_new > 2 * nearer_error and n_tokens >= min_tokens:
        verdict = "new"
    else:
        verdict = "unresolved"
    return _result(verdict, n_tokens, bound, away, back=back, gap=gap, share=share)


def mean_abs(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the mean absolute difference of two series of equal length; NaN where one holds NaN."""
    return math.fsum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def _result(
    verdict: Verdict,
    n_tokens: int,
    bound: float,
    away: float,
    *,
    back: float | None = None,
    gap: float | None = None,
    share: float | None = None,
) -> ProbeResult:
    return ProbeResult(
        verdict=verdict,
        mean_abs_new=away,
        mean_abs_previous=back,
        gap=gap,
        stale_share=share,
        n_tokens=n_tokens,
        bound=bound,
    )


def _stale_share(engine: Sequence[float], new: Sequence[float], previous: Sequence[float]) -> tuple[float, float]:
    """Least squares of (e - n) on (p - n): the share and its standard error; (0, inf) where p = n everywhere."""
    step = [p - n for n, p in zip(new, previous, strict=True)]
    rest = [e - n for e, n in zip(engine, new, strict=True)]
    square = math.fsum(s * s for s in step)
    if not square > 0:
        return 0.0, math.inf
    share = math.fsum(r * s for r, s in zip(rest, step, strict=True)) / square
    residual = math.fsum((r - share * s) ** 2 for r, s in zip(rest, step, strict=True))
    return share, math.sqrt(residual / max(len(step) - 1, 1) / square)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (infinite for fewer than two values)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _rows(*series: Sequence[float]) -> list[tuple[float, ...]]:
    return list(zip(*series, strict=True))
