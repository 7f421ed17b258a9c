"""The rollout driver: samples groups of runs of one app over a task list, through the proxy. Resumable.

Ids come from (name, task, pass, member), so a second start under the same name finds what the first one did and
does only what is missing. A run that a killed rollout left open is ended as failed and stays failed: the store holds
one run per (group, member), and an absent member is what a group expects of a failure. One process per name at a
time. Refuses to go on when many runs in a row fail. Called by `tracegrad rollout`, or from Python:
`asyncio.run(Rollout(...).run())`.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tracegrad.adapters.control import Control
from tracegrad.adapters.execution import RunExecutor, RunOutcome
from tracegrad.adapters.pacing import Pacer
from tracegrad.adapters.rollout_errors import RolloutStopped
from tracegrad.adapters.schedule import PlannedGroup, planned_groups, run_id
from tracegrad.adapters.scoring import run_scores
from tracegrad.tracestore.records import Group, Purpose, Run, Task

INTERRUPTED = "rollout interrupted"
_ERRORS_KEPT = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """What to sample. `groups` in all; a round is `tasks_per_round` of them, a unit of the report only."""

    name: str
    groups: int
    group_size: int = 8
    purpose: Purpose = "train"
    concurrency: int = 16
    ahead: int | None = None
    seed: int = 0
    tasks_per_round: int | None = None
    max_failures: int = 32
    """So many failed runs in a row stop the rollout."""


@dataclass(kw_only=True, slots=True)
class GroupProgress:
    """One group while it is sampled: members still to end, and what the ended ones got."""

    planned: PlannedGroup
    left: int
    outcomes: list[RunOutcome] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """One round's groups that this start sampled: how many runs ended how, and the mean of each score."""

    round: int
    groups: int
    runs: int
    failed: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSummary:
    """What a start of a rollout did. Means are over the runs that have the score; `*_before` are earlier starts'."""

    name: str
    purpose: Purpose
    groups_planned: int
    groups_done: int
    groups_before: int
    runs_closed: int
    runs_failed: int
    runs_before: int
    runs_without_reward: int
    reward_errors: int
    scores: dict[str, float]
    rounds: list[RoundReport]
    errors: dict[str, int]
    seconds: float
    seconds_waiting: float
    interrupted: bool = False


class Watcher:
    """What a rollout tells while it runs; this one keeps quiet. See `rollout_progress` for those that do not."""

    def begin(self, rollout: "Rollout") -> None:
        """The rollout starts."""

    def group_done(self, rollout: "Rollout", group: GroupProgress) -> None:
        """Every member of a group has ended."""

    def waiting(self, why: str | None) -> None:
        """New groups are held back; None: no longer."""

    def close(self) -> None:
        """Nothing more comes."""


