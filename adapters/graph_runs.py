"""One run per outermost graph invocation: `stream` and `astream` of a Pregel graph, with a run around them.

Everything that LangGraph offers (`invoke`, `batch`, `stream_events`, ...) passes through these two. The run's scope is
entered for each step of the graph and left before the consumer gets the chunk. An invocation inside an open run joins
that run: it opens and ends none, and its rewards (if `wrap` gave a function) go to that run.

A run ends `closed` when the graph ends; `failed` with the error when it raises, which the consumer gets unchanged; and
`failed: cancelled` when the consumer or the task stops early. Rewards are posted before the run is closed: a group is
ready when all its runs have ended. What the proxy refuses here never breaks the app: it is logged, and a run that could
not be opened leaves its calls unattributed (they are recorded, and never trained). An invocation that stops at an
interrupt ends its run; the one that resumes it is another. Called by `attach` and `langgraph`.
"""

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from tracegrad.adapters import span_notes
from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import ProxyError, RewardFailed
from tracegrad.adapters.rewards import RewardFunction, arewards_of, rewards_of
from tracegrad.adapters.scope import RunScope, entered, resolved_scope
from tracegrad.tracestore.records import Purpose, RunStatus

_MARK = "__tracegrad_runs__"
_MAX_ERROR_CHARS = 2000
_log = logging.getLogger("tracegrad.runs")


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphRuns:
    """How invocations become runs. `process` is what holds where no scope is entered."""

    client: ProxyClient
    process: RunScope
    purpose: Purpose = "live"
    reward: RewardFunction | None = None


@dataclass(frozen=True, slots=True)
class _Ending:
    status: RunStatus
    error: str | None = None


class _Invocation:
    """One invocation of a graph: the scope to enter for its steps, and how its run ends."""

    def __init__(self, runs: GraphRuns, given: Any, config: Mapping[str, Any] | None) -> None:
        self.runs = runs
        self.given = given
        self.config = config
        self.joined = resolved_scope(runs.process).run_id
        self.run_id: str | None = self.joined
        self.ending: _Ending | None = None
        self._final: Any = None
        if runs.reward is not None:
            from tracegrad.adapters.graph_output import FinalOutput, watched

            self._final = FinalOutput()
            self.config = watched(config, self._final)

    @property
    def scope(self) -> RunScope:
        around = resolved_scope(self.runs.process)
        return RunScope(run_id=self.run_id, role=around.role, proxy=around.proxy or self.runs.client.root)

    def opened(self, run_id: str) -> None:
        self.run_id = run_id

    def not_opened(self, error: ProxyError) -> None:
        _log.error("the calls of this invocation are not attributed: its run could not be opened: %s", error)

    def rewards(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"run_id": self.run_id, "source": "wrap", **row} for row in rows]

    @property
    def rewarded(self) -> bool:
        return self.run_id is not None and self._final is not None and self._final.seen

    @property
    def output(self) -> Any:
        return self._final.output

    def reward_lost(self, error: RewardFailed | ProxyError) -> None:
        said = str(error) if isinstance(error, RewardFailed) else f"the reward could not be posted: {error}"
        _log.error("run %s has no reward: %s", self.run_id, said)
        self.ending = _Ending("closed", said[:_MAX_ERROR_CHARS])

    def end(self, ending: _Ending) -> None:
        """End the run that was opened here; a joined one is somebody else's to end."""
        if self.run_id is None or self.joined is not None:
            return
        span_notes.flush(self.run_id)
        try:
            self.runs.client.end_run(self.run_id, status=ending.status, ended_by="hook", error=ending.error)
        except ProxyError as error:
            _log.error("run %s could not be ended as %s: %s", self.run_id, ending.status, error)


def _ending_of(error: BaseException) -> _Ending:
    if isinstance(error, GeneratorExit):
        return _Ending("failed", "cancelled: the stream was closed before its end")
    if isinstance(error, asyncio.CancelledError):
        return _Ending("failed", "cancelled: the task was cancelled")
    return _Ending("failed", f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS])


