"""New rewards for stored runs: a function over the trace of each, without the app and without an engine.

The function gets a run as the store has it (`RunTrace`: calls, answers, spans, the rewards so far) and its task, or
None where it has none, and returns what a reward function of a rollout returns. Rewards are appended; one that says
what the current one of the same source says already is left out, so that the same function can be run again. Where it
raises, its run gets no reward (law 6), and is counted. Runs whose content was deleted are passed over. Reads the
store in batches, and holds the runs and tasks of one. Called by `reward_command`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracegrad.adapters.errors import RewardFailed
from tracegrad.adapters.rewards import arewards_of
from tracegrad.adapters.scoring import RewardResult
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.records import Purpose, Reward, RunTrace, Task
from tracegrad.tracestore.schema import CONTENT_DELETED
from tracegrad.tracestore.store import Store

TraceFunction = Callable[[RunTrace, Task | None], RewardResult | Awaitable[RewardResult]]
BATCH = 64
MOST_FAILURES_TOLD = 5


@dataclass(slots=True)
class Rescored:
    """What became of the runs. `late`: training jobs that had trained a run already, and how many of them."""

    runs: int = 0
    rewarded: int = 0
    unchanged: int = 0
    without: int = 0
    failed: int = 0
    appended: int = 0
    late: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def closed_runs(
    store: Store, *, project: str | None, purpose: Purpose | None, since: float | None
) -> Iterator[list[str]]:
    """Yield the ids of the closed runs in batches, newest first. `since` in Unix seconds: opened then or later."""
    before: str | None = None
    while listed := store.list_runs(project=project, purpose=purpose, status="closed", limit=BATCH, before=before):
        chosen = [one.run.run_id for one in listed if since is None or one.run.opened_at >= since]
        if chosen:
            yield chosen
        if len(chosen) < len(listed):
            return
        before = listed[-1].run.run_id


class Rescoring:
    """One pass of a function. `source` is what the rewards say they come from."""

    def __init__(self, store: Store, function: TraceFunction, *, source: str, dry_run: bool = False) -> None:
        self.done = Rescored()
        self._store = store
        self._function = function
        self._source = source
        self._dry_run = dry_run

    async def score(self, run_ids: Sequence[str]) -> None:
        """Score these runs and append their rewards, in one transaction.

        Raises:
            NotFound: no such run.
            TraceStoreError: the store cannot be read, or refuses the rewards; nothing of the batch was written.
        """
        traces = [one for one in self._store.traces(run_ids) if one.run.error != CONTENT_DELETED]
        tasks: dict[str, Task] = {}  # of this batch only: those of a store may be larger than memory
        rows = [row for trace in traces for row in await self._rows(trace, tasks)]
        if self._dry_run:
            self.done.appended += len(rows)
            return
        late: dict[str, set[str]] = {}
        for stored in self._store.add_rewards(rows):
            self.done.appended += 1
            for job_id in stored.late_for:
                late.setdefault(job_id, set()).add(stored.run_id)
        for job_id, runs in late.items():
            self.done.late[job_id] = self.done.late.get(job_id, 0) + len(runs)

    async def _rows(self, trace: RunTrace, tasks: dict[str, Task]) -> list[Reward]:
        """Return what the function says of the run and its current rewards do not."""
        self.done.runs += 1
        try:
            rows = await arewards_of(self._function, trace, self._task(trace, tasks))
            _check_calls(rows, trace)
        except RewardFailed as error:
            self.done.failed += 1
            if len(self.done.failures) < MOST_FAILURES_TOLD:
                self.done.failures.append(f"{trace.run.run_id}: {error}")
            return []
        said = {(one.name, one.role, one.call_id): one.value for one in trace.rewards if one.source == self._source}
        new = [row for row in rows if said.get((row["name"], row.get("role"), row.get("call_id"))) != row["value"]]
        if not rows:
            self.done.without += 1
        elif new:
            self.done.rewarded += 1
        else:
            self.done.unchanged += 1
        return [Reward(reward_id=new_id("reward"), run_id=trace.run.run_id, source=self._source, **row) for row in new]

    def _task(self, trace: RunTrace, tasks: dict[str, Task]) -> Task | None:
        task_id = trace.run.task_id
        if task_id is None:
            return None
        if task_id not in tasks:
            try:
                tasks[task_id] = self._store.get_task(task_id)
            except NotFound as error:  # its content went with other runs
                raise RewardFailed(str(error)) from error
        return tasks[task_id]


def _check_calls(rows: Sequence[Mapping[str, Any]], trace: RunTrace) -> None:
    known = {call.call_id for call in trace.calls}
    for row in rows:
        if row.get("call_id", None) not in {None, *known}:
            raise RewardFailed(f"reward {row['name']!r} names the call {row['call_id']!r}, which the run does not have")


def run_pass(
    pass_: Rescoring, batches: Iterator[Sequence[str]], *, each: Callable[[Rescored], None] = lambda done: None
) -> Rescored:
    """Score every batch on one event loop; `each` is told after each. Raises as `Rescoring.score`."""

    async def main() -> None:
        for run_ids in batches:
            await pass_.score(run_ids)
            each(pass_.done)

    asyncio.run(main())
    return pass_.done
