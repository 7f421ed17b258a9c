"""The output of a graph invocation, whatever the consumer streams: a callback on the invocation's own chain.

LangGraph ends its outermost chain with the state that `invoke` would return; a stream's chunks need not hold it.
Refuses nothing and changes nothing of what the consumer gets. Imports langchain_core, so it is imported only where a
graph is run with a reward function. Called by `graph_runs`.
"""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.callbacks.base import BaseCallbackManager


class FinalOutput(BaseCallbackHandler):
    """Keeps what the first chain that starts under it ends with; `seen` says whether it ended."""

    run_inline = True
    ignore_llm = True
    ignore_chat_model = True
    ignore_retriever = True
    ignore_agent = True
    ignore_custom_event = True

    def __init__(self) -> None:
        self.seen = False
        self.output: Any = None
        self._root: UUID | None = None

    def on_chain_start(self, *args: Any, run_id: UUID, **kwargs: Any) -> None:
        """Take the first chain for the root: LangGraph starts it before any node."""
        self._root = self._root or run_id

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Keep the root's output."""
        if run_id == self._root:
            self.output = outputs
            self.seen = True


def watched(config: Mapping[str, Any] | None, final: FinalOutput) -> dict[str, Any]:
    """Return `config` with `final` among its callbacks; the caller's own stay as they are."""
    callbacks = (config or {}).get("callbacks")
    if isinstance(callbacks, BaseCallbackManager):
        joined: Any = callbacks.copy()
        joined.add_handler(final, inherit=True)
    else:
        joined = [*(callbacks or ()), final]
    return {**(config or {}), "callbacks": joined}
