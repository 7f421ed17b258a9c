"""The reward function of `wrap`: `reward(input, output)`, sync or async, and what becomes of its result.

It runs outside the run's scope, so that a judge which calls a model through the proxy is no part of the run it
judges. A sync function never blocks an event loop; an async one under a sync call gets a loop of its own. Whatever it
raises becomes `RewardFailed`: there is no reward then, and the app goes on. Called by `graph_runs`.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from tracegrad.adapters.errors import RewardFailed
from tracegrad.adapters.scoring import RewardResult, read_rewards

RewardFunction = Callable[[Any, Any], RewardResult | Awaitable[RewardResult]]


def rewards_of(function: RewardFunction, given: Any, output: Any) -> list[dict[str, Any]]:
    """Return the rewards as rows of `ProxyClient.post_rewards`, less their target; empty for None.

    Raises:
        RewardFailed: the function raised, or returned something that is no reward.
    """
    with _failures():
        result = function(given, output)
        if inspect.isawaitable(result):
            result = _run(result)
        return _rows(result)


async def arewards_of(function: RewardFunction, given: Any, output: Any) -> list[dict[str, Any]]:
    """Like `rewards_of`, on the running loop; a sync function runs in a thread.

    Raises:
        RewardFailed: as `rewards_of`.
    """
    with _failures():
        if inspect.iscoroutinefunction(function):
            result = await function(given, output)
        else:
            result = await asyncio.to_thread(function, given, output)
            if inspect.isawaitable(result):
                result = await result
        return _rows(result)


def _rows(result: Any) -> list[dict[str, Any]]:
    rows = []
    for spec in read_rewards(result):
        rows.append({"name": spec.name, "value": float(spec.value), **spec.target})
    return rows


@contextmanager
def _failures() -> Iterator[None]:
    """Whatever the user's function raises becomes one kind of error."""
    try:
        yield
    except Exception as error:
        raise RewardFailed(f"reward function failed: {type(error).__name__}: {error}") from error


def _run(awaitable: Awaitable[Any]) -> Any:
    """Await in a loop of our own; where this thread already runs one, in another thread."""

    async def main() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracegrad-reward") as pool:
        return pool.submit(copy_context().run, asyncio.run, main()).result()
