"""What a node's execution wrote in order to make others run, as LangGraph's runner has it when the execution is done.

A node knows its triggers, but not who pulled them: an edge, a route, a `Command` or a `Send` of which execution. That
stands in the task's writes, which no callback shows. `PregelRunner.commit`, which LangGraph calls once for each task,
is watched for it; it is no public name, so where it is missing or another shape, nothing is told, and the graph of the
run says what it said without (see `tracestore.edges`). Changes nothing and never raises. Called by `hook.install`.
"""

import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from tracegrad.adapters.caller import caller_of

RUNNER_MODULE = "langgraph.pregel._runner"
SEND = "send:"
"""A write that makes a node run once more with an input of its own: `send:` and the node."""

_SENDS = "__pregel_tasks"
_MARK = "__tracegrad_writes__"
Told = Callable[[str, str, tuple[str, ...]], None]
"""Takes the namespace of an execution, its node and what it wrote."""


def watch(module: ModuleType, told: Told) -> None:
    """Tell of each task that the runner commits without an error. Idempotent."""
    runner = getattr(module, "PregelRunner", None)
    original = getattr(runner, "commit", None)
    if runner is None or original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def commit(self: Any, task: Any, exception: BaseException | None, *args: Any, **kwargs: Any) -> Any:
        if exception is None:
            _tell(task, told)
        return original(self, task, exception, *args, **kwargs)

    setattr(commit, _MARK, True)
    runner.commit = commit


def _tell(task: Any, told: Told) -> None:
    config, writes, name = (getattr(task, part, None) for part in ("config", "writes", "name"))
    if not isinstance(config, dict) or not isinstance(name, str):
        return
    namespace = caller_of(config).namespace
    if namespace is not None and (wrote := channels_of(writes)) is not None:
        told(namespace, name, wrote)


def channels_of(writes: Any) -> tuple[str, ...] | None:
    """Return the channels of a task's writes, each once, and every `Send` in its order; None where that is no list."""
    if not isinstance(writes, Iterable):
        return None
    found: list[str] = []
    for write in tuple(writes):
        if not isinstance(write, tuple) or len(write) != 2 or not isinstance(write[0], str):
            return None
        channel, value = write
        if channel == _SENDS:
            found.append(f"{SEND}{getattr(value, 'node', '')}")
        elif not channel.startswith("__") and channel not in found:
            found.append(channel)
    return tuple(found)
