"""Raw threads and raw executors: what a node starts by itself belongs to the node's run, as its asyncio tasks do.

Threads do not inherit context variables, so a call made in `ThreadPoolExecutor.submit(...)` or in a `Thread` would have
no run. Only our own scope is carried over, with the node that started it, and only where there is one: the app's own
context variables stay as they are. A task of an executor carries the scope for itself alone. A thread carries it for
its whole life, so daemon threads (workers that outlive a run and serve others) and the executors' own carry none: a
wrong attribution is worse than none. Called by `hook.install`.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from tracegrad.adapters.caller import read_caller
from tracegrad.adapters.scope import RunScope, current_scope, entered

EXECUTOR_MODULE = "concurrent.futures.thread"
_MARK = "__tracegrad_threads__"


def carry_into_threads() -> None:
    """Make `threading.Thread` carry the scope of whoever starts it. Idempotent."""
    original = threading.Thread.start
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        scope = None if self.daemon or _is_worker(self) else _carried()
        if scope is not None:
            self.run = functools.partial(_within, scope, self.run)  # type: ignore[method-assign]
        original(self)

    setattr(start, _MARK, True)
    threading.Thread.start = start  # type: ignore[method-assign]


def carry_into_executors(module: ModuleType) -> None:
    """Make `ThreadPoolExecutor.submit` (and with it `map`) carry the scope into each task. Idempotent."""
    original = module.ThreadPoolExecutor.submit
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        scope = _carried()
        if scope is None:
            return original(self, fn, *args, **kwargs)
        return original(self, functools.partial(_within, scope, fn), *args, **kwargs)

    setattr(submit, _MARK, True)
    module.ThreadPoolExecutor.submit = submit


def _carried() -> RunScope | None:
    """Return the scope here, with the node that runs here; None where there is neither."""
    scope, caller = current_scope(), read_caller()
    if caller.node is None:
        return scope
    return replace(scope or RunScope(), starter=caller)


def _within(scope: RunScope, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with entered(scope):
        return work(*args, **kwargs)


def _is_worker(thread: threading.Thread) -> bool:
    return getattr(getattr(thread, "_target", None), "__module__", None) == EXECUTOR_MODULE
