"""The probe's verdicts, on numbers small enough to check by hand and on simulated engines."""

import math
import random

import pytest

from tracegrad.trainer.probe import ProbeSequence, ProbeSet, judge

N = 600


def series(seed: int, scale: float) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(0, scale) for _ in range(N)]


def plus(*parts: list[float]) -> list[float]:
    return [sum(values) for values in zip(*parts, strict=True)]


NEW = [-1.0 + x for x in series(0, 0.5)]
STEP = series(1, 0.1)
PREVIOUS = plus(NEW, STEP)


def test_the_means_are_what_the_arithmetic_says() -> None:
    # |e-n| = .01, .03 -> .02; |e-p| = .21, .17 -> .19; |n-p| = .2, .2 -> .2
    result = judge([-1.01, -1.97], [-1.0, -2.0], [-0.8, -1.8], 0.05)
    assert result.mean_abs_new == pytest.approx(0.02)
    assert result.mean_abs_previous == pytest.approx(0.19)
    assert result.gap == pytest.approx(0.2)
    # least squares of (-.01, .03) on (.2, .2): (-.002 + .006) / .08 = .05
    assert result.stale_share == pytest.approx(0.05)
    assert result.n_tokens == 2


@pytest.mark.parametrize(
    ("engine", "noise", "verdict"),
    [
        (plus(NEW, series(2, 0.01)), None, "new"),
        (plus(PREVIOUS, series(2, 0.01)), None, "stale"),
        # an engine that lacks 45 % of the step, nearer new than previous: seen once its noise is known
        (plus(NEW, [0.45 * s for s in STEP], series(2, 0.001)), 0.001, "stale"),
        # wrong by a constant, which is no part of the step
        (plus(NEW, [0.5] * N), None, "mismatch"),
    ],
    ids=["right", "old weights", "half-stale head", "other weights"],
)
def test_verdicts(engine: list[float], noise: float | None, verdict: str) -> None:
    assert judge(engine, NEW, PREVIOUS, 0.05, noise=noise).verdict == verdict


def test_a_half_stale_head_over_the_bound_is_stale_even_before_the_noise_is_known() -> None:
    step = series(1, 0.5)
    engine = plus(NEW, [0.45 * s for s in step], series(2, 0.01))
    assert judge(engine, NEW, plus(NEW, step), 0.05).verdict == "stale"


def test_a_step_below_the_noise_is_unresolved_never_a_false_alarm() -> None:
    # bf16-like: the noise (0.03) drowns the step (0.003)
    seen = set()
    for seed in range(40):
        tiny_step = series(seed + 1000, 0.003)
        seen.add(judge(plus(NEW, series(seed, 0.03)), NEW, plus(NEW, tiny_step), 0.05).verdict)
    assert seen == {"unresolved"}


def test_near_the_noise_a_right_engine_is_never_called_stale() -> None:
    # trainer and engine noise of 0.02 each, a true step of the same size: the hard case
    verdicts = []
    for seed in range(40):
        truth, moved = NEW, plus(NEW, series(seed + 5000, 0.02))
        engine = plus(truth, series(seed, 0.02))
        new, previous = plus(truth, series(seed + 1000, 0.02)), plus(moved, series(seed + 2000, 0.02))
        verdicts.append(judge(engine, new, previous, 0.05, noise=0.0226).verdict)
    assert "stale" not in verdicts
    assert "mismatch" not in verdicts


def test_equal_weights_are_unresolved() -> None:
    assert judge(NEW, NEW, NEW, 0.05).verdict == "unresolved"


def test_too_few_tokens_are_unresolved_but_still_caught_when_wrong() -> None:
    right = plus(NEW, series(2, 0.001))
    assert judge(right, NEW, PREVIOUS, 0.05, min_tokens=N + 1).verdict == "unresolved"
    assert judge(PREVIOUS, NEW, PREVIOUS, 0.05, min_tokens=N + 1).verdict == "stale"


def test_without_previous_weights_only_the_bound_judges() -> None:
    assert judge([-1.0], [-1.04], None, 0.05).verdict == "new"
    assert judge([-1.0], [-1.06], None, 0.05).verdict == "mismatch"


def test_nan_is_a_mismatch() -> None:
    assert judge([math.nan, -1.0], [-1.0, -1.0], [-2.0, -2.0], 0.05).verdict == "mismatch"
    assert judge([math.nan, -1.0], [-1.0, -1.0], None, 0.05).verdict == "mismatch"
    assert judge([math.nan, -1.0], [-1.0, -1.0], None, 0.05).as_json()["mean_abs_new"] is None


def test_a_probe_refuses_series_that_do_not_fit() -> None:
    sequence = ProbeSequence(ids=(1, 2, 3), n_prompt=1)
    with pytest.raises(ValueError, match="one value for each"):
        ProbeSet(sequences=(sequence,), new_logprobs=((-1.0,),))
    with pytest.raises(ValueError, match="a prompt"):
        ProbeSet(sequences=(ProbeSequence(ids=(1, 2), n_prompt=0),), new_logprobs=((-1.0, -1.0),))


def test_sequences_too_long_for_the_engine_are_left_out() -> None:
    short, long = ProbeSequence(ids=(1, 2, 3), n_prompt=1), ProbeSequence(ids=(1, 2, 3, 4), n_prompt=2)
    probe = ProbeSet(sequences=(long, short), new_logprobs=((-1.0, -2.0), (-3.0, -4.0)))
    assert probe.fitting(4).sequences == (short,)
    assert probe.fitting(4).new_logprobs == ((-3.0, -4.0),)
    assert probe.fitting(5) is probe
