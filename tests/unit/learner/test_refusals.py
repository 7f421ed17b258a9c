"""What makes a learner refuse a step although its numbers are finite, and that it remembers through a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded_runs as recorded

from tracegrad.tracestore.algorithm import RefusalConfig
from tracegrad.tracestore.records import BatchPlan, Reward
from tracegrad.trainer.errors import StepRefused
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.refusals import StepHistory, is_silent
from tracegrad.trainer.samples import Samples, build_batch

MakeLearner = Callable[..., Learner]


def reward(value: float, name: str = "score") -> Reward:
    return Reward(reward_id="r", run_id="run", name=name, value=value, source="test")


@pytest.mark.parametrize(
    ("rewards", "silent"),
    [
        ([[reward(0.0)], [reward(0.0)]], True),
        ([[reward(-1.0)], [reward(-1.0)]], True),
        ([[reward(1.0)], [reward(1.0)]], False),  # all solved
        ([[reward(0.0)], [reward(-0.5)]], False),  # one lost more: something to learn
        ([[reward(0.0), reward(1.0, "format")], [reward(0.0)]], False),
        ([[reward(0.0), reward(-1.0, "length")], [reward(0.0), reward(-1.0, "length")]], True),
    ],
)
def test_silence_is_that_nobody_earned_anything(rewards: list[list[Reward]], silent: bool) -> None:
    assert is_silent(rewards) is silent


def test_an_exploding_norm_is_far_above_the_median_and_above_what_clipping_leaves() -> None:
    config = RefusalConfig(grad_norm_factor=10.0)
    history = StepHistory(grad_norms=(0.1, 0.2, 0.2, 0.3, 5.0))
    history.check_norm(9, 1.9, max_grad_norm=0.1, config=config)
    with pytest.raises(StepRefused, match=r"step 9: the gradient norm is 2.1, in the last 5 steps 0.2 in the median"):
        history.check_norm(9, 2.1, max_grad_norm=0.1, config=config)
    history.check_norm(9, 9.9, max_grad_norm=1.0, config=config)  # a task nearly solved: usual norms are near 0
    with pytest.raises(StepRefused):
        history.check_norm(9, 10.1, max_grad_norm=1.0, config=config)
    history.check_norm(9, 1e9, max_grad_norm=1.0, config=RefusalConfig(grad_norm_factor=None))
    StepHistory(grad_norms=(0.1,) * 4).check_norm(9, 1e9, max_grad_norm=1.0, config=config)  # not enough to judge by


def test_history_is_bounded_and_forgets_zeros_and_broken_streaks() -> None:
    config, history = RefusalConfig(grad_norm_history=5), StepHistory()
    for step, norm in enumerate([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]):
        history = history.after(norm, silent=step != 5, config=config)
    assert history == StepHistory(grad_norms=(2.0, 3.0, 4.0, 5.0, 6.0), silent_steps=1)
    assert StepHistory.from_json(history.as_json()) == history
    assert StepHistory.from_json(None) == StepHistory()


def samples_of(made: Learner, *, rewards: float | None = None) -> Samples:
    traces = recorded.traces_of(recorded.recorded_groups(2, score=made.score))
    if rewards is not None:
        traces = [
            replace(trace, rewards=tuple(replace(each, value=rewards) for each in trace.rewards)) for trace in traces
        ]
    return build_batch(traces, recorded.RULE)


def apply(made: Learner, step: int, samples: Samples) -> Any:
    return made.step(BatchPlan(step=step, epoch=0, seed=step, run_ids=("r",)), samples, version_id=1)


def test_a_streak_without_reward_stops_the_job_also_across_a_restart(learner: MakeLearner, tmp_path: Path) -> None:
    settings = {"algorithm": {"refuse": {"silent_steps": 3}}}
    made = learner(**settings)
    for step in (1, 2):
        assert apply(made, step, samples_of(made, rewards=0.0)).metrics["silent_steps"] == step
    saved = made.save(str(tmp_path / "root"), 2).checkpoint
    resumed = learner(**settings)
    resumed.load(saved.path, saved.hash)
    with pytest.raises(StepRefused, match=r"step 3: no run has earned anything for 3 steps.*silent_steps to null"):
        apply(resumed, 3, samples_of(resumed, rewards=0.0))
    assert apply(resumed, 3, samples_of(resumed)).metrics["silent_steps"] == 0


@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_exploding_gradient_is_refused_and_nothing_moves(learner: MakeLearner, minibatches: int) -> None:
    made = learner(
        algorithm={"credit": {"normalise": "off"}, "refuse": {"grad_norm_factor": 50.0}},
        optimizer={"minibatches": minibatches, "lr": 1e-4, "critic_lr": 1e-4},
    )
    usual = samples_of(made)
    for step in range(1, 6):
        apply(made, step, usual)
    before = {name: tensor.clone() for name, tensor in made.policy.lm_state().items()}
    with pytest.raises(StepRefused, match="the loss explodes"):
        apply(made, 6, samples_of(made, rewards=1e6))
    assert all(bool((tensor == before[name]).all()) for name, tensor in made.policy.lm_state().items())
    apply(made, 6, usual)
