"""The evaluation driver: one run per task (or `repeat` of them), purpose `eval`, scored and reported.

It measures the app as its users get it: nothing overrides its sampling, and an eval run can never be trained on.
Failed runs are reported apart and are never a score of 0. Intervals resample tasks; the runs of one task are
averaged first. Called by `tracegrad eval` and `tracegrad gate`, or from Python: `asyncio.run(Evaluation(...).run())`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracegrad.adapters.control import Control
from tracegrad.adapters.execution import RunExecutor, RunOutcome
from tracegrad.adapters.schedule import stable_id
from tracegrad.adapters.scoring import run_scores
from tracegrad.tracestore.bootstrap import Interval, bootstrap_difference, bootstrap_mean
from tracegrad.tracestore.records import Run, RunStatus, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One run of one task. `scores` is empty where the run failed or the reward function gave nothing."""

    task_id: str
    repeat: int
    run_id: str
    status: RunStatus
    scores: Mapping[str, float]
    output: Any = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The paired difference of one score (ours minus theirs) over the tasks that have it on both sides."""

    difference: Interval
    unpaired: int
    """Tasks that have the score on one side only: left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """What an evaluation found. `greedy`: whether every call was; None where there is no telling."""

    name: str
    n_tasks: int
    n_runs: int
    n_failed: int
    n_unscored: int
    scores: Mapping[str, Interval]
    greedy: bool | None
    comparison: Mapping[str, Comparison] | None
    errors: Mapping[str, int]


class Evaluation:
    """Evaluates one app over `tasks`. `run` is called once; `tell` hears of every run that ends.

    Ids of runs begin with `prefix` and depend on `name`.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        executor: RunExecutor,
        control: Control,
        *,
        repeat: int = 1,
        concurrency: int = 16,
        prefix: str = "run",
        tell: Callable[[RunOutcome], None] = lambda outcome: None,
    ) -> None:
        self._name = name
        self._tasks = tasks
        self._executor = executor
        self._control = control
        self._repeat = repeat
        self._concurrency = concurrency
        self._prefix = prefix
        self._tell = tell

    async def run(self) -> list[EvalRow]:
        """Execute every run and return the rows in the order of the tasks.

        Raises:
            RolloutStopped: the proxy stayed away. Runs in flight are ended as failed first, also when cancelled.
        """
        await self._control.put_tasks(self._tasks)
        slots = asyncio.Semaphore(self._concurrency)
        planned = [(task, repeat) for task in self._tasks for repeat in range(self._repeat)]
        try:
            async with asyncio.TaskGroup() as runs:
                started = [runs.create_task(self._execute(task, repeat, slots)) for task, repeat in planned]
        except asyncio.CancelledError:
            await self._executor.fail_open_runs("evaluation interrupted")
            raise
        except BaseExceptionGroup as errors:
            await self._executor.fail_open_runs("evaluation stopped")
            raise errors.exceptions[0] from errors
        return [task.result() for task in started]

    async def _execute(self, task: Task, repeat: int, slots: asyncio.Semaphore) -> EvalRow:
        run_id = stable_id(self._prefix, self._name, task.task_id, repeat, 0)
        run = Run(run_id=run_id, purpose="eval", task_id=task.task_id)
        async with slots:
            await self._control.put_tasks([task])  # again: its content may have gone with its earlier runs since
            outcome = await self._executor.execute(run, task)
        self._tell(outcome)
        return EvalRow(
            task_id=task.task_id,
            repeat=repeat,
            run_id=run.run_id,
            status=outcome.status,
            scores=run_scores(outcome.rewards),
            output=outcome.output,
            error=outcome.error or outcome.reward_error,
        )


def report(
    name: str,
    rows: Sequence[EvalRow],
    *,
    greedy: bool | None = None,
    other: Sequence[EvalRow] | None = None,
    seed: int = 0,
) -> EvalReport:
    """Summarise rows; with `other`, the rows of another evaluation, compare task by task."""
    scores = task_scores(rows)
    errors: dict[str, int] = {}
    for row in rows:
        if row.error is not None:
            errors[row.error] = errors.get(row.error, 0) + 1
    return EvalReport(
        name=name,
        n_tasks=len({row.task_id for row in rows}),
        n_runs=len(rows),
        n_failed=sum(row.status == "failed" for row in rows),
        n_unscored=sum(row.status == "closed" and not row.scores for row in rows),
        scores={score: bootstrap_mean(list(by_task.values()), seed=seed) for score, by_task in scores.items()},
        greedy=greedy,
        comparison=None if other is None else _compare(scores, task_scores(other), seed),
        errors=errors,
    )


def task_scores(rows: Sequence[EvalRow]) -> dict[str, dict[str, float]]:
    """Return score name -> task id -> the mean over the task's runs that have the score."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, value in row.scores.items():
            values.setdefault(name, {}).setdefault(row.task_id, []).append(value)
    return {
        name: {task: sum(found) / len(found) for task, found in by_task.items()}
        for name, by_task in sorted(values.items())
    }


def _compare(
    ours: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]], seed: int
) -> dict[str, Comparison]:
    found: dict[str, Comparison] = {}
    for name in ours.keys() & theirs.keys():
        both = sorted(ours[name].keys() & theirs[name].keys())
        if both:
            after, before = [ours[name][task] for task in both], [theirs[name][task] for task in both]
            difference = bootstrap_difference(after, before, seed=seed)
            unpaired = len(ours[name].keys() ^ theirs[name].keys())
            found[name] = Comparison(difference=difference, unpaired=unpaired)
    return dict(sorted(found.items()))
