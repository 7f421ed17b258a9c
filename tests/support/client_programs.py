"""What tests of client programs need: an engine that does what the words of a request say, and how to start a program.

Called by tests/wire/clients; the software that the programs use is in `other_clients`.
"""

import asyncio
import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import other_clients
from fake_sampling import Sampled, message_text
from fake_vllm import FakeEngine

from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.records import Call, RunTrace
from tracegrad.tracestore.store import Store


class MoodyEngine(FakeEngine):
    """The fake engine; the last message chooses how it behaves. After a tool has answered, it says what the tool said.

    In mid-stream it "fails" or "dies", or takes "long"; every other time it is "busy" (503) or "slow" (10 s).
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.was_unwell: set[str] = set()

    def _is_unwell(self, said: str) -> bool:
        self.was_unwell ^= {said}
        return said in self.was_unwell

    async def _plain(self, body: dict[str, Any], send: Any) -> None:
        said = message_text(body["messages"][-1])
        if "slow" in said and self._is_unwell(said):
            await asyncio.sleep(10)
        await super()._plain(body, send)

    async def _stream(self, body: dict[str, Any], send: Any) -> None:
        one = copy.copy(self)
        said = message_text(body["messages"][-1])
        one.fault = "error_event" if "fails" in said else "drop" if "dies" in said else None
        one.token_delay_s = 0.05 if "long" in said else 0.0
        await FakeEngine._stream(one, body, send)

    def _refusal(self, body: dict[str, Any], prefix: str) -> tuple[int, str, str, str | None] | None:
        said = message_text(body["messages"][-1]) if "messages" in body else ""
        if "busy" in said and self._is_unwell(said):
            return 503, "the engine is overloaded", "ServiceUnavailableError", None
        return super()._refusal(body, prefix)

    def _sample(self, body: dict[str, Any], text: str) -> Sampled:
        last = body["messages"][-1] if "messages" in body else {"role": "user"}
        return super()._sample(body, f"it is {message_text(last)}" if last["role"] == "tool" else text)


class Served(NamedTuple):
    """The proxy's URL and its store."""

    root: str
    store: Store

    def trace(self, run_id: str) -> RunTrace:
        return self.store.trace(run_id)

    def newest(self, count: int) -> list[RunTrace]:
        return [self.store.trace(one.run.run_id) for one in self.store.list_runs(limit=count)]


def under_tracegrad(served: Served, *arguments: str) -> list[str]:
    """Return the command for `tracegrad run`; `arguments`: options, `--`, the program's command."""
    return [sys.executable, "-m", "tracegrad.adapters.cli", "run", "--proxy", served.root, *arguments]


def finished(command: list[str], *, timeout_s: float = 120, cwd: Path | None = None, **environ: str) -> str:
    """Run a program to its end; return what it printed. What it says on stderr is shown where it fails."""
    env = other_clients.environ(**environ)
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_graph(trace: RunTrace, town: str) -> None:
    """Check the run of `clients/graph_app.py` for one question: its calls and no others, roles, edges, the tool."""
    assert (trace.run.status, trace.run.ended_by, trace.run.error) == ("closed", "hook", None)
    told = [(call.attribution.role, call.attribution.span and call.attribution.span.name) for call in trace.calls]
    assert Counter(told) == {
        ("planner", "planner"): 1, ("researcher", "model"): 2, ("writer", "writer"): 1, ("checker", "checker"): 2,
        ("careful", "careful"): 4,
    }  # fmt: skip
    assert {(call.attribution.run_source, call.attribution.role_source) for call in trace.calls} == {("hook", "hook")}
    assert all(town in str(call.request["messages"]) for call in trace.calls)
    retried(trace, {f"busy {town}"})
    named = {span.span_id: span.name for span in trace.spans}
    assert {(named[edge.source], named[edge.target]) for edge in edges(trace.spans)} == {
        ("planner", "researcher"), ("researcher", "writer"), ("researcher", "checker"), ("writer", "careful"),
        ("checker", "careful"), ("model", "tools"), ("tools", "model"),
    }  # fmt: skip
    (tool,) = [span for span in trace.spans if span.kind == "tool"]
    assert (tool.name, tool.input, tool.output) == ("weather", {"city": "x"}, "rain in x")
    assert named[str(tool.parent_span_id)] == "tools"


def retried(trace: RunTrace, expected: set[str]) -> None:
    """Exactly these were sent again, and name their first attempt, which failed or was given up."""
    calls = {call.call_id: call for call in trace.calls}
    again = [call for call in trace.calls if call.retry_of is not None]
    assert {words(call) for call in again} == expected and len(again) == len(expected)
    for call in again:
        first = calls[str(call.retry_of)]
        given_up = "aborted" if words(call) == "slow" else "failed"
        assert (call.status, first.status, words(first)) == ("complete", given_up, words(call))


def words(call: Call) -> str:
    """Return the first message of a call, "" where it has none."""
    return str(call.request["messages"][0]["content"]) if "messages" in call.request else ""
