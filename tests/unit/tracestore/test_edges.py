"""The graph of a run, from supersteps and triggers alone."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.records import Span


def node(name: str, step: int | None, *triggers: str, graph: str = "", copy: str = "", **more: Any) -> Span:
    namespace = f"{graph}|{name}:{step}{copy}" if graph else f"{name}:{step}{copy}"
    fields = {"span_id": f"{graph}/{name}{copy}@{step}", "run_id": "r", "name": name, "namespace": namespace}
    return Span(**{**fields, "superstep": step, "triggers": triggers, **more})


def pairs(*spans: Span) -> set[tuple[str, str]]:
    forward = edges(spans)
    assert edges(reversed(spans)) == forward, "the order of arrival must not matter"
    return {(edge.source.strip("/"), edge.target.strip("/")) for edge in forward}


def test_a_chain() -> None:
    assert pairs(node("a", 1, "branch:to:a"), node("b", 2, "branch:to:b"), node("c", 3, "branch:to:c")) == {
        ("a@1", "b@2"),
        ("b@2", "c@3"),
    }


def test_a_fan_out_that_joins() -> None:
    """`Send`: three copies of one node in one step; the join reads what all of them wrote."""
    copies = [node("work", 2, "__pregel_tasks", copy=name) for name in "xyz"]
    found = pairs(node("plan", 1, "branch:to:plan"), *copies, node("sum", 3, "branch:to:sum"))
    assert found == {("plan@1", f"work{x}@2") for x in "xyz"} | {(f"work{x}@2", "sum@3") for x in "xyz"}


def test_a_join_is_fed_by_those_it_waits_for() -> None:
    """`add_edge(["a", "b"], "c")`: a ran a step earlier than b, and d, which ran beside b, feeds nothing."""
    spans = [
        node("start", 1, "branch:to:start"),
        node("a", 2, "branch:to:a"),
        node("b", 3, "branch:to:b"),
        node("d", 3, "branch:to:d"),
        node("c", 4, "join:a+b:c"),
    ]
    assert {edge for edge in pairs(*spans) if edge[1] == "c@4"} == {("a@2", "c@4"), ("b@3", "c@4")}


def test_a_loop_is_fed_by_its_last_round() -> None:
    model = [node("model", step, "branch:to:model") for step in (1, 3, 5)]
    tools = [node("tools", step, "branch:to:tools") for step in (2, 4)]
    assert pairs(*model, *tools) == {
        ("model@1", "tools@2"),
        ("tools@2", "model@3"),
        ("model@3", "tools@4"),
        ("tools@4", "model@5"),
    }


def test_graphs_are_kept_apart() -> None:
    """Two runs of one subgraph, side by side, with the same steps inside."""
    spans = [
        node(name, step, f"branch:to:{name}", graph=f"outer:{i}") for i in "12" for name, step in (("a", 1), ("b", 2))
    ]
    assert pairs(*spans) == {("outer:1/a@1", "outer:1/b@2"), ("outer:2/a@1", "outer:2/b@2")}


def test_what_has_no_place_has_no_edges() -> None:
    """Tools and graphs hang below their node; a span without a superstep is nowhere."""
    tool = Span(span_id="t", run_id="r", name="search", kind="tool", parent_span_id="a@1", superstep=2, namespace="x:1")
    assert pairs(node("a", 1), node("b", None), tool) == set()


def test_a_step_without_spans_is_stepped_over() -> None:
    assert pairs(node("a", 1), node("c", 3, "branch:to:c")) == {("a@1", "c@3")}


def sent(name: str, step: int, number: int, **more: Any) -> Span:
    return node(name, step, f"__pregel_push:{number}", copy=f"#{number}", **more)


def test_two_branches_that_go_on_separately() -> None:
    """Each successor is fed by its own branch, the join by the ends of both, which lie in different steps."""
    spans = [
        node("plan", 1, "branch:to:plan", wrote=("branch:to:a1", "branch:to:b1")),
        node("a1", 2, "branch:to:a1", wrote=("answers", "branch:to:a2")),
        node("b1", 2, "branch:to:b1", wrote=("answers", "branch:to:b2")),
        node("a2", 3, "branch:to:a2", wrote=("branch:to:a3",)),
        node("b2", 3, "branch:to:b2", wrote=("join:a3+b2:c",)),
        node("a3", 4, "branch:to:a3", wrote=("join:a3+b2:c",)),
        node("c", 5, "branch:to:c", "join:a3+b2:c", wrote=()),
    ]
    assert pairs(*spans) == {
        ("plan@1", "a1@2"), ("plan@1", "b1@2"), ("a1@2", "a2@3"), ("b1@2", "b2@3"), ("a2@3", "a3@4"),
        ("a3@4", "c@5"), ("b2@3", "c@5"),
    }  # fmt: skip


def test_each_copy_that_was_sent_is_fed_by_its_sender() -> None:
    """The first copy sends two, the second none, the third one; `side`, which an edge made run, sends before them."""
    spans = [
        node("side", 2, "branch:to:side", wrote=("send:polish",)),
        sent("work", 2, 0, wrote=("send:polish", "answers", "send:polish")),
        sent("work", 2, 1, wrote=("answers",)),
        sent("work", 2, 2, wrote=("send:polish",)),
        *(sent("polish", 3, number, wrote=("branch:to:sum",)) for number in range(4)),
        node("sum", 4, "branch:to:sum", wrote=()),
    ]
    mine = [("side@2", 0), ("work#0@2", 1), ("work#0@2", 2), ("work#2@2", 3)]
    feeding = {(source, f"polish#{number}@3") for source, number in mine}
    assert pairs(*spans) == feeding | {(f"polish#{number}@3", "sum@4") for number in range(4)}


def test_where_not_all_is_known_nothing_is_left_out() -> None:
    """A sender whose writes nobody told, a copy that is missing, an odd number: the whole step may have fed it."""
    first, second = (sent("work", 2, number, wrote=("send:polish",)) for number in (0, 1))
    one, other = sent("polish", 3, 0), sent("polish", 3, 1)
    every = {(f"work#{a}@2", f"polish#{b}@3") for a in (0, 1) for b in (0, 1)}
    assert pairs(first, second, one, other) == {("work#0@2", "polish#0@3"), ("work#1@2", "polish#1@3")}
    assert pairs(first, sent("work", 2, 1), one, other) == every
    assert pairs(first, second, other) == {pair for pair in every if pair[1] == "polish#1@3"}
    assert pairs(second, one, other) == {pair for pair in every if pair[0] == "work#1@2"}
    odd = node("polish", 3, "__pregel_push:x")
    assert pairs(first, second, odd) == {("work#0@2", "polish@3"), ("work#1@2", "polish@3")}
    silent = [node("a", 1, "branch:to:a", wrote=("branch:to:c",)), node("b", 1, "branch:to:b")]
    assert pairs(*silent, node("c", 2, "branch:to:c")) == {("a@1", "c@2"), ("b@1", "c@2")}


def test_a_node_that_waited_is_fed_by_whoever_called_it() -> None:
    """`defer=True`: it runs when all else is done, steps after it was called."""
    spans = [
        node("a", 1, "branch:to:a", wrote=("branch:to:last",)),
        node("b", 1, "branch:to:b", wrote=("branch:to:b2",)),
        node("b2", 2, "branch:to:b2", wrote=()),
        node("last", 3, "branch:to:last", wrote=()),
    ]
    assert pairs(*spans) == {("b@1", "b2@2"), ("a@1", "last@3")}


def test_a_trigger_that_did_not_fire_names_no_source() -> None:
    """`c` waits for a and b together, and x may call it alone: b has not run when it does."""
    spans = [
        node("a", 1, "branch:to:a", wrote=("join:a+b:c",)),
        node("x", 1, "branch:to:x", wrote=("branch:to:c",)),
        node("c", 2, "branch:to:c", "join:a+b:c", wrote=()),
    ]
    assert pairs(*spans) == {("x@1", "c@2")}


_WRITES = st.lists(st.tuples(st.sampled_from(["branch:to:", "send:"]), st.sampled_from("pqr")), max_size=4)


@given(st.lists(st.lists(_WRITES, min_size=1, max_size=3), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_whoever_wrote_what_made_a_node_run_feeds_it_and_nobody_else(
    planned: list[list[list[tuple[str, str]]]], order: random.Random
) -> None:
    """Graphs run as LangGraph runs them, with what each execution writes drawn at random."""
    step, spans, truth = 1, [], set()
    running: list[tuple[str, int | None, set[str]]] = [("start", None, set())]
    for writes_of_step in [*planned, []]:
        called: dict[str, set[str]] = {}
        copies: list[tuple[str, str]] = []
        for at, (name, number, fed_by) in enumerate(running):  # in LangGraph's order within the step
            wrote = writes_of_step[at % len(writes_of_step)] if writes_of_step else []
            channels = tuple(dict.fromkeys(f"{how}{to}" for how, to in wrote if how == "branch:to:"))
            channels += tuple(f"{how}{to}" for how, to in wrote if how == "send:")
            if number is None:
                spans.append(node(name, step, f"branch:to:{name}", wrote=channels))
            else:
                spans.append(sent(name, step, number, wrote=channels))
            me = spans[-1].span_id.strip("/")
            truth |= {(source, me) for source in fed_by}
            for channel in channels:
                if channel.startswith("send:"):
                    copies.append((channel.removeprefix("send:"), me))
                else:
                    called.setdefault(channel.removeprefix("branch:to:"), set()).add(me)
        running = [(name, None, called[name]) for name in sorted(called)]
        running += [(name, number, {sender}) for number, (name, sender) in enumerate(copies)]
        step += 1
    order.shuffle(spans)
    assert pairs(*spans) == truth
