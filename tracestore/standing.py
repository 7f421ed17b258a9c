"""Where every sampled choice stands for one training job: the one CASE that conservation sums and the queue lists.

A choice without a consumption row of the job falls into exactly one reason (the first that applies, the last applies
always); one with such a row has what the step said of it. Runs in which nothing was sampled have a row of no tokens in
`everything`, so that they are seen. The reasons are words of `reasons`. Reads no payload. Called by `conservation` and
`queue`.
"""

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Select,
    Subquery,
    and_,
    case,
    exists,
    literal,
    not_,
    null,
    select,
    true,
    union_all,
)

from tracegrad.tracestore.branches import Live, live_of
from tracegrad.tracestore.diagnosis_extent import calls_within, runs_within
from tracegrad.tracestore.diagnosis_records import Extent
from tracegrad.tracestore.jobs import models_of
from tracegrad.tracestore.leases import rule_of
from tracegrad.tracestore.readiness import (
    UNIT,
    beside,
    calls_that_count,
    is_allowed,
    is_complete,
    is_free,
    is_fresh,
    is_held,
    is_in_window,
    is_large_enough,
    is_of_models,
    is_of_project,
    is_refused,
    is_rewarded,
    is_settled,
    is_trained,
    is_wanted,
    members,
    units,
)
from tracegrad.tracestore.reasons import (
    ABORTED,
    DELETED,
    EVAL,
    FAILED_CALL,
    GRACE,
    GROUP_OPEN,
    GROUP_SMALL,
    GROUP_TRAINED,
    GROUP_UNREWARDED,
    LATE,
    LEASED,
    NO_CALL,
    NO_GROUP,
    NO_REWARD,
    NO_ROLE,
    NO_RUN,
    NO_VERSION,
    NOT_LEASED,
    OPEN,
    OTHER_MODEL,
    OTHER_PROJECT,
    OTHER_PURPOSE,
    OTHER_ROLE,
    OUTSIDE_WINDOW,
    QUARANTINED,
    REFUSED,
    RUN_FAILED,
    TOO_STALE,
    TRAINED,
)
from tracegrad.tracestore.records import LeaseRule
from tracegrad.tracestore.schema import CONTENT_DELETED, calls, choices, consumption, jobs, runs

