"""One run of an app on one task: open, invoke inside its scope, score, post the rewards, end.

A graph that raises makes a failed run with the error's text and no reward; a reward function that raises makes a
closed run without reward: neither is ever a reward of 0 (law 6). Rewards are posted before the run ends, because a
group whose runs have all ended may be leased at once. Called by the rollout and evaluation drivers.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from tracegrad.adapters import span_notes
from tracegrad.adapters.control import Control
from tracegrad.adapters.errors import ProxyRefused
from tracegrad.adapters.rollout_errors import EntryPointError
from tracegrad.adapters.scope import RunScope, entered
from tracegrad.adapters.scoring import RewardFunction, RewardSpec, read_rewards, score
from tracegrad.tracestore.records import Run, RunStatus, Task

_LONGEST_ERROR = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """What became of a run. `error` is the graph's, `reward_error` the reward function's."""

    run_id: str
    task_id: str
    status: RunStatus
    seconds: float
    output: Any = None
    rewards: tuple[RewardSpec, ...] = ()
    error: str | None = None
    reward_error: str | None = None


class Graph:
    """A compiled graph, or anything with `ainvoke` or `invoke`.

    Prefers `ainvoke`; falls back to threads for good where the graph says that it cannot (a checkpointer without
    async methods raises NotImplementedError before any node runs).
    """

    def __init__(self, graph: Any, *, name: str) -> None:
        if not hasattr(graph, "ainvoke") and not hasattr(graph, "invoke"):
            kind = type(graph).__name__
            hint = "; compile it first: graph.compile()" if hasattr(graph, "compile") else ""
            raise EntryPointError(f"--app {name!r} is a {kind} without invoke or ainvoke{hint}")
        self._graph = graph
        self._async = hasattr(graph, "ainvoke")

    async def invoke(self, task_input: Any, scope: RunScope) -> Any:
        """Run the graph to its end inside `scope`; the thread id of its checkpointer, if any, is the run's."""
        config = {"configurable": {"thread_id": scope.run_id}}
        with entered(scope):
            if self._async:
                try:
                    return await self._graph.ainvoke(task_input, config)
                except NotImplementedError:
                    if not hasattr(self._graph, "invoke"):
                        raise
                    self._async = False
            return await asyncio.to_thread(self._graph.invoke, task_input, config)


class RunExecutor:
    """Executes runs of one app under one reward function; safe for many runs at once."""

    def __init__(self, graph: Graph, reward: RewardFunction | None, control: Control, *, proxy: str) -> None:
        self._graph = graph
        self._reward = reward
        self._control = control
        self._proxy = proxy
        self.open: dict[str, float] = {}
        """Runs in flight -> when they were opened (monotonic)."""

    async def execute(self, run: Run, task: Task) -> RunOutcome:
        """Execute one run and return what became of it. Only errors of the proxy's own API are raised."""
        started = time.monotonic()
        self.open[run.run_id] = started
        await self._control.open_run(run)
        scope = RunScope(run_id=run.run_id, proxy=self._proxy)
        output, error = await _attempt(self._graph.invoke(dict(task.input), scope))
        if error is None and isinstance(output, dict) and "__interrupt__" in output:
            error = "the graph stopped at an interrupt and waits for a person: a rollout cannot answer it"
        specs: tuple[RewardSpec, ...] = ()
        reward_error = None
        if error is None and self._reward is not None:
            found, reward_error = await _attempt(self._score(task, output))
            specs = found or ()
            await self._control.reward(run.run_id, specs)
        status: RunStatus = "closed" if error is None else "failed"
        said = error if reward_error is None else f"no reward: the reward function raised {reward_error}"
        await asyncio.to_thread(span_notes.flush, run.run_id)
        await self._control.end_run(run.run_id, status, said)
        del self.open[run.run_id]
        return RunOutcome(
            run_id=run.run_id,
            task_id=task.task_id,
            status=status,
            seconds=time.monotonic() - started,
            output=output,
            rewards=specs,
            error=error,
            reward_error=reward_error,
        )

    async def fail_open_runs(self, why: str) -> int:
        """End every run in flight as failed, after the tasks that executed them were cancelled; return how many.

        Runs that the proxy cannot be told of within seconds stay open: the next start of the rollout ends them.
        """
        self._control.hurry()
        ended = 0
        for run_id in list(self.open):
            # Refused: the run was never opened, or its end was already under way when its task was cancelled.
            with contextlib.suppress(ProxyRefused):
                await self._control.end_run(run_id, "failed", why)
                ended += 1
            del self.open[run_id]
        return ended

    async def _score(self, task: Task, output: Any) -> tuple[RewardSpec, ...]:
        assert self._reward is not None
        return read_rewards(await score(self._reward, task, output, call=asyncio.to_thread))


async def _attempt(foreign: Awaitable[Any]) -> tuple[Any, str | None]:
    """Await the app's or the user's code: (result, None) or (None, error text). Anything at all may arrive here."""
    try:
        return await foreign, None
    except (Exception, SystemExit) as error:  # noqa: BLE001
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return None, text[:_LONGEST_ERROR]
