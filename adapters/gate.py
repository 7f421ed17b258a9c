"""The evaluator behind the publish gate: it drives the app over the held-out tasks and stores what it found.

It looks for work in the store: a candidate that is being evaluated, whose runs it names so that proxies let them pass;
else the live version, where it has no evaluation on these tasks to compare candidates with. Where a job trains several
models, that is a version of each of them: candidates beside what is live of the others. An evaluation that cannot
be made is stored as such, so that the publisher need not wait for the time-out. It decides nothing. A killed one leaves
nothing behind that matters: the next one evaluates anew, if there is time. Called by `tracegrad gate`.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tracegrad.adapters.app_session import AppSession
from tracegrad.adapters.errors import AdapterError
from tracegrad.adapters.evaluation import EvalRow, Evaluation, task_scores
from tracegrad.tracestore.config import GateConfig
from tracegrad.tracestore.errors import InvalidRecord, StoreUnavailable
from tracegrad.tracestore.evaluations import Evaluator, Measured
from tracegrad.tracestore.gating import StoredEvaluation, run_prefix
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.records import ModelState, Task
from tracegrad.tracestore.store import Store

POLL_S = 0.1
AGAIN_S = 30.0
"""After a live version could not be evaluated, it is tried again no sooner, and only while a candidate waits for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The versions to evaluate as one (model -> version); for a publish, or (None) as those that serve."""

    versions: Mapping[str, int]
    publish_id: int | None

    @property
    def named(self) -> str:
        """What is said of it."""
        ids = [str(version_id) for _, version_id in sorted(self.versions.items())]
        return f"version{'s' * (len(ids) > 1)} {', '.join(ids)}"


class GateEvaluator:
    """Evaluates the versions of `models` until it is cancelled. `tell` hears of each evaluation that was stored."""

    def __init__(
        self,
        store: Store,
        evaluator: Evaluator,
        gate: GateConfig,
        tasks: Sequence[Task],
        session: AppSession,
        *,
        models: Sequence[str],
        expires_s: float,
        tell: Callable[[StoredEvaluation], None] = lambda stored: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._store = store
        self._evaluator = evaluator
        self._models = tuple(models)
        self._gate = gate
        self._tasks = tasks
        self._session = session
        self._expires_s = expires_s
        self._tell = tell
        self._warn = warn
        self._cleared = False

    async def run(self) -> None:
        """Look for work for ever. What it was at when it is cancelled is ended as failed."""
        beating = asyncio.create_task(self._beat(), name="tracegrad-gate-heartbeat")
        try:
            while True:
                try:
                    work = await asyncio.to_thread(self._find)
                    if work is not None:
                        await self._do(work)
                        continue
                    await self._clear()
                except StoreUnavailable as error:
                    self._warn(f"the store is away: {error}")
                await asyncio.sleep(POLL_S)
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._store.beat_evaluator, self._evaluator)
            except StoreUnavailable as error:
                self._warn(f"no heartbeat could be written: {error}")
            await asyncio.sleep(self._expires_s / 4)

    def _find(self) -> Work | None:
        """Look once, in a thread."""
        states = self._store.publish_view(self._models)
        live = {model: state.live_version for model, state in states.items() if state.live_version is not None}
        if len(live) < len(states):
            return None  # the first versions are not judged, and nothing can be compared with them yet
        judged = {model: state for model, state in states.items() if state.state == "evaluating"}
        for state in judged.values():
            done = self._store.list_evaluations(publish_id=state.together[0]) or state.overdue
            return None if done else Work(versions={**live, **_candidates(judged)}, publish_id=state.together[0])
        if any(state.state in ("draining", "swapping", "settling") for state in states.values()):
            return None
        return self._find_baseline(states, live)

    def _find_baseline(self, states: Mapping[str, ModelState], live: Mapping[str, int]) -> Work | None:
        """What serves, where it was not evaluated yet."""
        mine = self._evaluator
        if self._store.find_baseline(live, mine.tasks_hash, mine.score) is not None:
            return None
        tried = [e for e in self._store.evaluations_of(live) if e.tasks_hash == mine.tasks_hash]
        waited_for = any(state.state == "requested" and state.gate is not None for state in states.values())
        if tried and not (waited_for and time.time() - tried[-1].created_at > AGAIN_S):
            return None
        return Work(versions=live, publish_id=None)

    def _still(self, work: Work) -> bool:
        """Whether anybody is still interested, in a thread."""
        states = self._store.publish_view(self._models)
        if work.publish_id is None:
            return work.versions == {model: state.live_version for model, state in states.items()}
        return any(
            (state.together[:1], state.state, state.overdue) == ((work.publish_id,), "evaluating", False)
            for state in states.values()
        )

    async def _do(self, work: Work) -> None:
        """Evaluate, as long as it is of use; store what was found, or why nothing was."""
        prefix = "run" if work.publish_id is None else run_prefix(work.publish_id)
        measured = Measured(
            version_id=min(work.versions.items())[1],
            versions=work.versions,
            publish_id=work.publish_id,
            name=new_id("evaluation"),
            tasks_hash=self._evaluator.tasks_hash,
            score=self._evaluator.score,
            started_at=time.time(),
        )
        evaluation = Evaluation(
            measured.name,
            self._tasks,
            self._session.executor,
            self._session.control,
            repeat=self._gate.samples,
            concurrency=self._gate.concurrency,
            prefix=prefix,
        )
        self._session.control.take_time()
        try:
            rows = await self._while_wanted(evaluation, work)
            if rows is None:
                self._warn(f"the evaluation of {work.named} is of no use any more: dropped")
                return
            await self._keep(replace(measured, **self._found(rows)))
        except InvalidRecord as error:
            if work.publish_id is None:
                self._warn(str(error))  # another version went live meanwhile: that one is next
            else:
                await self._keep(replace(measured, error=str(error)))
        except AdapterError as error:
            await self._keep(replace(measured, error=str(error)))

    async def _while_wanted(self, evaluation: Evaluation, work: Work) -> list[EvalRow] | None:
        """Run it to its end; None where it had to be given up first."""
        running = asyncio.create_task(evaluation.run(), name="tracegrad-gate-evaluation")
        try:
            while not (await asyncio.wait({running}, timeout=5 * POLL_S))[0]:
                if not await asyncio.to_thread(self._still, work):
                    return None
            return running.result()
        finally:
            if not running.done():
                running.cancel()
                await asyncio.wait({running})

    def _found(self, rows: Sequence[EvalRow]) -> dict[str, Any]:
        score = self._evaluator.score
        return {
            "run_ids": [row.run_id for row in rows],
            "n_failed": sum(score not in row.scores for row in rows),
            "values": task_scores(rows).get(score, {}),
        }

    async def _keep(self, measured: Measured) -> None:
        self._tell(await asyncio.to_thread(self._store.add_evaluation, measured))

    async def _clear(self) -> None:
        """End the runs that a killed evaluator left open, once nobody else can be at them."""
        if self._cleared:
            return
        living = partial(self._store.living_evaluators, self._evaluator.model, self._expires_s)
        if [each.evaluator_id for each in await asyncio.to_thread(living)] != [self._evaluator.evaluator_id]:
            return
        for run_id in await asyncio.to_thread(self._store.open_gate_runs):
            await self._session.control.end_run(run_id, "failed", "its evaluator died")
        self._cleared = True


def _candidates(judged: Mapping[str, ModelState]) -> dict[str, int]:
    return {model: state.candidate for model, state in judged.items() if state.candidate is not None}