Whens = list[tuple[ColumnElement[bool], ColumnElement[str]]]
"""Conditions with their reasons, for a CASE: the first that holds is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """A job as it is judged by: the rule that it last leased by (None: it never did), and now.

    `models` is empty for a job that is not registered; `live` is what is live of them.
    """

    job_id: str
    models: tuple[str, ...]
    rule: LeaseRule | None
    epoch: int
    live: Live
    now: float


def job_view(connection: Connection, job_id: str, epoch: int | None, now: float) -> JobView:
    """Return how a job is judged; without an epoch in that of its rule."""
    rule = rule_of(connection.execute(select(jobs.c.rule).where(jobs.c.job_id == job_id)).scalar())
    models = models_of(connection, job_id)
    if epoch is None:
        epoch = 0 if rule is None else rule.epoch
    return JobView(
        job_id=job_id,
        models=models,
        rule=None if rule is None else replace(rule, epoch=epoch),
        epoch=epoch,
        live=live_of(connection, models),
        now=now,
    )


def unaccounted(job: JobView, extent: Extent) -> Select[Any]:
    """Select (reason, n_tokens, run_id, call_id, choice_index) of the choices without a consumption row of the job."""
    told = and_(
        _consumed(job), consumption.c.seq == choices.c.seq, consumption.c.choice_index == choices.c.choice_index
    )
    joined = choices.join(calls, calls.c.seq == choices.c.seq).outerjoin(runs, runs.c.run_id == calls.c.run_id)
    whens = [*_of_the_job(job), *_of_run_and_call(job.rule, job.now)]
    if job.rule is not None:
        unit = units_of(job, extent)
        joined = joined.outerjoin(unit, unit.c.unit == UNIT)
        whens += of_unit(unit, job.rule)
    return (
        select(
            case(*whens, else_=literal(NOT_LEASED)).label("reason"),
            choices.c.n_tokens,
            calls.c.run_id,
            calls.c.call_id,
            choices.c.choice_index,
        )
        .select_from(joined.outerjoin(consumption, told))
        .where(consumption.c.seq.is_(None), calls_within(extent))
    )


def everything(job: JobView, extent: Extent) -> CompoundSelect[Any]:
    """Select (reason, n_tokens, run_id, call_id, choice_index, accounted) of every choice, and of runs without one.

    `accounted` is 1 where a step said so. The tokens of all rows are those that are stored.
    """
    rest = unaccounted(job, extent).add_columns(literal(0).label("accounted"))
    within = true() if extent.whole else calls_within(extent)
    accounted = [
        select(
            reason.label("reason"),
            tokens.label("n_tokens"),
            consumption.c.run_id,
            calls.c.call_id,
            consumption.c.choice_index,
            literal(1).label("accounted"),
        )
        .join_from(consumption, calls, calls.c.seq == consumption.c.seq)
        .where(_consumed(job), within, which)
        for reason, tokens, which in (
            (literal(TRAINED), consumption.c.trained_tokens, consumption.c.trained_tokens > 0),
            (consumption.c.reason, consumption.c.excluded_tokens, consumption.c.reason.is_not(None)),
        )
    ]
    return union_all(rest, *accounted, _silent_runs(job, extent))


def units_of(job: JobView, extent: Extent) -> Subquery:
    """Return the units that the job's rule allows; of an extent of one run, that run's."""
    assert job.rule is not None, "a job without a rule has no units"
    return units(members(job.job_id, job.rule, job.now, job.live, beside(extent.run_id)))


def _consumed(job: JobView) -> ColumnElement[bool]:
    return and_(consumption.c.job_id == job.job_id, consumption.c.epoch == job.epoch)


def _silent_runs(job: JobView, extent: Extent) -> Select[Any]:
    """The runs that the job would take and in which nothing was sampled."""
    sampled = exists().where(calls.c.run_id == runs.c.run_id, choices.c.seq == calls.c.seq).correlate(runs)
    reason = case(
        (runs.c.error == CONTENT_DELETED, literal(QUARANTINED) + literal(DELETED)),
        (runs.c.status == "open", literal(OPEN)),
        (runs.c.status == "failed", literal(RUN_FAILED)),
        else_=literal(NO_CALL),
    )
    return select(
        reason.label("reason"),
        literal(0).label("n_tokens"),
        runs.c.run_id,
        null().label("call_id"),
        null().label("choice_index"),
        literal(0).label("accounted"),
    ).where(not_(sampled), runs_within(extent), runs.c.purpose != "eval" if job.rule is None else is_allowed(job.rule))


def _of_the_job(job: JobView) -> Whens:
    """What is done with the run, and whether call and run are for the job at all."""
    rule = job.rule
    whens: Whens = [
        (calls.c.run_id.is_(None), literal(NO_RUN)),
        (runs.c.purpose == "eval", literal(EVAL)),
        (is_held(job.job_id), literal(LEASED)),
        (is_trained(job.job_id, job.epoch), literal(LATE)),
        (is_refused(job.job_id, job.epoch), literal(REFUSED)),
    ]
    if rule is None:
        return [*whens, (calls.c.model.not_in(job.models), literal(OTHER_MODEL))] if job.models else whens
    return [
        *whens,
        (not_(is_of_models(rule)), literal(OTHER_MODEL)),
        (and_(not_(calls_that_count(rule)), calls.c.role.is_(None)), literal(NO_ROLE)),
        (not_(calls_that_count(rule)), literal(OTHER_ROLE)),
        (not_(is_wanted(rule)), literal(OTHER_PURPOSE)),
        (not_(is_of_project(rule)), literal(OTHER_PROJECT)),
        (not_(is_in_window(rule)), literal(OUTSIDE_WINDOW)),
    ]


def _of_run_and_call(rule: LeaseRule | None, now: float) -> Whens:
    """What keeps a run or a call from being trained, whatever its group does."""
    rule = rule or LeaseRule(trained=(), max_staleness=0, min_group=1)
    return [
        (runs.c.status == "open", literal(OPEN)),
        (runs.c.status == "failed", literal(RUN_FAILED)),
        (calls.c.status == "failed", literal(FAILED_CALL)),
        (calls.c.status == "aborted", literal(ABORTED)),
        (calls.c.quarantine.is_not(None), literal(QUARANTINED) + calls.c.quarantine),
        (calls.c.version_dispatched.is_(None), literal(NO_VERSION)),
        (not_(is_settled(rule, now)), literal(GRACE)),
        (not_(is_rewarded(rule)), literal(NO_REWARD)),
    ]


def of_unit(unit: Subquery, rule: LeaseRule) -> Whens:
    """What the run's group waits for."""
    small = not_(is_large_enough(unit, rule))
    return [
        (not_(is_free(unit)), literal(GROUP_TRAINED)),
        (not_(is_complete(unit)), literal(GROUP_OPEN)),
        *([(and_(small, unit.c.unit.like("run:%")), literal(NO_GROUP))] if rule.min_group > 1 else []),
        (and_(small, unit.c.trainable >= rule.min_group), literal(GROUP_UNREWARDED)),
        (small, literal(GROUP_SMALL)),
        (not_(is_fresh(unit, rule)), literal(TOO_STALE)),
    ]
