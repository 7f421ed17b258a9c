"""The queue of a training job as a view: what is ready, waits and for what, is held, trained, or a dead letter.

Every row is of `standing`, the CASE that conservation sums: the view and the doctor cannot disagree. Nothing is moved
anywhere: what failed a check leaves the dead letters by itself when it does not fail any more (a call is placed late,
the next epoch begins). Read only, from metadata; a page of dead letters holds as many runs as were asked for. Called by
`tracegrad queue`, through `Store`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Subquery, and_, case, func, literal, or_, select

from tracegrad.tracestore.conservation import stored_within
from tracegrad.tracestore.diagnosis_jobs import held_lease
from tracegrad.tracestore.diagnosis_records import Extent, HeldLease
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.jobs import no_such_job
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.queue_records import (
    ChoiceStanding,
    DeadRun,
    GroupStanding,
    Queue,
    ReasonCount,
    RunStanding,
)
from tracegrad.tracestore.readiness import is_complete, is_free
from tracegrad.tracestore.reasons import ELSEWHERE, LEASED, NOT_LEASED, REFUSED, TRAINED, WAITING, stage_of
from tracegrad.tracestore.records import Run
from tracegrad.tracestore.rewards import current_rewards
from tracegrad.tracestore.run_list import older_than
from tracegrad.tracestore.runs import find_run, run_of
from tracegrad.tracestore.schema import calls, holds, leases, refusals, runs
from tracegrad.tracestore.standing import JobView, everything, job_view, of_unit, units_of


class QueueView(Noun):
    """The part of the store that shows the queue."""

    def queue(self, job_id: str, *, epoch: int | None = None, extent: Extent | None = None) -> Queue:
        """Return where everything stands for a job, in one epoch (default: the job's current one).

        Raises:
            NotFound: no such job.
        """
        extent = extent or Extent()
        with self._db.read() as connection:
            job = self._job(connection, job_id, epoch)
            held = select(leases).where(leases.c.job_id == job_id, leases.c.state == "held")
            return Queue(
                job_id=job_id,
                models=job.models,
                epoch=job.epoch,
                rule=job.rule,
                stored=int(connection.execute(stored_within(extent)).scalar_one()),
                reasons=_reasons(connection, job, extent),
                groups={} if job.rule is None else _groups(connection, job, extent),
                leases=[
                    held_lease(row, self._db.now()) for row in connection.execute(held.order_by(leases.c.lease_id))
                ],
            )

    def dead_runs(
        self,
        job_id: str,
        *,
        epoch: int | None = None,
        extent: Extent | None = None,
        limit: int = 20,
        before: str | None = None,
    ) -> list[DeadRun]:
        """Return up to `limit` runs with dead letters, newest first; `before` is the last run of the page before.

        Calls without a run are in no page: `list_unplaced_calls` has them.

        Raises:
            NotFound: no such job, or `before` names no run.
        """
        with self._db.read() as connection:
            job = self._job(connection, job_id, epoch)
            row = everything(job, extent or Extent()).subquery("row")
            dead = select(row.c.run_id).where(_is_dead(row)).distinct()
            page = select(runs).where(runs.c.run_id.in_(dead))
            if before is not None:
                page = page.where(older_than(connection, before))
            listed = connection.execute(page.order_by(runs.c.opened_at.desc(), runs.c.run_id.desc()).limit(limit))
            found = [run_of(one) for one in listed]
            names = [one.run_id for one in found]
            why = _why_dead(connection, row, names)
            refused = _refusals(connection, job, names)
        return [
            DeadRun(
                run=run,
                reasons={reason: tokens for reason, tokens in why[run.run_id].items() if reason != TRAINED},
                trained=why[run.run_id].get(TRAINED, 0),
                refused=refused.get(run.run_id, {}),
            )
            for run in found
        ]

    def run_standing(self, job_id: str, run_id: str, *, epoch: int | None = None) -> RunStanding:
        """Return where each answer of a run stands for a job, and what the run still waits for.

        Raises:
            NotFound: no such job, or no such run.
        """
        with self._db.read() as connection:
            job = self._job(connection, job_id, epoch)
            stored = find_run(connection, run_id)
            if stored is None:
                raise NotFound(f"no run {run_id!r}: `tracegrad runs` lists the runs")
            run, extent = run_of(stored), Extent(run_id=run_id)
            return RunStanding(
                run=run,
                choices=_choices(connection, job, extent),
                wants=_wants(connection, job, run),
                grace_until=_grace_until(job, run),
                group=_group(connection, job, extent),
                lease=_lease(connection, job, run_id),
                refused=_refusals(connection, job, [run_id]).get(run_id, {}),
            )

    def _job(self, connection: Connection, job_id: str, epoch: int | None) -> JobView:
        job = job_view(connection, job_id, epoch, self._db.now())
        if not job.models:
            raise no_such_job(connection, job_id)
        return job


def _reasons(connection: Connection, job: JobView, extent: Extent) -> list[ReasonCount]:
    row = everything(job, extent).subquery("row")
    chosen = select(
        row.c.reason,
        row.c.accounted,
        func.count(func.distinct(row.c.run_id)).label("runs"),
        func.count(row.c.call_id).label("choices"),
        func.sum(row.c.n_tokens).label("tokens"),
        func.max(row.c.run_id).label("example"),
    ).group_by(row.c.reason, row.c.accounted)
    found = [
        ReasonCount(
            reason=one.reason,
            stage=stage_of(one.reason, accounted=bool(one.accounted)),
            runs=int(one.runs),
            choices=int(one.choices),
            tokens=int(one.tokens),
            example=one.example,
        )
        for one in connection.execute(chosen)
    ]
    return sorted(found, key=lambda one: (one.stage, -one.tokens, -one.runs, one.reason))


def _groups(connection: Connection, job: JobView, extent: Extent) -> dict[str, int]:
    """Reason -> units; those that are done with, incomplete, or have a member that could be trained."""
    assert job.rule is not None, "the caller looked"
    unit = units_of(job, extent)
    done = [(unit.c.trained == 1, literal(TRAINED)), (unit.c.held == 1, literal(LEASED))]
    reason = case(
        *done,
        (unit.c.refused == 1, literal(REFUSED)),
        *of_unit(unit, job.rule),
        else_=literal(NOT_LEASED),
    )
    concerned = or_(~is_free(unit), ~is_complete(unit), unit.c.trainable > 0)
    counted = select(reason.label("reason")).where(concerned).subquery("counted")
    rows = connection.execute(select(counted.c.reason, func.count()).group_by(counted.c.reason))
    return {str(name): int(count) for name, count in sorted(tuple(row) for row in rows)}


def _is_dead(row: Subquery) -> ColumnElement[bool]:
    """`stage_of` in SQL."""
    never = {*ELSEWHERE, TRAINED}
    return or_(
        and_(row.c.accounted == 0, row.c.reason.not_in(sorted({*never, *WAITING, LEASED, NOT_LEASED}))),
        and_(row.c.accounted == 1, row.c.reason.not_in(sorted(never))),
    )


def _why_dead(connection: Connection, row: Subquery, run_ids: Sequence[str]) -> Mapping[str, dict[str, int]]:
    """Run -> reason -> tokens, of the dead letters and of what was trained beside them."""
    chosen = (
        select(row.c.run_id, row.c.reason, func.sum(row.c.n_tokens).label("tokens"))
        .where(row.c.run_id.in_(run_ids), or_(_is_dead(row), row.c.reason == TRAINED))
        .group_by(row.c.run_id, row.c.reason)
        .order_by(row.c.run_id, row.c.reason)
    )
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for one in connection.execute(chosen):
        found[one.run_id][one.reason] = int(one.tokens)
    return found


def _refusals(connection: Connection, job: JobView, run_ids: Sequence[str]) -> dict[str, Mapping[str, int]]:
    chosen = select(refusals.c.run_id, refusals.c.reasons).where(
        refusals.c.job_id == job.job_id, refusals.c.epoch == job.epoch, refusals.c.run_id.in_(run_ids)
    )
    return {one.run_id: one.reasons for one in connection.execute(chosen)}


def _choices(connection: Connection, job: JobView, extent: Extent) -> list[ChoiceStanding]:
    row = everything(job, extent).subquery("row")
    chosen = (
        select(row, calls.c.role, calls.c.model)
        .join(calls, calls.c.call_id == row.c.call_id)
        .order_by(calls.c.dispatched_at, calls.c.seq, row.c.choice_index, row.c.reason)
    )
    return [
        ChoiceStanding(
            call_id=one.call_id,
            choice_index=one.choice_index,
            role=one.role,
            model=one.model,
            tokens=one.n_tokens,
            reason=one.reason,
            stage=stage_of(one.reason, accounted=bool(one.accounted)),
        )
        for one in connection.execute(chosen)
    ]


def _wants(connection: Connection, job: JobView, run: Run) -> list[str]:
    """The rewards that the rule asks for and the run has not."""
    if job.rule is None:
        return []
    given = {reward.name for reward in current_rewards(connection, [run.run_id], rule=job.rule)}
    if not job.rule.reward_names:
        return [] if given else ["any"]
    return [name for name in job.rule.reward_names if name not in given]


def _grace_until(job: JobView, run: Run) -> float | None:
    if job.rule is None or run.status != "closed" or run.ended_at is None:
        return None
    until = run.ended_at + job.rule.grace_s
    return until if until > job.now else None


def _group(connection: Connection, job: JobView, extent: Extent) -> GroupStanding | None:
    if job.rule is None:
        return None
    unit = units_of(job, extent)
    columns: tuple[Any, ...] = (unit.c.planned, unit.c.settled, unit.c.trainable, unit.c.eligible)
    row = connection.execute(select(*columns)).first()
    return None if row is None else GroupStanding(**{name: int(value) for name, value in row._mapping.items()})


def _lease(connection: Connection, job: JobView, run_id: str) -> HeldLease | None:
    chosen = (
        select(leases)
        .join(holds, holds.c.lease_id == leases.c.lease_id)
        .where(holds.c.job_id == job.job_id, holds.c.run_id == run_id)
    )
    row = connection.execute(chosen).first()
    return None if row is None else held_lease(row, job.now)
