"""Who is calling: role and span, read from the config that LangChain keeps in a ContextVar while a node runs.

Role: the agent's name (`lc_agent_name`) where there is one, else the outermost node of the checkpoint namespace,
else the node. Span: one per node execution, so that two calls of one execution share it; its id is made from the
run and the namespace, whose last segment is LangGraph's task id. Imports no LangChain: an app that did not import
it has no config. Called by `hook` for each request to the proxy, by
`span_notes` for each chain, and by the proxy for the runs of a posted LangSmith tree.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CONFIG_MODULE = "langchain_core.runnables.config"
_PARENT_SEPARATOR = "|"
_TASK_SEPARATOR = ":"
_STEP_TAG = "graph:step:"
_START = "__start__"
"""What takes a graph's input; LangGraph for JavaScript runs and traces it like a node."""
_PUSH = "__pregel_push"


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """What the config says. `node` None: the request does not come from a graph's node."""

    role: str | None = None
    node: str | None = None
    namespace: str | None = None
    superstep: int | None = None
    triggers: tuple[str, ...] = ()

    def span(self, run_id: str | None) -> dict[str, Any] | None:
        """Return the fields of `records.Span` but `run_id`, or None outside a node.

        `span_id` depends on (`run_id`, `namespace`) only; `parent_span_id` is that of the node which runs the
        subgraph. The kind is always `node`: whoever calls a model from a tool is a node of that tool's subgraph
        or the tool node itself, and what it sampled is its own.
        """
        if self.node is None or not self.namespace:
            return None
        parent = parent_namespace(self.namespace)
        return {
            "span_id": node_span_id(run_id, self.namespace),
            "name": self.node,
            "kind": "node",
            "parent_span_id": node_span_id(run_id, parent) if parent else None,
            "namespace": self.namespace,
            "superstep": self.superstep,
            "triggers": list(self.triggers),
        }


def is_execution(
    caller: Caller, around: str | None, *, name: str | None, tags: Sequence[str], parent_known: bool
) -> bool:
    """Return whether a LangChain chain with this config is a node's execution itself, not a step inside of it.

    Every execution has a namespace of its own, which the steps inside of it inherit; `around` is that of its parent.
    Where the parent is not known, LangGraph's tag tells, or the name: that of the node.
    """
    if caller.node in (None, _START) or not caller.namespace:
        return False
    if parent_known:
        return caller.namespace != around
    return name == caller.node or any(tag.startswith(_STEP_TAG) for tag in tags)


def span_of(run_id: str | None, namespace: str | None, lc_id: str, *, name: str, kind: str) -> dict[str, Any]:
    """Return the span of a tool or a graph that ran in `namespace`. LangChain's id of it, in hex, makes its id."""
    return {
        "span_id": f"span_{lc_id}",
        "name": name,
        "kind": kind,
        "parent_span_id": node_span_id(run_id, namespace) if namespace else None,
        "namespace": namespace,
    }


def read_caller() -> Caller:
    """Read the config of the LangChain runnable that executes here; an empty `Caller` outside of any."""
    module = sys.modules.get(_CONFIG_MODULE)
    variable = getattr(module, "var_child_runnable_config", None)
    config = variable.get() if variable is not None else None
    return caller_of(config) if config else Caller()


def caller_of(config: Mapping[str, Any]) -> Caller:
    """Return who calls under a `RunnableConfig`."""
    metadata = config.get("metadata") or {}
    namespace = metadata.get("langgraph_checkpoint_ns") or None
    node = metadata.get("langgraph_node") or None
    role = metadata.get("lc_agent_name") or outermost_node(namespace) or node
    return Caller(
        role=role,
        node=node,
        namespace=namespace,
        superstep=metadata.get("langgraph_step"),
        triggers=_triggers(metadata),
    )


def _triggers(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What made the node run. Of a `Send` its number among those of the step before: `__pregel_push:2`."""
    said = tuple(str(trigger) for trigger in metadata.get("langgraph_triggers") or ())
    path = metadata.get("langgraph_path")
    if said != (_PUSH,) or not isinstance(path, list | tuple) or len(path) < 2 or not isinstance(path[1], int):
        return said
    return (f"{_PUSH}:{path[1]}",)


def outermost_node(namespace: str | None) -> str | None:
    """`answerer:1f|model:2e` -> `answerer`."""
    if not namespace:
        return None
    return namespace.split(_PARENT_SEPARATOR, 1)[0].rsplit(_TASK_SEPARATOR, 1)[0] or None


def parent_namespace(namespace: str) -> str | None:
    """`outer:1f|2|model:2e` -> `outer:1f`: LangGraph numbers the second and later subgraph of one task."""
    segments = namespace.split(_PARENT_SEPARATOR)[:-1]
    while segments and segments[-1].isdigit():
        segments.pop()
    return _PARENT_SEPARATOR.join(segments) or None


def node_span_id(run_id: str | None, namespace: str) -> str:
    """Return the id of the span of the execution that has this namespace."""
    digest = hashlib.blake2b(f"{run_id or ''}\n{namespace}".encode(), digest_size=16).hexdigest()
    return f"span_{digest}"
