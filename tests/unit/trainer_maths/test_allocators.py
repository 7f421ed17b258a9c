"""Allocators: the published rules as tables, with the arithmetic in them."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracegrad.tracestore.records import Reward
from tracegrad.trainer.allocators import (
    deltas,
    discounted,
    group_relative,
    iterative_search,
    next_deltas,
    reflective_code,
    role_turns,
    shared,
    with_format,
)
from tracegrad.trainer.errors import SampleError
from tracegrad.trainer.returns import ScopedGraph, atoms_of, call_returns
from tracegrad.trainer.run_graph import run_graph


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (False, {"rewriter": 0.75, "reader": 0.75, "writer": 0.75}),
        (True, {"rewriter": 0.25, "reader": 0.25, "writer": 0.25}),
    ],
)
def test_an_outcome_is_shared_in_full_or_split(split, expected):
    assert shared(0.75, ["rewriter", "reader", "writer"], split=split) == expected


@pytest.mark.parametrize("members", [[], ["a", "a"]])
def test_an_outcome_needs_members(members):
    with pytest.raises(SampleError, match="each once"):
        shared(1.0, members)


@pytest.mark.parametrize(
    ("scores", "before", "expected", "following"),
    [
        ([], 0.0, [], []),
        ([0.5], 0.0, [0.5], [None]),
        # 0.25 - 0, 0.75 - 0.25, 0.5 - 0.75; and the same one turn later.
        ([0.25, 0.75, 0.5], 0.0, [0.25, 0.5, -0.25], [0.5, -0.25, None]),
        ([0.25, 0.75, 0.5], 0.5, [-0.25, 0.5, -0.25], [0.5, -0.25, None]),
    ],
)
def test_a_turn_gets_what_it_added(scores, before, expected, following):
    assert deltas(scores, before) == expected
    assert next_deltas(scores) == following


@given(st.lists(st.integers(-64, 64), min_size=1, max_size=8))
def test_deltas_sum_up_to_the_outcome(scores):
    assert sum(deltas([score / 64 for score in scores])) == scores[-1] / 64


@pytest.mark.parametrize(
    ("reward", "keeps_format", "weight", "expected"),
    [(0.5, True, 0.25, 0.5), (0.5, False, 0.25, 0.25), (0.0, False, 1.0, -1.0), (0.5, False, 0.0, 0.5)],
)
def test_a_format_term_takes_its_weight_off(reward, keeps_format, weight, expected):
    assert with_format(reward, keeps_format, weight) == expected


def test_a_group_is_compared_with_its_mean():
    assert group_relative({"a": 0.0, "b": 1.0, "c": 0.5}) == {"a": -0.5, "b": 0.5, "c": 0.0}
    assert group_relative({}) == {}


@pytest.mark.parametrize(
    ("answers", "plan", "expected"),
    [
        ([], None, []),
        ([0.5], 0.25, [{"plan": 0.25, "answer": 0.5}]),
        # Turn 1 raises F1 from 0.5 to 0.75, turn 2 lowers it to 0.25, turn 3 ends the search.
        (
            [0.5, 0.75, 0.25, None],
            0.25,
            [
                {"plan": 0.25, "answer": 0.5},
                {"search": 0.25, "summary": 0.25, "update": 0.25, "answer": 0.75},
                {"search": -0.5, "summary": -0.5, "update": -0.5, "answer": 0.25},
                {"search": 0.0},
            ],
        ),
        # Nothing was answered before the first search: its delta is against nothing.
        ([None, 0.5], None, [{}, {"search": 0.5, "summary": 0.5, "update": 0.5, "answer": 0.5}]),
    ],
)
def test_iterative_search_as_published(answers, plan, expected):
    assert iterative_search(answers, plan) == expected


@pytest.mark.parametrize(
    ("pass_rates", "expected"),
    [
        ([], []),
        ([1.0], [{"planner": 1.0, "coder": 1.0}]),
        (
            [0.25, 0.75, 0.5],
            [
                {"planner": 0.25, "coder": 0.25, "reflector": 0.5},
                {"planner": 0.5, "coder": 0.5, "reflector": -0.25},
                {"planner": -0.25, "coder": -0.25},
            ],
        ),
    ],
)
def test_reflective_code_as_published(pass_rates, expected):
    assert reflective_code(pass_rates) == expected


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        # a feeds b and c, both feed d. Rewards: b 2, d 8, c none.
        (1.0, {"a": 10.0, "b": 10.0, "c": 8.0, "d": 8.0}),
        # a: 2 / 2 + 8 / 4 (d once, two steps away); b: 2 + 8 / 2; c: 8 / 2.
        (0.5, {"a": 3.0, "b": 6.0, "c": 4.0, "d": 8.0}),
        (0.0, {"a": 0.0, "b": 2.0, "c": 0.0, "d": 8.0}),
    ],
)
def test_rewards_go_back_through_the_graph_once_each(gamma, expected):
    parents = {"b": ["a"], "c": ["a"], "d": ["b", "c"]}
    steps = {"a": None, "b": 2.0, "c": None, "d": 8.0, "alone": None}
    assert discounted(steps, parents, gamma) == expected


def test_a_graph_that_is_none_is_refused():
    with pytest.raises(SampleError, match="feeds itself"):
        discounted({"a": 1.0, "b": 1.0}, {"a": ["b"], "b": ["a"]}, 1.0)
    with pytest.raises(SampleError, match="names b"):
        discounted({"a": 1.0}, {"a": ["b"]}, 1.0)


def test_the_turns_of_a_role_are_in_the_order_of_the_graph(make_call, make_trace):
    """The loop ran twice; its second turn made two calls. The calls arrive in any order."""
    spans = {step: make_call("x", superstep=step, namespace=f"code:{step}").attribution.span for step in (1, 2)}

    def call(call_id, step, at):
        made = make_call(call_id, role="coder")
        timing = replace(made.timing, dispatched_at=at, completed_at=at + 1)
        span = replace(spans[step], span_id=f"step {step}")
        return replace(made, timing=timing, attribution=replace(made.attribution, span=span))

    calls = [call("late", 2, 5.0), call("first", 1, 1.0), call("later", 2, 7.0), make_call("who", role=None)]
    assert role_turns(make_trace(calls=calls)) == {"coder": [("first",), ("late", "later")]}


@pytest.mark.parametrize(
    ("post", "planner", "searches"),
    [
        # In full on each of the four calls: four rewards of 1, so 1 for each search and 1 + 1 + 1 + 1 for the planner.
        (lambda turn: shared(1.0, turn), 4.0, [1.0, 1.0, 1.0, 1.0]),
        # Shared out: 4 * 1/4.
        (lambda turn: shared(1.0, turn, split=True), 1.0, [0.25, 0.25, 0.25, 0.25]),
        # On one of them: nothing reaches the others, which stand beside it.
        (lambda turn: {turn[0]: 1.0}, 1.0, [1.0, None, None, None]),
        # On the role: one reward with four targets.
        (lambda _turn: {None: 1.0}, 1.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_what_a_reward_of_a_turn_of_several_calls_gives(make_call, make_trace, *, post, planner, searches):
    """A planner sends four searches, which are one turn. Graph credit sums the rewards on distinct calls."""

    def call(call_id, role, step, namespace):
        made = make_call(call_id, role=role, superstep=step, namespace=namespace)
        span = replace(made.attribution.span, span_id=namespace, name=role)
        return replace(made, attribution=replace(made.attribution, span=span))

    calls = [call("p", "plan", 1, "plan:1"), *(call(f"s{n}", "search", 2, f"search:{n}") for n in range(4))]
    trace = make_trace(calls=calls)
    (turn,) = role_turns(trace)["search"]
    assert sorted(turn) == ["s0", "s1", "s2", "s3"]
    rewards = [
        Reward(reward_id=f"on {on}", run_id="run_a", name="found", value=value, source="t", call_id=on, role="search")
        for on, value in post(turn).items()
    ]
    graph = run_graph(trace)
    atoms = atoms_of(graph, rewards)
    found = call_returns(ScopedGraph(graph, "graph", atoms), atoms)
    assert dict(zip([node.call_id for node in graph.nodes], found, strict=True)) == {
        "p": planner,
        **dict(zip(turn, searches, strict=True)),
    }


def test_a_reward_function_may_use_them_without_torch():
    code = "import sys, tracegrad.trainer.allocators; print([m for m in ('torch', 'numpy', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