class _SyncRun:
    """Context manager around a sync invocation; the exception that ends it passes through."""

    def __init__(self, invocation: _Invocation) -> None:
        self.invocation = invocation

    def __enter__(self) -> _Invocation:
        one = self.invocation
        if one.run_id is None:
            try:
                one.opened(one.runs.client.open_run(purpose=one.runs.purpose).run_id)
            except ProxyError as error:
                one.not_opened(error)
        return one

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        one = self.invocation
        if error is not None:
            one.end(_ending_of(error))
            return
        self._reward(one)
        one.end(one.ending or _Ending("closed"))

    def _reward(self, one: _Invocation) -> None:
        if one.runs.reward is None or not one.rewarded:
            return
        try:
            rows = one.rewards(rewards_of(one.runs.reward, one.given, one.output))
            if rows:
                one.runs.client.post_rewards(rows)
        except (RewardFailed, ProxyError) as error:
            one.reward_lost(error)


class _AsyncRun:
    """The same around an async invocation. What ends a cancelled one is not awaited: cancellation goes on at once."""

    def __init__(self, invocation: _Invocation) -> None:
        self.invocation = invocation

    async def __aenter__(self) -> _Invocation:
        one = self.invocation
        if one.run_id is None:
            try:
                one.opened((await one.runs.client.aopen_run(purpose=one.runs.purpose)).run_id)
            except ProxyError as error:
                one.not_opened(error)
        return one

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        one = self.invocation
        if error is None:
            try:
                await self._reward(one)
            except asyncio.CancelledError as cancelled:
                _apart(one, _ending_of(cancelled))
                raise
            await asyncio.to_thread(one.end, one.ending or _Ending("closed"))
        elif isinstance(error, Exception):
            await asyncio.to_thread(one.end, _ending_of(error))
        else:
            _apart(one, _ending_of(error))

    async def _reward(self, one: _Invocation) -> None:
        if one.runs.reward is None or not one.rewarded:
            return
        try:
            rows = one.rewards(await arewards_of(one.runs.reward, one.given, one.output))
            if rows:
                await one.runs.client.apost_rewards(rows)
        except (RewardFailed, ProxyError) as error:
            one.reward_lost(error)


def _apart(one: _Invocation, ending: _Ending) -> None:
    """End the run in a thread of its own, which the interpreter waits for; in this one where none can be started."""
    thread = threading.Thread(target=one.end, args=(ending,), name="tracegrad-end-run", daemon=False)
    try:
        thread.start()
    except RuntimeError:
        one.end(ending)


def _drive(
    runs: GraphRuns, stream: Callable[..., Iterator[Any]], given: Any, config: Any, kwargs: Any
) -> Iterator[Any]:
    with _SyncRun(_Invocation(runs, given, config)) as one:
        scope = one.scope
        steps = stream(given, one.config, **kwargs)
        close: Callable[[], None] = getattr(steps, "close", lambda: None)
        try:
            while True:
                with entered(scope):
                    try:
                        chunk = next(steps)
                    except StopIteration:
                        break
                yield chunk
        finally:
            with entered(scope):
                close()


async def _adrive(
    runs: GraphRuns, astream: Callable[..., AsyncIterator[Any]], given: Any, config: Any, kwargs: Any
) -> AsyncIterator[Any]:
    async with _AsyncRun(_Invocation(runs, given, config)) as one:
        scope = one.scope
        steps = astream(given, one.config, **kwargs)
        aclose: Callable[[], Awaitable[None]] = getattr(steps, "aclose", _nothing)
        try:
            while True:
                with entered(scope):
                    try:
                        chunk = await anext(steps)
                    except StopAsyncIteration:
                        break
                yield chunk
        finally:
            with entered(scope):
                await aclose()


async def _nothing() -> None:
    """Close what has no `aclose`."""


def with_runs(
    original: Callable[..., Any], runs_of: Callable[[Any], GraphRuns], *, is_async: bool
) -> Callable[..., Any]:
    """Return the method `stream` (or `astream`) that opens and ends runs around `original`."""
    drive: Callable[..., Any] = _adrive if is_async else _drive

    @functools.wraps(original)
    def stream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> Any:  # noqa: A002
        runs = runs_of(self)
        if runs.reward is None and resolved_scope(runs.process).run_id is not None:
            return original(self, input, config, **kwargs)
        return drive(runs, functools.partial(original, self), input, config, kwargs)

    return stream


def patch_pregel(module: ModuleType, *, runs: GraphRuns) -> None:
    """Make each outermost invocation of any graph a run of its own: `tracegrad run` on `langgraph.pregel.main`."""
    pregel = module.Pregel
    if not hasattr(pregel, _MARK):
        setattr(pregel, _MARK, runs)
        pregel.stream = with_runs(pregel.stream, lambda _: runs, is_async=False)
        pregel.astream = with_runs(pregel.astream, lambda _: runs, is_async=True)
