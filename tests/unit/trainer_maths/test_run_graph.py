"""The run graph over calls: from spans, edges and nesting; what a run without them gives; no order matters."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegrad.tracestore.records import Attribution, Continues, Run, RunTrace, Span
from tracegrad.trainer.run_graph import CallNode, bits, linked, run_graph


def node(name, step, *triggers, graph="", wrote=None, span_id=None, parent=None):
    namespace = f"{graph}|{name}:{step}" if graph else f"{name}:{step}"
    fields = {"name": name, "namespace": namespace, "superstep": step, "triggers": triggers, "wrote": wrote}
    return Span(span_id=span_id or namespace, run_id="r", parent_span_id=parent, **fields)


@pytest.fixture
def call(make_call):
    def make(call_id, span=None, at=(0.0, 1.0), role="planner", **changes):
        made = make_call(call_id, **changes)
        timing = replace(made.timing, dispatched_at=at[0], completed_at=at[1])
        return replace(made, timing=timing, attribution=Attribution(run_id="r", role=role, span=span))

    return make


def ancestry(calls, spans=()):
    """Which call is an ancestor of which, as "a>b"; the same for every order of calls and spans."""
    found = []
    for seed in range(3):
        mixed, others = list(calls), list(spans)
        random.Random(seed).shuffle(mixed)
        random.Random(seed).shuffle(others)
        trace = RunTrace(run=Run(run_id="r", purpose="train"), calls=tuple(mixed), rewards=(), spans=tuple(others))
        graph = run_graph(trace)
        ids = [one.call_id for one in graph.nodes]
        found.append({f"{ids[a]}>{ids[b]}" for a, mask in enumerate(graph.descendants) for b in bits(mask)})
    assert found[0] == found[1] == found[2], "the order of arrival must not matter"
    return " ".join(sorted(found[0]))


def test_a_chain_through_a_node_that_calls_no_model(call):
    plan, search, write = node("plan", 1), node("search", 2), node("write", 3)
    assert ancestry([call("p", plan), call("w", write)], [plan, search, write]) == "p>w"


def test_branches_of_one_step_meet_in_the_next(call):
    plan, left, right, join = (
        node("plan", 1),
        node("left", 2),
        node("right", 2),
        node("join", 3, "join:left+right:join"),
    )
    calls = [call("p", plan), call("l", left), call("r", right), call("z", join)]
    assert ancestry(calls, [plan, left, right, join]) == "l>z p>l p>r p>z r>z"


def test_time_says_nothing_across_branches(call):
    """The left branch had answered long before the right one asked: still neither fed the other."""
    plan, left, right = node("plan", 1), node("left", 2), node("right", 2)
    calls = [call("p", plan), call("l", left, (1.0, 2.0)), call("r", right, (50.0, 51.0))]
    assert ancestry(calls, [plan, left, right]) == "p>l p>r"


def test_a_subgraph_is_fed_by_what_fed_its_node_and_feeds_what_its_node_feeds(call):
    plan, team, write = node("plan", 1), node("team", 2), node("write", 3)
    model, tools, again = (
        node(n, s, graph="team:2", parent="team:2") for n, s in (("model", 1), ("tools", 2), ("model", 3))
    )
    calls = [call("p", plan), call("m", model), call("a", again), call("w", write)]
    assert ancestry(calls, [plan, team, write, model, tools, again]) == "a>w m>a m>w p>a p>m p>w"


def test_calls_of_one_span_are_a_chain_by_dispatch(call):
    one = node("loop", 1)
    calls = [call("a", one, (0.0, 1.0)), call("b", one, (1.0, 2.0)), call("c", one, (3.0, 4.0))]
    assert ancestry(calls, [one]) == "a>b a>c b>c"


def test_calls_of_one_span_that_overlap_stand_side_by_side(call):
    one = node("vote", 1)
    calls = [call("a", one, (0.0, 5.0)), call("b", one, (0.1, 1.0)), call("c", one, (6.0, 7.0))]
    assert ancestry(calls, [one]) == "a>c b>c"


def test_a_span_calls_before_and_after_its_subgraph_but_subgraphs_are_branches(call):
    outer = node("outer", 1)
    first, second = (node("model", 1, graph=g, parent="outer:1") for g in ("outer:1", "outer:1|1"))
    calls = [
        call("before", outer, (0.0, 1.0)),
        call("x", first, (2.0, 3.0)),
        call("y", second, (4.0, 5.0)),
        call("z", outer, (6.0, 7.0)),
    ]
    assert ancestry(calls, [outer, first, second]) == "before>x before>y before>z x>z y>z"


def test_a_call_and_a_subgraph_of_one_moment_do_not_feed_one_another(call):
    """What took no time came before, and not after as well. Where a clock was set back, the dispatch says when."""
    outer, inner = node("outer", 1), node("model", 1, graph="outer:1", parent="outer:1")
    assert ancestry([call("x", outer, (2.0, 2.0)), call("y", inner, (2.0, 2.0))], [outer, inner]) == "x>y"
    assert ancestry([call("x", outer, (5.0, 1.0)), call("y", inner, (2.0, 3.0))], [outer, inner]) == "y>x"


def test_without_spans_only_conversations_are_linked(call):
    """Never time alone: three calls one after another, of which the third goes on from the first."""
    go_on = Continues(call_id="a", choice=0)
    calls = [call("a", at=(0.0, 1.0)), call("b", at=(2.0, 3.0)), call("c", at=(4.0, 5.0), continues=go_on)]
    assert ancestry(calls) == "a>c"
    trace = RunTrace(run=Run(run_id="r", purpose="train"), calls=tuple(calls), rewards=())
    assert run_graph(trace).unlinked() == {"b"}
    assert run_graph(replace(trace, calls=(calls[0],))).unlinked() == frozenset(), "nothing is missing of one call"


def test_between_spans_a_conversation_links_nothing(call):
    """Equal prompts and answers in two branches look like one conversation."""
    left, right = node("left", 1), node("right", 1)
    go_on = Continues(call_id="l", choice=0)
    assert ancestry([call("l", left), call("r", right, (2.0, 3.0), continues=go_on)], [left, right]) == ""


def test_what_failed_or_was_sent_again_fed_nothing(call):
    one, after = node("loop", 1), node("after", 2)
    calls = [
        call("a", one, (0.0, 1.0)),
        call("lost", one, (2.0, 3.0)),
        call("again", one, (4.0, 5.0), retry_of="lost"),
        call("broken", one, (6.0, 7.0), status="failed"),
        call("z", after),
    ]
    assert ancestry(calls, [one, after]) == "a>again a>broken a>lost a>z again>broken again>z"
    trace = RunTrace(run=Run(run_id="r", purpose="train"), calls=tuple(calls), rewards=(), spans=(one, after))
    graph = run_graph(trace)
    assert {node.call_id for node in graph.nodes if node.mute} == {"lost", "broken"}, "credit leaves these out"


def test_a_contradiction_links_nothing(call):
    a, b = node("a", 1, parent="b:2"), node("b", 2, parent="a:1")
    assert ancestry([call("x", a), call("y", b)], [a, b]) == ""


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=16),
    seed=st.integers(0, 99),
)
def test_descendants_are_those_that_a_walk_finds(pairs, seed):
    names = "abcdefgh"
    links = [(names[a], names[b]) for a, b in pairs if a < b]
    nodes = [CallNode(call_id=name, role=None, model="m") for name in names]
    graph = linked(nodes, links)
    for name, number in graph.index().items():
        found, waiting = set(), [name]
        while waiting:
            at = waiting.pop()
            new = {target for source, target in links if source == at} - found
            found |= new
            waiting += new
        assert {graph.nodes[place].call_id for place in bits(graph.descendants[number])} == found
    mixed, shuffled = list(links), list(nodes)
    random.Random(seed).shuffle(mixed)
    random.Random(seed).shuffle(shuffled)
    assert linked(shuffled, mixed) == graph
    implied = [
        (a.call_id, graph.nodes[b].call_id)
        for a, m in zip(graph.nodes, graph.descendants, strict=True)
        for b in bits(m)
    ]
    assert linked(nodes, implied) == graph, "an edge that others imply changes nothing"
