"""Clients in JavaScript, which no hook reaches: named by the path of their base URL, or by LangSmith's wire alone."""

import json
from collections import Counter
from pathlib import Path

import other_clients
import pytest
from client_programs import Served, finished, retried, under_tracegrad, words

from tracegrad.tracestore.edges import edges

TOWNS = ("Oslo", "Rome", "Bonn")
ANSWERS = {
    "stopped": "0",
    "impatient": "0: slow",
    "plain": ["0: plain"],
    "stream": ["0: stream"],
    "several": ["0: several", "1: several"],
    "several streamed": ["0: several streamed", "1: several streamed"],
    "tool": ["weather", '{"city": "x"}'],
    "tool streamed": ["weather", '{"city": "x"}'],
    "retry": ["call_", "0: busy"],
    "overflow": ["BadRequestError", True, "context_length_exceeded", ""],
    "overflow streamed": ["BadRequestError", True, "context_length_exceeded", ""],
    "fails": ["APIError", True, "engine_error", "0: "],
    "dies": ["APIError", True, "engine_unreachable", "0: "],
    "completion": "0: text",
    "embedding": [4, 119],
    "models": ["main"],
    "equal and at once": ["0: equal"] * 3,
}


@pytest.fixture
def node(tmp_path: Path) -> list[str]:
    """The command that runs a program, which finds its packages beside it."""
    (tmp_path / "node_modules").symlink_to(other_clients.node_modules())
    for program in other_clients.CLIENTS.glob("*.mjs"):
        (tmp_path / program.name).write_text(program.read_text())
    return [other_clients.node()]


def test_the_sdk_by_path(served: Served, node: list[str], tmp_path: Path) -> None:
    url = f"{served.root}/run/js-sdk/role/solo/v1"
    assert (
        json.loads(finished([*node, "sdk_app.mjs"], cwd=tmp_path, OPENAI_BASE_URL=url, OPENAI_API_KEY="x")) == ANSWERS
    )
    trace = served.trace("js-sdk")
    for call in trace.calls:
        told = call.attribution
        assert (told.run_source, told.role, told.role_source) == ("path", "solo", "path")
    assert Counter(call.status for call in trace.calls) == {"complete": 13, "failed": 5, "aborted": 2}
    assert {call.quarantine for call in trace.calls if call.status == "complete"} == {None}
    retried(trace, {"busy", "slow"})
    equal = [call for call in trace.calls if words(call) == "equal"]
    assert len({call.call_id for call in equal}) == 3 and {call.retry_of for call in equal} == {None}


def states(printed: str) -> None:
    assert json.loads(printed) == [
        {
            "question": town, "plan": f"0: plan {town}", "found": "it is rain in x",
            "text": [f"0: write {town}", f"0: check {town}"], "error": "ContextOverflowError context_length_exceeded",
        }
        for town in TOWNS
    ]  # fmt: skip


def test_a_graph_in_one_run(served: Served, node: list[str], tmp_path: Path) -> None:
    """A program's environment names one base URL, so all that it does is one run and one role."""
    command = under_tracegrad(served, "--one-run", "--role", "solo", "--", *node, "graph_app.mjs", *TOWNS)
    states(finished(command, cwd=tmp_path))
    (trace,) = served.newest(1)
    assert (trace.run.status, trace.run.ended_by) == ("closed", "explicit")
    assert Counter(call.status for call in trace.calls) == {"complete": 15, "failed": 3}
    assert {(call.attribution.run_source, call.attribution.role) for call in trace.calls} == {("path", "solo")}


def test_a_graph_by_langsmith(served: Served, node: list[str], tmp_path: Path) -> None:
    """Each invocation is a run. The SDK itself, and a call that failed, are not in LangSmith's tree."""
    environ = {"OPENAI_BASE_URL": f"{served.root}/v1", "OPENAI_API_KEY": "x"}
    environ |= {"LANGSMITH_TRACING": "true", "LANGSMITH_ENDPOINT": f"{served.root}/langsmith", "LANGSMITH_API_KEY": "x"}
    states(finished([*node, "graph_app.mjs", *TOWNS], cwd=tmp_path, **environ))
    asked = set()
    for trace in served.newest(3):
        assert (trace.run.status, trace.run.error) == ("closed", None)
        told = [(call.attribution.role, call.attribution.span and call.attribution.span.name) for call in trace.calls]
        expected = {("planner", "planner"): 1, ("researcher", "model"): 2, ("writer", "writer"): 1}
        assert Counter(told) == expected
        towns = {town for town in TOWNS for call in trace.calls if town in words(call)}
        assert len(towns) == 1, "a run holds the calls of one question"
        asked |= towns
        assert {(call.attribution.run_source, call.quarantine) for call in trace.calls} == {("langsmith", None)}
        named = {span.span_id: span.name for span in trace.spans}
        assert sorted(named.values()) == sorted(
            [
                "LangGraph",
                "planner",
                "researcher",
                "LangGraph",
                "model",
                "tools",
                "weather",
                "model",
                "writer",
                "careful",
            ]
        )
        assert {(named[edge.source], named[edge.target]) for edge in edges(trace.spans)} == {
            ("planner", "researcher"), ("researcher", "writer"), ("writer", "careful"),
            ("model", "tools"), ("tools", "model"),
        }  # fmt: skip
        (tool,) = [span for span in trace.spans if span.kind == "tool"]
        assert (tool.input, tool.output, named[str(tool.parent_span_id)]) == ({"city": "x"}, "rain in x", "tools")
    assert asked == set(TOWNS)
    assert served.store.attribution_conflicts() == []
