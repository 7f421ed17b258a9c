"""The graph of a run, from supersteps and triggers alone."""

from typing import Any

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
