"""Who calls, from LangChain's config: roles, spans, parents."""

from typing import Any

import pytest

from tracegrad.adapters.caller import Caller, caller_of, outermost_node, parent_namespace, read_caller


def _config(**metadata: Any) -> dict[str, Any]:
    return {"metadata": metadata}


@pytest.mark.parametrize(
    ("metadata", "role"),
    [
        ({"langgraph_node": "answerer", "langgraph_checkpoint_ns": "answerer:1f"}, "answerer"),
        ({"langgraph_node": "model", "langgraph_checkpoint_ns": "research:1f|model:2e"}, "research"),
        ({"langgraph_node": "model", "langgraph_checkpoint_ns": "a:1|model:2", "lc_agent_name": "expert"}, "expert"),
        ({"langgraph_node": "lonely"}, "lonely"),
        ({"langgraph_node": "x", "langgraph_checkpoint_ns": "node:with:colons:1f"}, "node:with:colons"),
        ({}, None),
    ],
)
def test_the_role_is_the_agent_else_the_outermost_node(metadata: dict[str, Any], role: str | None) -> None:
    assert caller_of(_config(**metadata)).role == role


@pytest.mark.parametrize(
    ("namespace", "parent"),
    [("a:1", None), ("a:1|b:2", "a:1"), ("a:1|2|b:3", "a:1"), ("a:1|b:2|7|c:3", "a:1|b:2"), ("", None)],
)
def test_the_parent_is_the_node_that_runs_the_subgraph(namespace: str, parent: str | None) -> None:
    assert parent_namespace(namespace) == parent


def test_one_node_execution_is_one_span_in_each_run() -> None:
    caller = Caller(role="b", node="b", namespace="a:1|b:2", superstep=3, triggers=("branch:to:b",))
    span, again, elsewhere = caller.span("r1"), caller.span("r1"), caller.span("r2")
    assert span is not None and elsewhere is not None
    assert span == again
    assert span["span_id"] != elsewhere["span_id"]
    outer = Caller(node="a", namespace="a:1").span("r1")
    assert outer is not None and span["parent_span_id"] == outer["span_id"]
    assert (span["name"], span["superstep"], span["triggers"]) == ("b", 3, ["branch:to:b"])
    assert Caller(role="x").span("r1") is None


def test_outside_of_langchain_there_is_no_caller() -> None:
    assert read_caller() == Caller()
    assert outermost_node(None) is None
