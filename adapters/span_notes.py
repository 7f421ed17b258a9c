"""The spans of a run as LangChain's callbacks tell them: node executions, tools, and graphs, with input and output.

An inline handler beside `chain_callers`. It changes nothing of the app's: it reads, copies what it keeps as bounded
plain JSON, and hands it to the outbox. What has a checkpoint namespace of its own is a node execution (its span id is
the one its model calls name, see `caller`); what runs nodes is a graph; tools and graphs are known by LangChain's own
id, so that a posted LangSmith tree names the same spans. Everything hangs below the node in whose namespace it ran.
Refuses nothing; notes nothing outside of a run. Called by `hook.install` (register) and by whoever ends runs (flush).
"""

import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from uuid import UUID

from tracegrad.adapters.caller import Caller, caller_of, is_execution, node_span_id, span_of
from tracegrad.adapters.chain_callers import CONTEXT_MODULE
from tracegrad.adapters.plain_json import plain
from tracegrad.adapters.scope import RunScope, resolved_scope
from tracegrad.adapters.span_outbox import Part, SpanOutbox

_MARK = "__tracegrad_spans__"
_MAX_OPEN = 50_000
_MAX_ERROR_CHARS = 4000


@dataclass(slots=True)
class _Open:
    """Something that runs: its run, where it is, and the span it is, once it is known to be one."""

    root: str
    run_id: str
    caller: Caller
    name: str
    given: Any
    started_at: float
    span: Part | None = None
    """`span_id`, `name` and `kind`."""


def register(context_module: ModuleType, process: RunScope) -> None:
    """Give every callback manager the handler; again: take the newer `process`, what holds outside of any scope."""
    notes: SpanNotes | None = getattr(context_module, _MARK, None)
    if notes is not None:
        notes.process = process
        return
    notes = SpanNotes(process, SpanOutbox())
    handler = _handler(notes)
    # LangChain takes handlers from ContextVars; this one is a constant.
    constant: ContextVar[Any] = ContextVar("tracegrad_spans", default=handler)
    context_module.register_configure_hook(constant, inheritable=True)
    setattr(context_module, _MARK, notes)


def flush(run_id: str) -> None:
    """Post what is known of the spans of a run that ends now; nothing to do where LangChain was never imported."""
    notes: SpanNotes | None = getattr(sys.modules.get(CONTEXT_MODULE), _MARK, None)
    if notes is not None:
        notes.outbox.flush(run_id)


def wrote(namespace: str, node: str, channels: tuple[str, ...]) -> None:
    """Tell what the execution with this namespace wrote; see `graph_writes`."""
    notes: SpanNotes | None = getattr(sys.modules.get(CONTEXT_MODULE), _MARK, None)
    if notes is not None:
        notes.wrote(namespace, node, channels)


