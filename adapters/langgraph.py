"""`wrap(graph, reward=...)`: a graph with the graph's own interface, each of whose invocations is a run.

    from tracegrad.adapters.langgraph import wrap
    graph = wrap(graph, proxy="http://127.0.0.1:8080", reward=lambda input, output: float(output["ok"]))

The result is an instance of the graph's own class (a subclass of it), so that whatever takes a graph takes it: batches,
event streams, state and history, `with_config`, use as a node. Inside an open run it opens none (see `graph_runs`).
Refuses what is not a compiled graph: `graph.with_retry()` or `graph | parser` is wrapped as `wrap(graph).with_retry()`,
`wrap(graph) | parser`. Imports neither LangGraph nor LangChain by itself. Called by users.
"""

import os
import sys
from typing import Any, TypeVar

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.graph_runs import GraphRuns, with_runs
from tracegrad.adapters.hook import install
from tracegrad.adapters.rewards import RewardFunction
from tracegrad.adapters.scope import proxy_named, scope_from_environ
from tracegrad.tracestore.records import Purpose

_Graph = TypeVar("_Graph")
_RUNS = "_tracegrad_runs"
_BARE = "_tracegrad_bare_class"


def wrap(
    graph: _Graph,
    *,
    proxy: str | None = None,
    reward: RewardFunction | None = None,
    purpose: Purpose = "live",
) -> _Graph:
    """Return `graph` with a run around each invocation; `graph` itself stays as it is. Installs the hook.

    `proxy` is the proxy's root URL (default: the environment's TRACEGRAD_PROXY); the app's own clients must point
    there as well (OPENAI_BASE_URL). `reward(input, output)`, sync or async, gets the graph's input and the state
    that `invoke` returns, and gives a number, a mapping of names to numbers, a list of `scoring.RewardSpec`, or None
    for no reward. If it raises, the run is closed without a reward and says why; the app is not disturbed.

    Raises:
        NoProxyNamed: neither `proxy` nor the environment says where the proxy is.
        TypeError: `graph` is not a compiled LangGraph graph, or is wrapped already.
    """
    pregel: Any = getattr(sys.modules.get("langgraph.pregel.main"), "Pregel", None)
    if pregel is None or not isinstance(graph, pregel):
        raise TypeError(
            f"wrap takes a compiled LangGraph graph, not {type(graph).__name__}: wrap the graph itself and compose "
            "afterwards, as in wrap(graph).with_retry()"
        )
    if hasattr(graph, _RUNS):
        raise TypeError("the graph is wrapped already; wrap the bare one")
    process = scope_from_environ(os.environ)
    install(process)
    client = ProxyClient(proxy_named(proxy, os.environ))
    wrapped: _Graph = _rewrapped(graph, GraphRuns(client=client, process=process, purpose=purpose, reward=reward))
    return wrapped


def _rewrapped(graph: Any, runs: GraphRuns) -> Any:
    """A shallow copy of `graph`, of a subclass of its class that opens runs."""
    cls = type(graph)
    methods: dict[str, Any] = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "stream": with_runs(cls.stream, lambda self: self.__dict__[_RUNS], is_async=False),
        "astream": with_runs(cls.astream, lambda self: self.__dict__[_RUNS], is_async=True),
        "copy": _copy,
        _BARE: cls,
    }
    wrapped: Any = object.__new__(type(cls.__name__, (cls,), methods))
    wrapped.__dict__.update(graph.__dict__)
    wrapped.__dict__[_RUNS] = runs
    return wrapped


def _copy(self: Any, update: dict[str, Any] | None = None) -> Any:
    """`Pregel.copy`, which `with_config` uses, hands every attribute to the constructor: ours is not one of its."""
    bare: Any = object.__new__(getattr(self, _BARE))
    bare.__dict__.update({name: value for name, value in self.__dict__.items() if name != _RUNS})
    return _rewrapped(bare.copy(update), self.__dict__[_RUNS])
