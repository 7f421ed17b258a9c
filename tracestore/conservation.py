"""Conservation as a query: sampled tokens stored = trained + excluded by reason, over the whole store (law 5).

A choice that a step accounted for has its consumption row. Every other choice falls into exactly one reason of a CASE
(the first that applies, the last applies always): so nothing is counted twice and nothing is left over. The stored
total is counted apart, without any join, so that the report can fail. The reasons are words of `reasons`. Called by the
trainer and the demo's summary.
"""

from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Subquery, and_, case, func, literal, not_, or_, select

from tracegrad.tracestore.diagnosis_extent import calls_within
from tracegrad.tracestore.diagnosis_records import ConservationReport, Extent
from tracegrad.tracestore.leases import rule_of
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.publishes import live_step
from tracegrad.tracestore.readiness import (
    UNIT,
    beside,
    calls_that_count,
    is_complete,
    is_fresh,
    is_held,
    is_in_window,
    is_large_enough,
    is_of_models,
    is_of_project,
    is_rewarded,
    is_settled,
    is_trained,
    is_wanted,
    members,
    units,
)
from tracegrad.tracestore.reasons import (
    ABORTED,
    EVAL,
    FAILED_CALL,
    GRACE,
    GROUP_OPEN,
    GROUP_SMALL,
    GROUP_TRAINED,
    GROUP_UNREWARDED,
    LATE,
    LEASED,
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
    RUN_FAILED,
    TOO_STALE,
)
from tracegrad.tracestore.records import LeaseRule
from tracegrad.tracestore.schema import calls, choices, consumption, jobs, runs

Whens = list[tuple[ColumnElement[bool], ColumnElement[str]]]
"""Conditions with their reasons, for a CASE: the first that holds is said."""


class Conservation(Noun):
    """The part of the store that adds up."""

    def consumption(self, job_id: str, epoch: int | None = None, *, extent: Extent | None = None) -> ConservationReport:
        """Return what became of every sampled token, for one job and epoch (default: the job's current one).

        `extent`: only of the calls in it.

        Reasons of choices that no step accounted for, the first that applies: `no run`, `eval`, `leased` (being
        trained), `arrived after the lease` (its run is trained, it came later), `other model`, `no role`,
        `other role`, `other purpose`, `other project`, `outside the window`, `open`, `run failed`, `failed call`,
        `aborted`, `quarantined: …`, `no version`, `in grace time`, `no reward`, `group trained without it`,
        `group open`, `no group`, `group awaits rewards`, `group too small`, `too stale`, `not leased` (ready,
        waiting). They are judged by the rule that the job last leased by; before its first lease only those that need
        none are said.
        """
        with self._db.read() as connection:
            job = connection.execute(select(jobs.c.model, jobs.c.rule).where(jobs.c.job_id == job_id)).one_or_none()
            rule = None if job is None else rule_of(job.rule)
            if epoch is None:
                epoch = 0 if rule is None else rule.epoch
            extent = extent or Extent()
            stored = connection.execute(_stored(extent)).scalar_one()
            trained, excluded = _accounted(connection, job_id, epoch, extent)
            model = None if job is None else str(job.model)
            unaccounted = _unaccounted(connection, job_id, model, epoch, rule=rule, extent=extent, now=self._db.now())
            reasons = unaccounted.subquery("reasons")
            counted = select(reasons.c.reason, func.sum(reasons.c.n_tokens)).group_by(reasons.c.reason)
            for reason, tokens in connection.execute(counted):
                excluded[reason] = excluded.get(reason, 0) + int(tokens)
            return ConservationReport(stored=int(stored), trained=trained, excluded=dict(sorted(excluded.items())))


def _stored(extent: Extent) -> Select[Any]:
    total = select(func.coalesce(func.sum(choices.c.n_tokens), 0))
    if extent.whole:
        return total
    return total.join(calls, calls.c.call_id == choices.c.call_id).where(calls_within(extent))


def _accounted(connection: Connection, job_id: str, epoch: int, extent: Extent) -> tuple[int, dict[str, int]]:
    mine = and_(consumption.c.job_id == job_id, consumption.c.epoch == epoch)
    chosen = (
        select(
            consumption.c.reason,
            func.sum(consumption.c.trained_tokens).label("trained"),
            func.sum(consumption.c.excluded_tokens).label("excluded"),
        )
        .where(mine)
        .group_by(consumption.c.reason)
    )
    if not extent.whole:
        chosen = chosen.join(calls, calls.c.call_id == consumption.c.call_id).where(calls_within(extent))
    rows = connection.execute(chosen).all()
    trained = sum(int(row.trained) for row in rows)
    return trained, {row.reason: int(row.excluded) for row in rows if row.reason is not None}


def _unaccounted(
    connection: Connection,
    job_id: str,
    model: str | None,
    epoch: int,
    *,
    rule: LeaseRule | None,
    extent: Extent,
    now: float,
) -> Select[Any]:
    """Select (reason, n_tokens) of the choices that have no consumption row of this job and epoch."""
    told = and_(
        consumption.c.job_id == job_id,
        consumption.c.epoch == epoch,
        consumption.c.call_id == choices.c.call_id,
        consumption.c.choice_index == choices.c.choice_index,
    )
    joined = choices.join(calls, calls.c.call_id == choices.c.call_id).outerjoin(runs, runs.c.run_id == calls.c.run_id)
    whens = [*_of_the_job(job_id, model, epoch, rule), *_of_run_and_call(rule, now)]
    if rule is not None:
        unit = units(members(job_id, replace(rule, epoch=epoch), now, beside(extent.run_id)))
        joined = joined.outerjoin(unit, unit.c.unit == UNIT)
        whens += _of_unit(unit, rule, live_step(connection, rule.model))
    return (
        select(case(*whens, else_=literal(NOT_LEASED)).label("reason"), choices.c.n_tokens)
        .select_from(joined.outerjoin(consumption, told))
        .where(consumption.c.call_id.is_(None), calls_within(extent))
    )


def _of_the_job(job_id: str, model: str | None, epoch: int, rule: LeaseRule | None) -> Whens:
    """What is done with the run, and whether call and run are for the job at all."""
    whens: Whens = [
        (calls.c.run_id.is_(None), literal(NO_RUN)),
        (runs.c.purpose == "eval", literal(EVAL)),
        (is_held(job_id), literal(LEASED)),
        (is_trained(job_id, epoch), literal(LATE)),
    ]
    if rule is None:
        return whens if model is None else [*whens, (calls.c.model != model, literal(OTHER_MODEL))]
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
    rule = rule or LeaseRule(model="", max_staleness=0, min_group=1)
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


def _of_unit(unit: Subquery, rule: LeaseRule, live: int | None) -> Whens:
    """What the run's group waits for."""
    small = not_(is_large_enough(unit, rule))
    return [
        (or_(unit.c.trained == 1, unit.c.held == 1), literal(GROUP_TRAINED)),
        (not_(is_complete(unit)), literal(GROUP_OPEN)),
        (and_(small, runs.c.group_id.is_(None)), literal(NO_GROUP)),
        (and_(small, unit.c.trainable >= rule.min_group), literal(GROUP_UNREWARDED)),
        (small, literal(GROUP_SMALL)),
        (not_(is_fresh(unit, rule, live)), literal(TOO_STALE)),
    ]
