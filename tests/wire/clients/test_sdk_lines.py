"""The OpenAI SDK of the 2.x line (on httpx) and of the 3.x line (on httpx2): the same programs, the same record.

Each line stands in a Python of its own (see `other_clients`); the programs are started by `tracegrad run`, or with
nothing but a base URL whose path says who calls.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable

import other_clients
import pytest
from client_programs import Served, check_graph, finished, retried, under_tracegrad, words

LINES: dict[str, tuple[Callable[[], str], str]] = {
    "2.": (other_clients.python, "httpx"),
    "3.": (lambda: sys.executable, "httpx2"),
}
SDK_APP, GRAPH_APP = (str(other_clients.CLIENTS / name) for name in ("sdk_app.py", "graph_app.py"))

ANSWERS = {
    "stopped": "0",
    "impatient": "0: slow",
    "plain": ["0: plain"],
    "stream": ["0: stream"],
    "several": ["0: several", "1: several"],
    "several streamed": ["0: several streamed", "1: several streamed"],
    "tool": ["weather", '{"city": "x"}'],
    "tool streamed": ["weather", '{"city": "x"}'],
    "parsed": {"answer": 7, "why": "x"},
    "raw": [0, "call_", "0: raw"],
    "retry": [1, "0: busy"],
    "overflow": ["BadRequestError", "context_length_exceeded", ""],
    "overflow streamed": ["BadRequestError", "context_length_exceeded", ""],
    "fails": ["APIError", "engine_error", "0: "],
    "dies": ["APIError", "engine_unreachable", "0: "],
    "completion": "0: text",
    "embedding": [4.0, 119.0],
    "models": ["main"],
    "async": "0: async",
    "async stream": "0: async stream",
    "equal and at once": ["0: equal"] * 3,
    "async retry": "0: busy async",
}


@pytest.mark.parametrize(("line", "how"), [("2.", "one run"), ("3.", "path")])
def test_the_sdk_itself(served: Served, line: str, how: str) -> None:
    python, http = LINES[line]
    if how == "path":
        run_id = f"sdk-{line}"
        url = f"{served.root}/run/{run_id}/role/solo/v1"
        printed = finished([python(), SDK_APP], OPENAI_BASE_URL=url, OPENAI_API_KEY="x")
    else:
        printed = finished(under_tracegrad(served, "--one-run", "--role", "solo", "--", python(), SDK_APP))
        run_id = served.newest(1)[0].run.run_id
    said = json.loads(printed)
    assert said.pop("version").startswith(line) and said.pop("http") == [http]
    assert said == ANSWERS
    trace = served.trace(run_id)
    assert trace.run.status == ("open" if how == "path" else "closed")
    for call in trace.calls:
        told = call.attribution
        assert (told.run_source, told.role, told.role_source) == ("path", "solo", "path")
    assert Counter(call.status for call in trace.calls) == {"complete": 18, "failed": 6, "aborted": 2}
    assert {call.quarantine for call in trace.calls if call.status == "complete"} == {None}
    retried(trace, {"busy", "busy async", "slow"})
    equal = [call for call in trace.calls if words(call) == "equal"]
    assert len({call.call_id for call in equal}) == 3 and {call.retry_of for call in equal} == {None}


@pytest.mark.parametrize("line", LINES)
def test_a_graph_on_it(served: Served, line: str) -> None:
    towns = ["Oslo", "Rome", "Bonn"]
    printed = finished(under_tracegrad(served, "--", LINES[line][0](), GRAPH_APP, *towns))
    version, *states = json.loads(printed)
    assert version.startswith(line)
    traces = {words(trace.calls[0]).split()[1]: trace for trace in served.newest(3)}
    for town, state in zip(towns, states, strict=True):
        assert state["found"] == "it is rain in x"
        assert state["errors"] == [
            "OpenAIContextOverflowError context_length_exceeded",
            "APIError engine_error",
            f"0: busy {town}",
        ]
        check_graph(traces[town], town)
    assert served.store.attribution_conflicts() == []
