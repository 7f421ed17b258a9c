"""Credit: golden numbers with their arithmetic, naive twins, and the isolation of roles and calls."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegrad.tracestore.records import Reward
from tracegrad.trainer.credit import (
    behaviour_logprobs,
    choice_returns,
    gae_advantages,
    group_advantages,
    normalise,
    run_returns,
    spread,
    token_starts,
)
from tracegrad.trainer.errors import BatchError, SampleError
from tracegrad.trainer.samples import Turn


def reward(run_id, value, name="f1", **target):
    return Reward(reward_id=f"{run_id}{name}{target}", run_id=run_id, name=name, value=value, source="t", **target)


# -- returns


def test_a_return_is_the_weighted_sum_of_what_reaches_the_choice(make_choice):
    choices = [make_choice(call_id="c1", role="planner"), make_choice(call_id="c2", role="writer")]
    rewards = {
        "run_a": (
            reward("run_a", 1.0),
            reward("run_a", 0.5, "format", role="planner"),
            reward("run_a", 0.25, "length", call_id="c2", role="writer"),
        )
    }
    assert choice_returns(choices, rewards).tolist() == [1.0 + 0.5, 1.0 + 0.25]
    weighted = choice_returns(choices, rewards, {"f1": 2.0, "format": -1.0})
    assert weighted.tolist() == [2.0 * 1.0 - 1.0 * 0.5, 2.0 * 1.0]
    assert run_returns(rewards, {"f1": 2.0}) == {"run_a": 2.0}


def test_changing_one_roles_reward_changes_no_other_role(make_choice):
    choices = [
        make_choice(run_id=run, call_id=f"{run}{role}", role=role) for run in ("r1", "r2", "r3") for role in ("p", "w")
    ]

    def advantages(writer_rewards):
        rewards = {
            run: (reward(run, own), reward(run, extra, "style", role="w"))
            for run, own, extra in zip(("r1", "r2", "r3"), (0.0, 1.0, 0.5), writer_rewards, strict=True)
        }
        groups = dict.fromkeys(rewards, "group_1")
        returns_B = choice_returns(choices, rewards)
        return group_advantages(choices, returns_B, run_returns(rewards), groups).advantages_B

    before, after = advantages((0.0, 0.0, 0.0)), advantages((5.0, -3.0, 1.0))
    planner, writer = slice(0, None, 2), slice(1, None, 2)
    assert before[planner].tolist() == after[planner].tolist()
    assert before[writer].tolist() != after[writer].tolist()


def test_a_choice_that_no_reward_reaches_has_no_return(make_choice):
    with pytest.raises(SampleError, match="call_1"):
        choice_returns([make_choice(role="writer")], {"run_a": (reward("run_a", 1.0, role="planner"),)})
    assert run_returns({"run_a": (reward("run_a", 1.0, role="planner"),)}) == {}


# -- group advantages


def advantages_of(choices, values, *, std=False, cell="turn", run_level=None):
    runs = {c.run_id: c.group_key for c in choices}
    return group_advantages(choices, np.array(values), run_level or {}, runs, normalise_std=std, cell=cell)


def test_group_advantages_are_over_runs_not_over_calls(make_choice):
    # run a has three choices in the cell (returns 1, 2, 6: its mean is 3), run b has one (return 1).
    # Over runs the mean is (3 + 1) / 2 = 2 (over choices it would be 10 / 4 = 2.5).
    choices = [make_choice(run_id="a", choice_index=i) for i in range(3)] + [make_choice(run_id="b")]
    result = advantages_of(choices, [1.0, 2.0, 6.0, 1.0])
    assert result.advantages_B.tolist() == [-1.0, 0.0, 4.0, -1.0]
    assert (result.n_cells, result.n_single_cells, result.n_zero_variance, result.n_lone_runs) == (1, 0, 0, 0)


def test_group_advantages_divide_by_the_sample_deviation(make_choice):
    choices = [make_choice(run_id=run) for run in "abc"]
    # mean 1; deviations -1, 0, 1; sample variance (1 + 0 + 1) / 2 = 1, so std = 1.
    result = advantages_of(choices, [0.0, 1.0, 2.0], std=True)
    np.testing.assert_allclose(result.advantages_B, [-1 / (1 + 1e-6), 0.0, 1 / (1 + 1e-6)], rtol=0, atol=1e-15)


def test_a_group_without_variance_teaches_nothing_and_is_counted(make_choice):
    choices = [make_choice(run_id=run, group_id=group) for group in ("g1", "g2") for run in (group + "a", group + "b")]
    result = advantages_of(choices, [0.1, 0.1, 0.0, 1.0], std=True)
    assert result.advantages_B[:2].tolist() == [0.0, 0.0]
    assert result.n_zero_variance == 1


def test_a_cell_of_one_run_falls_back_to_the_run_level(make_choice):
    loop = Turn(superstep=5, path="plan")
    choices = [
        make_choice(run_id="a"),
        make_choice(run_id="b"),
        make_choice(run_id="c"),
        make_choice(run_id="c", call_id="again", turn=loop),
    ]
    # Only run c came to superstep 5. Its call's return (9, with a call reward) does not count there: the run's own
    # reward does: runs 0, 1, 2 have mean 1, so run c is at 2 - 1 = 1.
    result = advantages_of(choices, [0.0, 1.0, 2.0, 9.0], run_level={"a": 0.0, "b": 1.0, "c": 2.0})
    assert result.advantages_B.tolist() == [-1.0, 0.0, 1.0, 1.0]
    assert (result.n_cells, result.n_single_cells) == (1, 1)
    by_role = advantages_of(choices, [0.0, 1.0, 2.0, 4.0], cell="role")
    # One cell: run c contributes (2 + 4) / 2 = 3 once; the mean is (0 + 1 + 3) / 3 = 4/3.
    np.testing.assert_allclose(by_role.advantages_B, [-4 / 3, -1 / 3, 2 / 3, 8 / 3])
    assert by_role.n_single_cells == 0


def test_a_run_with_nobody_to_compare_with_gets_nothing(make_choice):
    result = advantages_of([make_choice(run_id="live", group_id=None)], [1.0], run_level={"live": 1.0})
    assert result.advantages_B.tolist() == [0.0]
    assert (result.n_lone_runs, result.n_single_cells, result.n_zero_variance) == (1, 1, 0)


def test_runs_without_a_trainable_choice_still_count_in_the_groups_statistics(make_choice):
    choices = [make_choice(run_id="a", turn=Turn(superstep=9))]
    groups = {"a": "group_1", "b": "group_1"}
    result = group_advantages(choices, np.array([1.0]), {"a": 1.0, "b": 0.0}, groups, normalise_std=False)
    assert result.advantages_B.tolist() == [0.5]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("xy"), st.sampled_from("abc"), st.sampled_from("pw"), st.floats(-2, 2, width=16)),
        min_size=1,
        max_size=20,
    )
)
def test_group_advantages_equal_the_naive_ones(make_choice, rows):
    choices = [make_choice(group_id=g, run_id=g + r, role=role) for g, r, role, _ in rows]
    values = [v for *_, v in rows]
    run_level = {g + r: float(ord(r)) for g, r, *_ in rows}
    result = advantages_of(choices, values, std=True, run_level=run_level)
    for i, (g, r, role, own_value) in enumerate(rows):
        value = own_value
        means = {}
        for run in {(g2, r2) for g2, r2, role2, _ in rows if (g2, role2) == (g, role)}:
            own = [v for g2, r2, role2, v in rows if (g2, r2, role2) == (*run, role)]
            means[run] = sum(own) / len(own)
        if len(means) < 2:
            means = {(g2, r2): float(ord(r2)) for g2, r2, *_ in rows if g2 == g}
            value = float(ord(r))
        mean = sum(means.values()) / len(means)
        variance = sum((m - mean) ** 2 for m in means.values()) / (len(means) - 1) if len(means) > 1 else 0.0
        expected = 0.0 if max(means.values()) == min(means.values()) else (value - mean) / (math.sqrt(variance) + 1e-6)
        assert result.advantages_B[i] == pytest.approx(expected, rel=1e-9, abs=1e-9)


# -- GAE


def test_gae_golden_numbers():
    # One call of three tokens, return 1, V = (0.5, 0.25, 0.5), gamma 0.5, lambda 0.5 (all exact in binary).
    # delta_2 = 1 - 0.5 = 0.5;              A_2 = 0.5
    # delta_1 = 0.5 * 0.5 - 0.25 = 0;       A_1 = 0 + 0.25 * 0.5 = 0.125
    # delta_0 = 0.5 * 0.25 - 0.5 = -0.375;  A_0 = -0.375 + 0.25 * 0.125 = -0.34375
    # A second call of one token, return -2, V = 1: A = -3.
    starts = np.array([0, 3, 4])
    result = gae_advantages(np.array([1.0, -2.0]), np.array([0.5, 0.25, 0.5, 1.0]), starts, gamma=0.5, gae_lambda=0.5)
    assert result.advantages_N.tolist() == [-0.34375, 0.125, 0.5, -3.0]
    assert result.targets_N.tolist() == [-0.34375 + 0.5, 0.125 + 0.25, 0.5 + 0.5, -3.0 + 1.0]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 1000),
)
def test_gae_equals_the_sum_of_discounted_deltas(lengths, gamma, lam, seed):
    """Twin: A_t = sum over l of (gamma lambda)^l delta_{t+l}, written out per call."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    returns, values = rng.normal(size=len(lengths)), rng.normal(size=starts[-1])
    result = gae_advantages(returns, values, starts, gamma=gamma, gae_lambda=lam)
    for call, length in enumerate(lengths):
        v = [*values[starts[call] : starts[call + 1]], 0.0]
        r = [0.0] * (length - 1) + [returns[call]]
        for t in range(length):
            expected = sum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(length - t))
            assert result.advantages_N[starts[call] + t] == pytest.approx(expected, abs=1e-12)


