"""The driver's side of the proxy's own API: patient where the proxy is away for a while.

A supervised proxy that crashes is back in seconds, and every request made here carries ids made by the driver, so
repeating one is safe. Refuses to wait longer than `patience_s`; what the proxy refuses (4xx) is raised at once.
Called by the rollout and evaluation drivers, from their event loop.
"""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import ProxyFailed, ProxyUnreachable
from tracegrad.adapters.rollout_errors import RolloutStopped
from tracegrad.adapters.schedule import stable_id
from tracegrad.adapters.scoring import RewardSpec
from tracegrad.tracestore.records import Group, Run, RunStatus, Task

_R = TypeVar("_R")
_TASKS_AT_ONCE = 500
_RUNS_AT_ONCE = 16


class Control:
    """Opens, rewards and ends runs through one proxy; `source` is written on the rewards."""

    def __init__(self, client: ProxyClient, *, source: str, patience_s: float = 120.0, pause_s: float = 0.5) -> None:
        self.client = client
        self._source = source
        self._patience_s = self._usual_patience_s = patience_s
        self._pause_s = pause_s

    def hurry(self, patience_s: float = 5.0) -> None:
        """Wait no longer than this from now on: somebody wants to leave."""
        self._patience_s = min(self._patience_s, patience_s)

    def take_time(self) -> None:
        """Nobody wants to leave any more: wait as long as at first."""
        self._patience_s = self._usual_patience_s

    async def put_tasks(self, tasks: Sequence[Task]) -> None:
        """Store tasks, some hundreds a request."""
        for start in range(0, len(tasks), _TASKS_AT_ONCE):
            part = tasks[start : start + _TASKS_AT_ONCE]
            await self._reach(functools.partial(self.client.aput_tasks, part))

    async def open_group(self, group: Group) -> list[Run]:
        """Store a group and return the runs it already has: some where a rollout of this name ran before."""
        await self._reach(lambda: self.client.aput_groups([group]))
        return await self._reach(lambda: self.client.agroup_runs(group.group_id))

    async def open_run(self, run: Run) -> None:
        """Open a run under its own id."""
        await self._reach(
            lambda: self.client.aopen_run(
                run_id=run.run_id, purpose=run.purpose, task_id=run.task_id, group_id=run.group_id, member=run.member
            )
        )

    async def reward(self, run_id: str, specs: Sequence[RewardSpec]) -> None:
        """Post the rewards of a run in one request. Their ids depend on run, name and target: twice is once."""
        if not specs:
            return
        rows: list[dict[str, Any]] = []
        for spec in specs:
            reward_id = stable_id("rwd", run_id, spec.name, spec.role or spec.call_id or "", self._source)
            row = {"reward_id": reward_id, "run_id": run_id, "name": spec.name, "value": float(spec.value)}
            rows.append({**row, "source": self._source, **spec.target})
        await self._reach(lambda: self.client.apost_rewards(rows))

    async def end_run(self, run_id: str, status: RunStatus, error: str | None) -> None:
        """End a run explicitly."""
        await self._reach(lambda: self.client.aend_run(run_id, status=status, ended_by="explicit", error=error))

    async def backlog(self) -> dict[str, Any]:
        """Return how many groups wait for the trainer, and whether it publishes."""
        return await self._reach(self.client.abacklog)

    async def all_greedy(self, run_ids: Sequence[str]) -> bool | None:
        """Return whether every choice of these runs is flagged greedy; None without calls, or without flags."""
        flags: list[Any] = []
        for start in range(0, len(run_ids), _RUNS_AT_ONCE):
            part = run_ids[start : start + _RUNS_AT_ONCE]
            asked = [self._reach(functools.partial(self.client.aget_run, run_id)) for run_id in part]
            for shown in await asyncio.gather(*asked):
                flags += [call.get("flags") for call in shown["calls_summary"] if call["status"] == "complete"]
        if not flags or any(of_call is None for of_call in flags):
            return None
        return all("greedy" in of_choice for of_call in flags for of_choice in of_call)

    async def _reach(self, request: Callable[[], Awaitable[_R]]) -> _R:
        give_up_at = time.monotonic() + self._patience_s
        while True:
            try:
                return await request()
            except (ProxyUnreachable, ProxyFailed) as error:
                if time.monotonic() >= give_up_at:
                    raise RolloutStopped(f"gave up after {self._patience_s:g} s: {error}") from error
            await asyncio.sleep(self._pause_s)
