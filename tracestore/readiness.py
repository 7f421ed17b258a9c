"""Which groups a job could train, as one SQL expression that leasing, the backlog and conservation share.

A unit is a group, or a run without a group (a group of one). It is ready when every planned member has ended, enough
members are eligible (closed, rewarded, with an exactly recorded call to the model), none is held or trained by the
job in this epoch, and the oldest weights that sampled it are recent enough. Purpose `eval`
is refused here, and by the schema again.

What is ready is looked for among the runs that recent weights sampled (`in_reach`): a queue does not become slower with
what it has served. Where nothing is live, or nothing is ever too stale, that is every run.
"""

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Subquery,
    and_,
    case,
    exists,
    func,
    literal,
    select,
    union,
)

from tracegrad.tracestore.records import LeaseRule
from tracegrad.tracestore.schema import (
    CONTENT_DELETED,
    calls,
    groups,
    holds,
    ledger,
    policy_versions,
    rewards,
    runs,
)


def _unit(run: FromClause) -> ColumnElement[str]:
    return case((run.c.group_id.is_not(None), literal("group:") + run.c.group_id), else_=literal("run:") + run.c.run_id)


UNIT = _unit(runs)
"""The key of the unit a run belongs to."""


def is_rewarded(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the run of the row has what the rule asks for: every named reward, or any."""
    if not rule.reward_names:
        return exists().where(rewards.c.run_id == runs.c.run_id)
    return and_(
        *(exists().where(rewards.c.run_id == runs.c.run_id, rewards.c.name == name) for name in rule.reward_names)
    )


def is_allowed(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the purpose and the project of the run are the rule's."""
    allowed = and_(runs.c.purpose.in_(rule.purposes), runs.c.purpose != "eval")
    return allowed if rule.project is None else and_(allowed, runs.c.project == rule.project)


def calls_that_count(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the call of the row is to the rule's model, by one of its roles."""
    counts = calls.c.model == rule.model
    return counts if rule.roles is None else and_(counts, calls.c.role.in_(rule.roles))


def is_exact() -> ColumnElement[bool]:
    """Whether the call of the row could be trained as far as its metadata says; a choice of it may still not."""
    sampled = and_(calls.c.status == "complete", calls.c.endpoint != "embeddings")
    return and_(sampled, calls.c.quarantine.is_(None), calls.c.version_dispatched.is_not(None))


def is_held(job_id: str) -> ColumnElement[bool]:
    """Whether an unfinished lease of the job holds the run."""
    return exists().where(holds.c.job_id == job_id, holds.c.run_id == runs.c.run_id)


def is_trained(job_id: str, epoch: int) -> ColumnElement[bool]:
    """Whether the ledger has the run for the job and epoch."""
    return exists().where(ledger.c.job_id == job_id, ledger.c.run_id == runs.c.run_id, ledger.c.epoch == epoch)


def in_reach(job_id: str, rule: LeaseRule, live_step: int | None) -> ColumnElement[bool]:
    """Whether the run of the row is of a unit that could be fresh (see `is_fresh`), or that the job holds."""
    if live_step is None or live_step <= rule.max_staleness:
        return literal(1) == literal(1)
    recent = select(policy_versions.c.version_id).where(
        policy_versions.c.model == rule.model, policy_versions.c.step >= live_step - rule.max_staleness
    )
    near = union(
        select(calls.c.run_id).where(calls.c.version_dispatched.in_(recent), calls.c.run_id.is_not(None)),
        select(holds.c.run_id).where(holds.c.job_id == job_id),
    ).cte("near")
    beside = select(runs.c.group_id).where(runs.c.run_id.in_(select(near.c.run_id)), runs.c.group_id.is_not(None))
    reached = union(select(near.c.run_id), select(runs.c.run_id).where(runs.c.group_id.in_(beside))).subquery("reached")
    return runs.c.run_id.in_(select(reached.c.run_id))


def beside(run_id: str | None) -> ColumnElement[bool] | None:
    """Whether the run of the row is of the unit of one run; None of none, which is every run."""
    if run_id is None:
        return None
    one = runs.alias("one")
    return select(_unit(one)).where(one.c.run_id == run_id).scalar_subquery() == UNIT


def members(job_id: str, rule: LeaseRule, among: ColumnElement[bool] | None = None) -> Subquery:
    """Return one row per run that the rule allows (`among` those, or all): its unit, and what decides about it."""
    counted = and_(calls.c.run_id == runs.c.run_id, calls_that_count(rule))
    whole = and_(runs.c.status == "closed", runs.c.error.is_distinct_from(CONTENT_DELETED))
    eligible = and_(whole, is_rewarded(rule), exists().where(counted, is_exact()))
    oldest = (
        select(func.min(policy_versions.c.step))
        .select_from(calls.join(policy_versions, policy_versions.c.version_id == calls.c.version_dispatched))
        .where(counted)
        .scalar_subquery()
    )
    return (
        select(
            runs.c.run_id,
            runs.c.purpose,
            runs.c.member,
            runs.c.opened_at,
            UNIT.label("unit"),
            func.coalesce(groups.c.planned_size, 1).label("planned"),
            case((runs.c.status != "open", 1), else_=0).label("ended"),
            case((eligible, 1), else_=0).label("eligible"),
            case((eligible, oldest)).label("oldest"),
            case((is_held(job_id), 1), else_=0).label("held"),
            case((is_trained(job_id, rule.epoch), 1), else_=0).label("trained"),
        )
        .select_from(runs.outerjoin(groups, groups.c.group_id == runs.c.group_id))
        .where(is_allowed(rule) if among is None else and_(is_allowed(rule), among))
        .subquery("members")
    )


def units(member: Subquery) -> Subquery:
    """Return one row per unit: its members' facts added up."""
    return (
        select(
            member.c.unit,
            func.max(member.c.planned).label("planned"),
            func.sum(member.c.ended).label("ended"),
            func.sum(member.c.eligible).label("eligible"),
            func.min(member.c.oldest).label("oldest"),
            func.max(member.c.held).label("held"),
            func.max(member.c.trained).label("trained"),
            func.min(member.c.opened_at).label("opened_at"),
        )
        .group_by(member.c.unit)
        .subquery("units")
    )


def is_complete(unit: Subquery) -> ColumnElement[bool]:
    """Whether every planned member has ended."""
    return unit.c.ended >= unit.c.planned


def is_large_enough(unit: Subquery, rule: LeaseRule) -> ColumnElement[bool]:
    """Whether enough members are eligible."""
    return unit.c.eligible >= max(rule.min_group, 1)


def is_fresh(unit: Subquery, rule: LeaseRule, live_step: int | None) -> ColumnElement[bool]:
    """Whether the oldest step that sampled the unit is within the bound. Nothing live: nothing is stale."""
    if live_step is None:
        return literal(1) == literal(1)
    return func.coalesce(unit.c.oldest, live_step) >= live_step - rule.max_staleness


def is_ready(unit: Subquery, rule: LeaseRule, live_step: int | None) -> ColumnElement[bool]:
    """Whether the unit can be leased now."""
    free = and_(unit.c.held == 0, unit.c.trained == 0)
    return and_(is_complete(unit), is_large_enough(unit, rule), is_fresh(unit, rule, live_step), free)
