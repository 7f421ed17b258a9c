"""Group-relative advantages: the published rules with their arithmetic, cells of one run, and a naive twin."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegrad.trainer.comparison import Counts, compare
from tracegrad.trainer.errors import BatchError
from tracegrad.trainer.samples import Turn


def advantages_of(choices, values, rule="dr_grpo", *, cell="turn", run_level=None):
    runs = {c.run_id: c.group_key for c in choices}
    return compare(choices, np.array(values), run_level or {}, runs, rule=rule, cell=cell)


def test_group_advantages_are_over_runs_not_over_calls(make_choice):
    # run a has three choices in the cell (returns 1, 2, 6: its mean is 3), run b has one (return 1).
    # Over runs the mean is (3 + 1) / 2 = 2 (over choices it would be 10 / 4 = 2.5).
    choices = [make_choice(run_id="a", choice_index=i) for i in range(3)] + [make_choice(run_id="b")]
    result = advantages_of(choices, [1.0, 2.0, 6.0, 1.0])
    assert result.advantages_B.tolist() == [-1.0, 0.0, 4.0, -1.0]
    assert result.counts == Counts(n_cells=1)


def test_group_advantages_divide_by_the_sample_deviation(make_choice):
    choices = [make_choice(run_id=run) for run in "abc"]
    # mean 1; deviations -1, 0, 1; sample variance (1 + 0 + 1) / 2 = 1, so std = 1.
    result = advantages_of(choices, [0.0, 1.0, 2.0], rule="grpo")
    np.testing.assert_allclose(result.advantages_B, [-1 / (1 + 1e-6), 0.0, 1 / (1 + 1e-6)], rtol=0, atol=1e-15)


def test_a_group_without_variance_teaches_nothing_and_is_counted(make_choice):
    choices = [make_choice(run_id=run, group_id=group) for group in ("g1", "g2") for run in (group + "a", group + "b")]
    result = advantages_of(choices, [0.1, 0.1, 0.0, 1.0], rule="grpo")
    assert result.advantages_B[:2].tolist() == [0.0, 0.0]
    assert result.counts.n_zero_variance == 1


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
    assert result.counts == Counts(n_cells=1, n_single_cells=1)
    by_role = advantages_of(choices, [0.0, 1.0, 2.0, 4.0], cell="role")
    # One cell: run c contributes (2 + 4) / 2 = 3 once; the mean is (0 + 1 + 3) / 3 = 4/3.
    np.testing.assert_allclose(by_role.advantages_B, [-4 / 3, -1 / 3, 2 / 3, 8 / 3])
    assert by_role.counts == Counts(n_cells=1)


@pytest.mark.parametrize(
    ("rule", "run_level"),
    [
        # Runs 0, 1, 2: run c is at 2 - 1 = 1; by the deviation, sqrt((1 + 0 + 1) / 2) = 1, the same; 2 - (0 + 1) / 2.
        ("dr_grpo", 1.0),
        ("grpo", 1 / (1 + 1e-6)),
        ("rloo", 1.5),
        ("reinforce++-baseline", 1.0),
    ],
)
def test_a_penalty_is_felt_where_there_is_nothing_to_compare_it_with(make_choice, rule, run_level):
    # Penalties of a's, b's and c's choices in the common cell -1, -1, -2.5, so returns -1, 0, -0.5 (mean -0.5; the
    # others of c: -0.5); of c's choice alone in its cell -0.25, of a run without a group -0.75, of one in a group whose
    # runs all earned 1: -0.5.
    alone = {"call_id": "again", "turn": Turn(superstep=5, path="plan")}
    choices = [
        *(make_choice(run_id=run) for run in "abc"),
        make_choice(run_id="c", **alone),
        make_choice(run_id="live", group_id=None),
        make_choice(run_id="x", group_id="equal", **alone),
    ]
    groups = {c.run_id: c.group_key for c in choices} | {"y": "equal"}
    level = {"a": 0.0, "b": 1.0, "c": 2.0, "live": 1.0, "x": 1.0, "y": 1.0}
    penalties = np.array([-1.0, -1.0, -2.5, -0.25, -0.75, -0.5])
    returns = penalties + [level[choice.run_id] for choice in choices]
    found = compare(choices, returns, level, groups, rule=rule, penalties_B=penalties)
    np.testing.assert_allclose(found.advantages_B[2:], [0.0, run_level - 0.25, -0.75, -0.5], atol=1e-15)
    assert found.counts == Counts(n_cells=1, n_single_cells=3, n_zero_variance=1, n_lone_runs=1)
    without = compare(choices, returns, level, groups, rule=rule)
    np.testing.assert_allclose(without.advantages_B[2:], [0.0, run_level, 0.0, 0.0], atol=1e-15)
    with pytest.raises(BatchError, match="penalties do not fit"):
        compare(choices, returns, level, groups, rule=rule, penalties_B=penalties[:1])


def test_a_run_with_nobody_to_compare_with_gets_nothing(make_choice):
    result = advantages_of([make_choice(run_id="live", group_id=None)], [1.0], run_level={"live": 1.0})
    assert result.advantages_B.tolist() == [0.0]
    assert result.counts == Counts(n_single_cells=1, n_lone_runs=1)


def test_runs_without_a_trainable_choice_still_count_in_the_groups_statistics(make_choice):
    choices = [make_choice(run_id="a", turn=Turn(superstep=9))]
    groups = {"a": "group_1", "b": "group_1"}
    result = compare(choices, np.array([1.0]), {"a": 1.0, "b": 0.0}, groups, rule="dr_grpo")
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
    result = advantages_of(choices, values, rule="grpo", run_level=run_level)
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


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Runs 0, 1, 5: mean 2, deviations -2, -1, 3, sample variance (4 + 1 + 9) / 2 = 7.
        ("grpo", [-2 / (math.sqrt(7) + 1e-6), -1 / (math.sqrt(7) + 1e-6), 3 / (math.sqrt(7) + 1e-6)]),
        ("dr_grpo", [-2, -1, 3]),
        # Against the mean of the others: 0 - (1 + 5) / 2, 1 - (0 + 5) / 2, 5 - (0 + 1) / 2.
        ("rloo", [-3, -1.5, 4.5]),
        ("reinforce++-baseline", [-2, -1, 3]),
        ("reinforce++", [0, 1, 5]),
    ],
)
def test_the_published_rules(make_choice, rule, expected):
    choices = [make_choice(run_id=run) for run in "abc"]
    np.testing.assert_allclose(advantages_of(choices, [0.0, 1.0, 5.0], rule).advantages_B, expected, atol=1e-15)


def test_leaving_one_out_leaves_out_the_run_not_the_choice(make_choice):
    # Run a has two choices (1 and 3), b one (4), c one (0): a's are compared with (4 + 0) / 2 = 2, b's with
    # (2 + 0) / 2 = 1, c's with (2 + 4) / 2 = 3.
    choices = [make_choice(run_id=run, choice_index=i) for i, run in enumerate("aabc")]
    assert advantages_of(choices, [1.0, 3.0, 4.0, 0.0], "rloo").advantages_B.tolist() == [-1.0, 1.0, 3.0, -3.0]


def test_the_counts_of_each_role(make_choice):
    """Two groups of two runs. The planner's returns vary in one group; the writer ran once in each."""
    choices, values = [], []
    for group, planner in (("g1", (0.0, 1.0)), ("g2", (1.0, 1.0))):
        for member, value in enumerate(planner):
            choices.append(make_choice(run_id=f"{group}{member}", group_id=group))
            values.append(value)
        choices.append(make_choice(run_id=f"{group}0", group_id=group, role="writer"))
        values.append(5.0)
    result = advantages_of(choices, values)
    assert result.roles["planner"] == Counts(n_cells=2, n_zero_variance=1)
    assert result.roles["writer"] == Counts(n_single_cells=2, n_lone_runs=2)
    assert result.counts == Counts(n_cells=2, n_single_cells=2, n_zero_variance=1, n_lone_runs=2)


@pytest.mark.parametrize("rule", ["grpo", "dr_grpo", "rloo", "reinforce++-baseline"])
def test_the_order_of_the_choices_does_not_matter(make_choice, rule):
    choices = [
        make_choice(run_id=run, role=role, choice_index=i)
        for i, (run, role) in enumerate(zip("aabbcc", "pwpwpp", strict=True))
    ]
    values = [0.5, 2.0, 1.25, -1.0, 0.75, 3.0]
    forward = advantages_of(choices, values, rule, run_level={"a": 1.0, "b": 0.0}).advantages_B
    backward = advantages_of(choices[::-1], values[::-1], rule, run_level={"b": 0.0, "a": 1.0}).advantages_B
    np.testing.assert_allclose(forward, backward[::-1], rtol=1e-14)


def test_returns_and_choices_must_fit(make_choice):
    with pytest.raises(BatchError, match="do not fit"):
        advantages_of([make_choice()], [1.0, 2.0])
