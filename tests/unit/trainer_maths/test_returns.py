"""Which rewards reach a call: isolation, ancestors only, each reward once, discounts by the longest way."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegrad.tracestore.records import Reward
from tracegrad.trainer.returns import Atom, ScopedGraph, atoms_of, call_returns, reached_calls
from tracegrad.trainer.run_graph import CallNode, linked


def reward(value, name="f1", **target):
    return Reward(reward_id=f"{name}{target}", run_id="r", name=name, value=value, source="t", **target)


def graph_of(roles, *edges):
    """`roles`: call id -> role; edges as "a>b"."""
    nodes = [CallNode(call_id=call, role=role, model="m") for call, role in roles.items()]
    return linked(nodes, [tuple(edge.split(">")) for edge in edges])


def returns(graph, rewards, scope, turn_gamma=1.0, weights=None):
    atoms = atoms_of(graph, rewards, weights)
    found = call_returns(ScopedGraph(graph, scope, atoms), atoms, turn_gamma=turn_gamma)
    return {node.call_id: value for node, value in zip(graph.nodes, found, strict=True)}


ROLES = {"p": "planner", "l": "worker", "r": "worker", "z": "writer"}
DIAMOND = graph_of(ROLES, "p>l", "p>r", "l>z", "r>z")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # Rewards: run 1, worker 0.5, call r 0.25, call z 8. Call-local: what stands on the call itself.
        ("call", {"p": 1, "l": 1.5, "r": 1.75, "z": 9}),
        # The workers do not follow one another, so nothing more reaches them.
        ("role", {"p": 1, "l": 1.5, "r": 1.75, "z": 9}),
        # The planner gets everything once: 1 + 0.5 (not per worker) + 0.25 + 8 (not per path). l does not get r's.
        ("graph", {"p": 9.75, "l": 9.5, "r": 9.75, "z": 9}),
    ],
)
def test_a_reward_reaches_as_far_as_the_scope_and_counts_once(scope, expected):
    rewards = [reward(1), reward(0.5, role="worker"), reward(0.25, call_id="r"), reward(8, call_id="z")]
    assert returns(DIAMOND, rewards, scope) == expected


def test_the_scope_of_a_role_is_its_own_later_calls():
    chain = graph_of({"a": "x", "b": "y", "c": "x"}, "a>b", "b>c")
    rewards = [reward(1, call_id="c"), reward(2, call_id="b"), reward(4, role="x")]
    assert returns(chain, rewards, "role") == {"a": 5, "b": 2, "c": 5}
    assert returns(chain, rewards, "call") == {"a": 4, "b": 2, "c": 5}
    # A role's reward is paid after its last call, so the graph carries it to b, which came before that.
    assert returns(chain, rewards, "graph") == {"a": 7, "b": 7, "c": 5}


def test_what_nothing_reaches_has_no_return():
    rewards = [reward(0.0, call_id="l")]
    assert returns(DIAMOND, rewards, "call") == {"p": None, "l": 0.0, "r": None, "z": None}
    assert returns(DIAMOND, rewards, "graph") == {"p": 0.0, "l": 0.0, "r": None, "z": None}
    assert reached_calls(DIAMOND, rewards, "graph") == {"p", "l"}
    assert reached_calls(DIAMOND, [reward(1, role="nobody")], "graph") == frozenset()


def test_discounts_count_the_calls_on_the_longest_way():
    chain = graph_of({"a": "x", "b": "y", "c": "x"}, "a>b", "b>c", "a>c")
    # A reward on the run is paid after the last call: 4 * 0.5^2 at a. The short cut a>c says nothing new.
    assert returns(chain, [reward(4)], "graph", 0.5) == {"a": 1, "b": 2, "c": 4}
    # In the scope of the role one call lies between a and the end, in that of the call none.
    assert returns(chain, [reward(4)], "role", 0.5) == {"a": 2, "b": 4, "c": 4}
    assert returns(chain, [reward(4)], "call", 0.5) == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize(("long", "short"), [("bc", "d"), ("cd", "b")])
def test_of_two_ways_the_longer_one_discounts(long, short):
    ways = graph_of(
        dict.fromkeys("abcde", "x"), f"a>{long[0]}", f"{long[0]}>{long[1]}", f"{long[1]}>e", f"a>{short}", f"{short}>e"
    )
    # Three calls lie on the long way from a to the end of e, two on the short one: 8 * 0.5^3 and not 8 * 0.5^2.
    assert returns(ways, [reward(8, call_id="e")], "graph", 0.5)["a"] == 1


def test_a_mute_call_stays_only_for_a_reward_that_nothing_else_has():
    """A planner, a writer whose first attempt failed (m), and a checker that failed for good (n)."""
    roles = {"p": "planner", "m": "writer", "w": "writer", "n": "checker"}
    nodes = [CallNode(call_id=call, role=role, model="m", mute=call in "mn") for call, role in roles.items()]
    graph = linked(nodes, [("p", "m"), ("p", "w"), ("p", "n"), ("w", "n")])

    def follow(*rewards):
        view = ScopedGraph(graph, "graph", atoms_of(graph, rewards))
        return {n.call_id: "".join(graph.nodes[i].call_id for i in view.next[k]) for k, n in enumerate(graph.nodes)}

    assert follow(reward(1), reward(1, role="writer")) == {"p": "w", "w": "", "m": "", "n": ""}
    assert follow(reward(1), reward(1, role="checker")) == {"p": "w", "w": "n", "m": "", "n": ""}
    assert follow(reward(1, call_id="m")) == {"p": "mw", "w": "", "m": "", "n": ""}
    assert returns(graph, [reward(4)], "graph", 0.5) == {"p": 2, "w": 4, "m": 4, "n": 4}, "as in a run without them"


def test_weights_choose_and_scale_rewards():
    rewards = [reward(1), reward(1, "format", role="worker"), reward(1, "seen")]
    assert returns(DIAMOND, rewards, "call", weights={"f1": 2, "format": -0.5}) == {"p": 2, "l": 1.5, "r": 1.5, "z": 2}


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=14),
    roles=st.lists(st.sampled_from("xyz"), min_size=7, max_size=7),
    rewards=st.lists(
        st.tuples(st.integers(-4, 4), st.sampled_from(["run", "x", "y", "z", *"abcdefg"])), min_size=1, max_size=6
    ),
    gamma=st.sampled_from([1.0, 0.5]),
    scope=st.sampled_from(["call", "role", "graph"]),
    seed=st.integers(0, 999),
)
def test_returns_equal_those_of_every_path_walked(*, pairs, roles, rewards, gamma, scope, seed):
    """Twin: all paths by recursion; a reward is discounted by the longest path to a call it stands on."""
    names = "abcdefg"
    role_of = dict(zip(names, roles, strict=True))
    links = [(names[a], names[b]) for a, b in pairs if a < b]
    given_rewards = []
    for number, (value, target) in enumerate(rewards):
        on = {} if target == "run" else {"role": target} if target in "xyz" else {"call_id": target}
        given_rewards.append(reward(float(value), f"n{number}", **on))
    mixed = list(links)
    random.Random(seed).shuffle(mixed)
    graph = linked([CallNode(call_id=n, role=role_of[n], model="m") for n in reversed(names)], mixed)
    result = returns(graph, given_rewards, scope, gamma)

    def longest(name, of_role):
        """Name reached -> calls passed on the longest path; in scope `role` only the role's calls are counted."""
        found = {name: 0}
        for source, target in links:
            if source == name:
                for end, length in longest(target, of_role).items():
                    step = 1 if of_role is None or role_of[target] == of_role else 0
                    found[end] = max(found.get(end, 0), length + step)
        return found

    for name in names:
        reach = {"call": {name: 0}, "graph": longest(name, None), "role": longest(name, role_of[name])}[scope]
        if scope == "role":
            reach = {end: length for end, length in reach.items() if role_of[end] == role_of[name]}
        total, any_reward = 0.0, False
        for one in given_rewards:
            on = [end for end in reach if (one.call_id in (None, end)) and (one.role in (None, role_of[end]))]
            if on:
                any_reward = True
                total += one.value * gamma ** max(reach[end] for end in on)
        assert result[name] == (pytest.approx(total) if any_reward else None)


def test_a_reward_is_paid_where_its_target_ends():
    view = ScopedGraph(DIAMOND, "graph")
    run, worker = atoms_of(DIAMOND, [reward(1), reward(2, role="worker")])
    paid = view.paid([run, worker])
    assert {call: paid[place] for call, place in DIAMOND.index().items()} == {"p": 0, "l": 2, "r": 2, "z": 1}
    assert Atom(1, 0b1111) == run
