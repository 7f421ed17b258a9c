"""What the runs of a LangSmith trace are to us: spans, and facts about the model calls they made.

The same rules as the hook's (`adapters.caller`), so that both name one node by one id: what has a checkpoint namespace
of its own is a node's execution, what runs nodes is a graph, tools and graphs are known by LangChain's id. A model run
names its call by the completion's id; in a stream LangChain keeps only the `system_fingerprint`, which the proxy makes
the call's id for calls that nobody attributed. Refuses nothing: what it does not understand is no span. Pure but for
the trace's memory of what it has seen. Called by `langsmith`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from tracegrad.adapters.caller import Caller, caller_of, is_execution, node_span_id, span_of
from tracegrad.adapters.plain_json import constructed_message, plain
from tracegrad.adapters.proxy.langsmith_wire import RunPart
from tracegrad.tracestore.records import LangSmithRun, LateAttribution, Span

_CALL_ID = re.compile(r"call_[0-9a-f]{32}")
_COMPLETION_PREFIXES = ("chatcmpl", "cmpl", "embd", "call_")
_NO_ERROR = ("GraphInterrupt", "NodeInterrupt", "ParentCommand", "GraphBubbleUp")
"""What LangGraph raises to interrupt a graph or to hand on a command."""
_MAX_ERROR_CHARS = 4000


def span_id_of(lc_id: str) -> str:
    """Return the id of the span of a tool or graph that LangChain knows by `lc_id`."""
    return str(span_of(None, None, lc_id, name="", kind="graph")["span_id"])


def own_run_id(trace_id: str) -> str:
    """Return the id of the run that a trace is where nobody else opened one: the trace's, as LangSmith shows it."""
    return str(UUID(trace_id))


def error_of(part: RunPart) -> str | None:
    """Return what went wrong without the traceback; None also for what LangGraph raises on purpose."""
    if not part.error or part.error.startswith(_NO_ERROR):
        return None
    return part.error.partition("Traceback (most recent call last)")[0].strip()[:_MAX_ERROR_CHARS] or part.error[:200]


def calls_named(part: RunPart) -> tuple[str, ...]:
    """Return the ids of the model calls that a model run made: completion ids, or our call ids."""
    if part.run_type not in ("llm", "chat_model") or not isinstance(part.outputs, Mapping):
        return ()
    found: dict[str, None] = {}
    for place in _places(part.outputs):
        for key in ("id", "system_fingerprint"):
            said = place.get(key)
            if isinstance(said, str) and (call := _CALL_ID.match(said)):
                found[call.group()] = None
            elif key == "id" and isinstance(said, str) and said.startswith(_COMPLETION_PREFIXES):
                found[said] = None
    return tuple(found)


def _places(outputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Where clients keep a completion's id: the answer itself, `llm_output`, a message and its response metadata."""
    yield outputs
    for name in ("llm_output", "llmOutput"):
        if isinstance(outputs.get(name), Mapping):
            yield outputs[name]
    for batch in outputs.get("generations") or ():
        for generation in batch if isinstance(batch, list) else (batch,):
            message = generation.get("message") if isinstance(generation, Mapping) else None
            kwargs = message.get("kwargs") if isinstance(message, Mapping) else None
            if isinstance(kwargs, Mapping):
                yield kwargs
                if isinstance(kwargs.get("response_metadata"), Mapping):
                    yield kwargs["response_metadata"]


@dataclass(slots=True)
class TraceMemory:
    """What is known of a trace from the parts that came so far: which runs are executions, graphs, and where."""

    namespaces: dict[str, str | None] = field(default_factory=dict)
    executions: dict[str, str] = field(default_factory=dict)
    """Namespace -> the run that is its execution: the outermost that has it."""
    graphs: set[str] = field(default_factory=set)

    def see(self, part: RunPart) -> None:
        """Remember a part; parts of the runs around it come before."""
        caller = caller_of({"metadata": part.metadata})
        self.namespaces[part.run_id] = caller.namespace
        if part.run_type != "chain" or not self._is_execution(part, caller):
            return
        assert caller.namespace is not None
        self.executions[caller.namespace] = part.run_id
        parent = part.parent_id
        if parent is not None and self.executions.get(self.namespaces.get(parent) or "") != parent:
            self.graphs.add(parent)  # a task's parent is the node that is its workflow: an execution itself

    def _is_execution(self, part: RunPart, caller: Caller) -> bool:
        if caller.namespace is None:
            return False
        known = self.executions.get(caller.namespace)
        if known is not None:
            return known == part.run_id
        parent_known = part.parent_id in self.namespaces
        around = self.namespaces.get(part.parent_id or "")
        return is_execution(caller, around, name=part.name, tags=part.tags, parent_known=parent_known)

    def span(self, part: RunPart, run_id: str) -> Span | None:
        """Return the part of a span that a part tells of in the run `run_id`; None where its run is none."""
        caller = caller_of({"metadata": part.metadata})
        fields: dict[str, Any] | None = None
        if part.run_type == "tool":
            fields = span_of(run_id, caller.namespace, part.run_id, name=part.name or "tool", kind="tool")
        elif caller.namespace is not None and self.executions.get(caller.namespace) == part.run_id:
            fields = caller.span(run_id)
        elif part.run_id in self.graphs:
            fields = span_of(run_id, caller.namespace, part.run_id, name=part.name or "graph", kind="graph")
        if fields is None:
            return None
        ended = part.ended_at is not None
        return Span(
            **{**fields, "triggers": tuple(fields.get("triggers", ()))},
            run_id=run_id,
            input=None if part.inputs is None else plain(part.inputs),
            output=plain(_output(part)) if ended and part.outputs is not None else None,
            error=error_of(part) if ended else None,
            started_at=part.started_at,
            ended_at=part.ended_at,
            source="langsmith",
        )

    def facts(self, part: RunPart, run_id: str | None) -> list[LateAttribution]:
        """Return what a model run says of its calls: their run, role and span."""
        caller = caller_of({"metadata": part.metadata})
        span_id = node_span_id(run_id, caller.namespace) if run_id and caller.namespace else None
        return [
            LateAttribution(
                source="langsmith",
                call_id=named if _CALL_ID.fullmatch(named) else None,
                completion_id=None if _CALL_ID.fullmatch(named) else named,
                run_id=run_id,
                role=caller.role,
                span_id=span_id,
            )
            for named in calls_named(part)
        ]


def became(part: RunPart, run_id: str | None, span: Span | None) -> LangSmithRun:
    """Return what a run of LangSmith is here: part of `run_id`, and there `span` if it is one."""
    return LangSmithRun(
        langsmith_id=part.run_id,
        trace_id=part.trace_id,
        run_id=run_id,
        span_id=None if span is None else span.span_id,
        named=calls_named(part),
    )


def _output(part: RunPart) -> Any:
    """A tool's output is what it returned: the content of the message that LangChain makes of it."""
    outputs = part.outputs
    if part.run_type != "tool" or not isinstance(outputs, Mapping) or set(outputs) != {"output"}:
        return outputs
    returned = outputs["output"]
    if isinstance(returned, Mapping):
        returned = constructed_message(returned) or returned
    if isinstance(returned, Mapping) and returned.get("type") == "tool" and "tool_call_id" in returned:
        return returned.get("content")
    return returned