class SpanNotes:
    """What runs now, by LangChain's id. `process` is what holds where no scope is entered."""

    def __init__(self, process: RunScope, outbox: SpanOutbox) -> None:
        self.process = process
        self.outbox = outbox
        self._open: OrderedDict[UUID, _Open] = OrderedDict()
        self._places: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Namespace of an execution -> the proxy's root and its run; until it is told what it wrote."""

    def chain_started(
        self, *, run_id: UUID, parent_id: UUID | None, name: str | None, given: Any, tags: Sequence[str], metadata: Any
    ) -> None:
        """Note a chain; tell its span where it is a node execution, and its parent's where that is its graph."""
        caller = caller_of({"metadata": metadata})
        parent = self._open.get(parent_id) if parent_id is not None else None
        one = self._noted(run_id, parent, caller, name or caller.node or "graph", given)
        if one is None:
            return
        around = parent.caller.namespace if parent is not None else None
        if is_execution(caller, around, name=name, tags=tags, parent_known=parent is not None):
            if parent is not None and parent.span is None:
                self._found_graph(parent_id, parent)
            self._tell(one, caller.span(one.run_id), given)
            assert caller.namespace is not None
            self._places[caller.namespace] = one.root, one.run_id
            if len(self._places) > _MAX_OPEN:
                self._places.popitem(last=False)

    def wrote(self, namespace: str, node: str, channels: tuple[str, ...]) -> None:
        """Tell what a node's execution wrote, once it is done with it."""
        place = self._places.pop(namespace, None)
        if place is not None:
            root, run_id = place
            part: Part = {"span_id": node_span_id(run_id, namespace), "name": node, "kind": "node"}
            self.outbox.put(root, run_id, {**part, "wrote": list(channels)})

    def tool_started(self, run_id: UUID, parent_id: UUID | None, name: str, given: Any, metadata: Any) -> None:
        """Note a tool, which is always a span."""
        parent = self._open.get(parent_id) if parent_id is not None else None
        one = self._noted(run_id, parent, caller_of({"metadata": metadata}), name, given)
        if one is not None:
            self._tell(one, span_of(one.run_id, one.caller.namespace, run_id.hex, name=name, kind="tool"), given)

    def ended(self, run_id: UUID, output: Any = None, error: BaseException | None = None) -> None:
        """Tell the end of what was a span; forget it."""
        one = self._open.pop(run_id, None)
        if one is None or one.span is None:
            return
        part: Part = {**one.span, "ended_at": time.time()}
        if error is not None and not _is_control_flow(error):
            part["error"] = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]
        elif error is None:
            part["output"] = plain(output)
        self.outbox.put(one.root, one.run_id, part)

    def _noted(self, run_id: UUID, parent: _Open | None, caller: Caller, name: str, given: Any) -> _Open | None:
        if parent is None:
            scope = resolved_scope(self.process)
            if scope.run_id is None or scope.proxy is None:
                return None
            root, run = scope.proxy, scope.run_id
        else:
            root, run = parent.root, parent.run_id
        one = _Open(root, run, caller, name, given, time.time())
        self._open[run_id] = one
        if len(self._open) > _MAX_OPEN:  # chains that never ended: an app that drops its generators
            self._open.popitem(last=False)
        return one

    def _found_graph(self, lc_id: UUID | None, graph: _Open) -> None:
        assert lc_id is not None
        span = span_of(graph.run_id, graph.caller.namespace, lc_id.hex, name=graph.name, kind="graph")
        self._tell(graph, span, graph.given, soon=True)

    def _tell(self, one: _Open, span: Part | None, given: Any, *, soon: bool = False) -> None:
        if span is None:
            return
        one.span = {name: span[name] for name in ("span_id", "name", "kind")}
        one.given = None
        self.outbox.put(one.root, one.run_id, {**span, "input": plain(given), "started_at": one.started_at}, soon=soon)


def _is_control_flow(error: BaseException) -> bool:
    """LangGraph raises to interrupt a graph, or to hand a command to the graph around it."""
    return any(kind.__name__ == "GraphBubbleUp" for kind in type(error).__mro__)


def _handler(notes: SpanNotes) -> Any:
    from langchain_core.callbacks.base import BaseCallbackHandler

    class Spans(BaseCallbackHandler):
        """Passes on what `SpanNotes` wants; methods have LangChain's signatures."""

        run_inline = True
        ignore_llm = True
        ignore_chat_model = True
        ignore_retriever = True
        ignore_custom_event = True

        def on_chain_start(
            self,
            serialized: Any,
            inputs: Any,
            *,
            run_id: UUID,
            parent_run_id: UUID | None = None,
            tags: Any = None,
            metadata: Any = None,
            name: str | None = None,
            **__: Any,
        ) -> None:
            notes.chain_started(
                run_id=run_id, parent_id=parent_run_id, name=name, given=inputs, tags=tags or (), metadata=metadata
            )

        def on_chain_end(self, outputs: Any, *, run_id: UUID, **__: Any) -> None:
            notes.ended(run_id, outputs)

        def on_chain_error(self, error: BaseException, *, run_id: UUID, **__: Any) -> None:
            notes.ended(run_id, error=error)

        def on_tool_start(
            self,
            serialized: Any,
            input_str: str,
            *,
            run_id: UUID,
            parent_run_id: UUID | None = None,
            metadata: Any = None,
            inputs: Any = None,
            name: str | None = None,
            **__: Any,
        ) -> None:
            called = name or (serialized or {}).get("name") or "tool"
            notes.tool_started(run_id, parent_run_id, called, input_str if inputs is None else inputs, metadata)

        def on_tool_end(self, output: Any, *, run_id: UUID, **__: Any) -> None:
            notes.ended(run_id, returned(output))

        def on_tool_error(self, error: BaseException, *, run_id: UUID, **__: Any) -> None:
            notes.ended(run_id, error=error)

    return Spans()


def returned(output: Any) -> Any:
    """Return what a tool returned: the content of the message that LangChain makes of it."""
    if getattr(output, "type", None) == "tool" and hasattr(output, "tool_call_id"):
        return output.content
    return output
