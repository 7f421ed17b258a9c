"""What a reward function may return; bootstrap intervals against closed forms; schedules and ids."""

import math
import random
from collections import Counter
from typing import Any

import pytest

from tracegrad.adapters.rollout_errors import RewardShapeError
from tracegrad.adapters.schedule import planned_groups, run_id, stable_id
from tracegrad.adapters.scoring import RewardSpec, read_rewards, run_scores
from tracegrad.tracestore.bootstrap import bootstrap_difference, bootstrap_mean, quantile
from tracegrad.tracestore.records import Task


@pytest.mark.parametrize(
    ("result", "scores"),
    [
        (0.5, {"reward": 0.5}),
        (True, {"reward": 1.0}),
        (None, {}),
        ({"f1": 0.25, "em": 0}, {"f1": 0.25, "em": 0.0}),
        (
            [{"name": "plan", "value": 1, "role": "planner"}, RewardSpec(name="f1", value=2.0)],
            {"planner:plan": 1.0, "f1": 2.0},
        ),
        ([RewardSpec(name="f1", value=2.0), RewardSpec(name="f1", value=1.0, call_id="c1")], {"f1": 2.0}),
    ],
)
def test_what_counts_as_a_reward(result: Any, scores: dict[str, float]) -> None:
    assert run_scores(read_rewards(result)) == scores


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ("0.5", "returned a str"),
        (math.nan, "finite"),
        ({"f1": math.inf}, "'f1' is inf"),
        ({"f1": None}, "'f1' is None"),
        ([{"name": "f1"}], "not a RewardSpec"),
        ([{"name": "f1", "value": 1, "rol": "x"}], "not a RewardSpec"),
        ([RewardSpec(name="f1", value=1.0), RewardSpec(name="f1", value=2.0)], "'f1' twice"),
        ([{"name": "f1", "value": 1, "call_id": "c"}, {"name": "f1", "value": 2, "call_id": "c"}], "on call 'c' twice"),
        ([RewardSpec(name="f1", value=1.0, role="x", call_id="c")], "name one target"),
        ([RewardSpec(name="f1", value=1.0, call_id="")], "not the id of a call"),
    ],
)
def test_what_is_refused(result: Any, says: str) -> None:
    with pytest.raises(RewardShapeError, match=says):
        read_rewards(result)


def test_the_interval_of_two_values_is_exact() -> None:
    # Means of two draws from {0, 1}: 0 with 1/4, 1/2 with 1/2, 1 with 1/4. The 2.5 % tails are 0 and 1, the
    # quartile range (level 0.4: tails of 30 %) is [1/2, 1/2].
    wide = bootstrap_mean([0.0, 1.0])
    assert (wide.mean, wide.low, wide.high, wide.n) == (0.5, 0.0, 1.0, 2)
    narrow = bootstrap_mean([0.0, 1.0], level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_a_large_sample_agrees_with_the_normal_interval() -> None:
    # 100 zeros and 100 ones: the resampled mean has standard deviation sqrt(0.25 / 200) = 0.035355; 1.96 of it
    # is 0.0693. Monte Carlo error of a 2.5 % quantile with 10,000 resamples is about 0.001; the grid is 0.005.
    interval = bootstrap_mean([0.0] * 100 + [1.0] * 100)
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.5 - 0.0693, abs=0.006)
    assert interval.high == pytest.approx(0.5 + 0.0693, abs=0.006)


def test_pairs_are_resampled_together() -> None:
    # after = before + 0.1 for every task: however wild the tasks, the difference has no spread at all.
    draw = random.Random(3)
    before = [draw.random() for _ in range(50)]
    interval = bootstrap_difference([value + 0.1 for value in before], before)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="equal lengths"):
        bootstrap_difference([1.0], [1.0, 2.0])


def test_the_interval_is_the_seeds() -> None:
    draw = random.Random(1)
    values = [draw.random() for _ in range(20)]
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)
    assert quantile([0.0, 10.0, 20.0, 40.0], 0.5) == 15.0
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_mean([])


def test_each_pass_takes_every_task_once_in_an_order_of_its_own() -> None:
    tasks = [Task(task_id=f"t{i}", input={}) for i in range(10)]
    plan = list(planned_groups("exp", tasks, seed=1, groups=25))
    passes = [[group.task.task_id for group in plan if group.pass_index == p] for p in range(3)]
    assert [len(p) for p in passes] == [10, 10, 5]
    assert Counter(passes[0]) == Counter(passes[1]) == Counter({f"t{i}": 1 for i in range(10)})
    assert passes[0] != passes[1]
    assert plan == list(planned_groups("exp", tasks, seed=1, groups=25))
    assert [g.task for g in planned_groups("exp", tasks, seed=2, groups=25)] != [group.task for group in plan]
    assert len({group.group_id for group in plan}) == 25


def test_ids_depend_on_every_part_and_on_their_boundaries() -> None:
    assert run_id("a", "t", 0, 1) == run_id("a", "t", 0, 1)
    ids = [
        run_id("a", "t", 0, 1),
        run_id("b", "t", 0, 1),
        run_id("a", "u", 0, 1),
        run_id("a", "t", 1, 1),
        run_id("a", "t", 0, 2),
    ]
    assert len(set(ids)) == 5
    assert stable_id("x", "ab", "c") != stable_id("x", "a", "bc")