class Rollout:
    """One start of a rollout over `tasks`. `run` is called once."""

    def __init__(
        self,
        plan: RolloutPlan,
        tasks: Sequence[Task],
        executor: RunExecutor,
        control: Control,
        watcher: Watcher | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.done: list[GroupProgress] = []
        self.groups_before = 0
        self._tasks = tasks
        self._executor = executor
        self._control = control
        self._watcher = watcher or Watcher()
        self._pacer = Pacer(control, ahead=plan.ahead, needs_version=plan.purpose == "train", say=self._watcher.waiting)
        self._slots = asyncio.Semaphore(plan.concurrency)
        self._active: dict[str, GroupProgress] = {}
        self._runs_before = 0
        self._failures_in_row = 0
        self._clock = clock
        self._started = clock()
        self._interrupted = False

    @property
    def runs_in_flight(self) -> int:
        """How many runs are open now."""
        return len(self._executor.open)

    async def run(self) -> RolloutSummary:
        """Sample what is missing and return the summary.

        When the task that runs this is cancelled, the runs in flight are ended as failed and the summary says
        `interrupted`; the cancellation itself is not passed on.

        Raises:
            RolloutStopped: too many runs failed in a row, or the proxy stayed away. Runs in flight are ended first.
        """
        self._watcher.begin(self)
        try:
            await self._control.put_tasks(self._tasks)
            async with asyncio.TaskGroup() as members:
                for planned in planned_groups(
                    self.plan.name, self._tasks, seed=self.plan.seed, groups=self.plan.groups
                ):
                    await self._sample(planned, members)
        except asyncio.CancelledError:
            self._interrupted = True
            await self._executor.fail_open_runs(INTERRUPTED)
        except BaseExceptionGroup as errors:
            await self._executor.fail_open_runs("rollout stopped")
            raise errors.exceptions[0] from errors
        finally:
            self._watcher.close()
        return self.summary()

    async def _sample(self, planned: PlannedGroup, members: asyncio.TaskGroup) -> None:
        missing = await self._missing_members(planned)
        if not missing:
            self.groups_before += 1
            return
        await self._pacer.hold(lambda: len(self._active))
        group = self._active[planned.group_id] = GroupProgress(planned=planned, left=len(missing))
        for member in missing:
            await self._slots.acquire()
            members.create_task(self._execute(group, member))

    async def _missing_members(self, planned: PlannedGroup) -> list[int]:
        """Store the group and return the members it lacks, after ending those that a killed start left open."""
        size, purpose = self.plan.group_size, self.plan.purpose
        group = Group(group_id=planned.group_id, task_id=planned.task.task_id, planned_size=size, purpose=purpose)
        await self._control.put_tasks([planned.task])  # again: its content may have gone with its earlier runs since
        before = await self._control.open_group(group)
        for run in before:
            if run.status == "open":
                await self._control.end_run(run.run_id, "failed", INTERRUPTED)
        self._runs_before += len(before)
        return sorted(set(range(size)) - {run.member for run in before if run.member is not None})

    async def _execute(self, group: GroupProgress, member: int) -> None:
        planned, plan = group.planned, self.plan
        run = Run(
            run_id=run_id(plan.name, planned.task.task_id, planned.pass_index, member),
            purpose=plan.purpose,
            task_id=planned.task.task_id,
            group_id=planned.group_id,
            member=member,
        )
        try:
            outcome = await self._executor.execute(run, planned.task)
        finally:
            self._slots.release()
        group.outcomes.append(outcome)
        group.left -= 1
        if group.left == 0:
            self.done.append(self._active.pop(planned.group_id))
            self._watcher.group_done(self, group)
        self._count_failure(outcome)

    def _count_failure(self, outcome: RunOutcome) -> None:
        self._failures_in_row = self._failures_in_row + 1 if outcome.status == "failed" else 0
        if self._failures_in_row >= self.plan.max_failures:
            raise RolloutStopped(
                f"{self._failures_in_row} runs in a row failed, the last one ({outcome.run_id}) with {outcome.error}; "
                f"mend that, then start again with --name {self.plan.name}"
            )

    def summary(self) -> RolloutSummary:
        """Return what has been done so far."""
        outcomes = [outcome for group in (*self.done, *self._active.values()) for outcome in group.outcomes]
        closed = [outcome for outcome in outcomes if outcome.status == "closed"]
        errors = Counter(error for outcome in outcomes if (error := outcome.error or outcome.reward_error))
        return RolloutSummary(
            name=self.plan.name,
            purpose=self.plan.purpose,
            groups_planned=self.plan.groups,
            groups_done=len(self.done),
            groups_before=self.groups_before,
            runs_closed=len(closed),
            runs_failed=len(outcomes) - len(closed),
            runs_before=self._runs_before,
            runs_without_reward=sum(not outcome.rewards for outcome in closed),
            reward_errors=sum(outcome.reward_error is not None for outcome in closed),
            scores=mean_scores(closed),
            rounds=self._rounds(),
            errors=dict(errors.most_common(_ERRORS_KEPT)),
            seconds=self._clock() - self._started,
            seconds_waiting=self._pacer.waited_s,
            interrupted=self._interrupted,
        )

    def _rounds(self) -> list[RoundReport]:
        size = self.plan.tasks_per_round or len(self._tasks)
        rounds: dict[int, list[GroupProgress]] = {}
        for group in self.done:
            rounds.setdefault(group.planned.index // size, []).append(group)
        return [_round_report(number, groups) for number, groups in sorted(rounds.items())]


def mean_scores(outcomes: Sequence[RunOutcome]) -> dict[str, float]:
    """Return the mean of each named score over the runs that have it."""
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        for name, value in run_scores(outcome.rewards).items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def _round_report(number: int, groups: Sequence[GroupProgress]) -> RoundReport:
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    return RoundReport(
        round=number + 1, groups=len(groups), runs=len(outcomes), failed=failed, scores=mean_scores(outcomes)
    )