def test_gae_with_lambda_one_and_no_discount_is_return_minus_value():
    values = np.array([0.3, -0.1, 0.7])
    result = gae_advantages(np.array([2.0]), values, np.array([0, 3]), gamma=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(result.advantages_N, 2.0 - values)
    np.testing.assert_allclose(result.targets_N, [2.0, 2.0, 2.0])


def test_gae_refuses_lengths_that_disagree():
    with pytest.raises(BatchError, match="do not fit"):
        gae_advantages(np.array([1.0]), np.array([0.0, 0.0]), np.array([0, 3]), gamma=1.0, gae_lambda=1.0)


# -- flat arrays


def test_normalised_advantages_have_mean_zero_and_deviation_one():
    # mean 2, sample variance (1 + 0 + 1) / 2 = 1
    np.testing.assert_allclose(normalise(np.array([1.0, 2.0, 3.0])), np.array([-1.0, 0.0, 1.0]) / (1 + 1e-6))
    assert normalise(np.array([0.1, 0.1])).tolist() == [0.0, 0.0]
    assert normalise(np.zeros(0)).tolist() == []


def test_flat_arrays_lay_choices_one_after_another(make_choice):
    choices = [make_choice(tokens=(1, 2)), make_choice(tokens=(3,)), make_choice(tokens=(4, 5, 6))]
    starts = token_starts(choices)
    assert starts.tolist() == [0, 2, 3, 6]
    assert spread(np.array([1.0, 2.0, 3.0]), starts).tolist() == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    np.testing.assert_allclose(behaviour_logprobs(choices), [-0.5, -0.6, -0.5, -0.5, -0.6, -0.7])
