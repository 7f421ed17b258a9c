"""Who calls, for the steps of a chain that is itself a node: `add_node("writer", prompt | model)`.

LangGraph sets the config's ContextVar for the first step of a node's sequence only, so the model in such a chain runs
without it. LangChain's callbacks do know the node: an inline handler (one that runs in the model's own context) notes
the caller in the run scope when a model starts and forgets it when the model ends. It changes nothing else: it is no
streaming handler, and LangChain logs its errors. Called by `hook.install`, once LangChain is imported by the app.
"""

from contextvars import ContextVar
from types import ModuleType
from typing import Any

from tracegrad.adapters.caller import Caller, caller_of
from tracegrad.adapters.scope import note_caller

CONTEXT_MODULE = "langchain_core.tracers.context"
"""Imported by LangChain before the first callback manager is configured."""

_MARK = "__tracegrad_callers__"


def register(context_module: ModuleType) -> None:
    """Give every callback manager the handler. Idempotent. `context_module` is `CONTEXT_MODULE`."""
    if getattr(context_module, _MARK, False):
        return
    handler = _handler()
    # LangChain takes handlers from ContextVars; this one is a constant.
    constant: ContextVar[Any] = ContextVar("tracegrad_callers", default=handler)
    context_module.register_configure_hook(constant, inheritable=True)
    setattr(context_module, _MARK, True)


def _node_of(metadata: dict[str, Any] | None) -> Caller | None:
    caller = caller_of({"metadata": metadata})
    return None if caller.node is None else caller


def _handler() -> Any:
    from langchain_core.callbacks.base import BaseCallbackHandler

    class CallerNotes(BaseCallbackHandler):
        """Notes the caller of each model call; methods have LangChain's signatures."""

        run_inline = True

        def on_chat_model_start(self, *_: Any, metadata: dict[str, Any] | None = None, **__: Any) -> None:
            note_caller(_node_of(metadata))

        def on_llm_start(self, *_: Any, metadata: dict[str, Any] | None = None, **__: Any) -> None:
            note_caller(_node_of(metadata))

        def on_llm_end(self, *_: Any, **__: Any) -> None:
            note_caller(None)

        def on_llm_error(self, *_: Any, **__: Any) -> None:
            note_caller(None)

    return CallerNotes()
