"""This process as an app's host: the environment and the hook first, then the app, then one event loop for its runs.

Apps build their model clients when they are imported, so OPENAI_* and the hook must be there before. Refuses a proxy
that does not answer; waits a while for one whose engine is away. Called by the rollout and evaluation commands.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from tracegrad.adapters import hook
from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.control import Control
from tracegrad.adapters.entrypoint import load_entrypoint
from tracegrad.adapters.errors import ProxyFailed
from tracegrad.adapters.execution import Graph, RunExecutor
from tracegrad.adapters.launch import environment
from tracegrad.adapters.rollout_errors import EntryPointError
from tracegrad.adapters.scope import RunScope, key_named
from tracegrad.tracestore.records import Purpose

_R = TypeVar("_R")
_PATIENCE_S = 60.0
_NOT_OURS = ("PYTHONPATH", "TRACEGRAD_RUN", "TRACEGRAD_PURPOSE")
"""`launch.environment` makes these for another process; here the scopes say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AppSession:
    """An app that is loaded and pointed at the proxy, and what drives it."""

    executor: RunExecutor
    control: Control


def open_session(root: str, *, app: str, reward: str | None, purpose: Purpose, source: str) -> AppSession:
    """Point this process at the proxy `root`, then import the app and the reward function.

    Raises:
        ProxyUnreachable: nobody answers at `root`.
        ProxyFailed: it is not well (its engine or store is away), and was not for `_PATIENCE_S`.
        EntryPointError: the app or the reward function cannot be imported or is not one.
    """
    client = ProxyClient(root)
    _wait_until_well(client)
    made = environment(os.environ, client.root, purpose=purpose)
    os.environ.update({name: value for name, value in made.items() if name not in _NOT_OURS})
    hook.install(RunScope(proxy=client.root, api_key=key_named(os.environ)))
    control = Control(client, source=source)
    graph = Graph(load_entrypoint(app, option="--app"), name=app)
    function: Any = None
    if reward is not None:
        function = load_entrypoint(reward, option="--reward")
        if not callable(function):
            raise EntryPointError(f"--reward {reward!r} is a {type(function).__name__}, not a function")
    return AppSession(executor=RunExecutor(graph, function, control, proxy=client.root), control=control)


def _wait_until_well(client: ProxyClient) -> None:
    give_up_at = time.monotonic() + _PATIENCE_S
    while True:
        try:
            client.health()
            return
        except ProxyFailed:
            if time.monotonic() >= give_up_at:
                raise
        time.sleep(0.5)


class _AppThreads(ThreadPoolExecutor):
    """The loop's threads: sync nodes, reward functions, our own requests. `abandon` leaves busy ones behind."""

    abandon = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait and not self.abandon, cancel_futures=cancel_futures)


def run_loop(main: Callable[[], Coroutine[Any, Any, _R]], *, concurrency: int) -> _R:
    """Run `main()` to its end on an event loop with threads enough for `concurrency` runs of sync nodes.

    SIGINT and SIGTERM cancel it once; what it does about that is its own business.

    Raises:
        KeyboardInterrupt: a second Ctrl-C, or `main` passed the cancellation on.
    """
    threads = _AppThreads(max_workers=32 + 4 * concurrency, thread_name_prefix="tracegrad-app")

    async def hosted() -> _R:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(threads)
        task = asyncio.current_task()
        assert task is not None
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            return await main()
        finally:
            threads.abandon = task.cancelling() > 0

    try:
        return asyncio.run(hosted())
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error


def leave(code: int) -> NoReturn:
    """Leave the process at once: threads that still wait for a model's answer are not waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
