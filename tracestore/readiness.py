"""Which groups a job could train, as one SQL expression that leasing, the backlog and conservation share.

A unit is a group, or a run without a group (a group of one). It is ready when every planned member is settled (it
failed, or closed and its grace time is over), enough members are eligible (closed, rewarded, with an exactly recorded
call to the model), none is held, trained or refused by the job in this epoch, and the oldest weights that sampled it
are recent enough. Purpose `eval` is refused here, and by the schema again. What a rule means for one call and one
reward stands in `rules` as well, for the trainer.

What is ready is looked for among the runs that recent weights sampled (`in_reach`): a queue does not become slower with
what it has served. Where nothing is live, or nothing is ever too stale, that is every run.
"""

from collections.abc import Collection, Mapping

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Subquery,
    and_,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    true,
    union,
)

from tracegrad.tracestore.branches import Live, line_of
from tracegrad.tracestore.records import LeaseRule, ModelCalls
from tracegrad.tracestore.runs import has_content
from tracegrad.tracestore.schema import (
    calls,
    groups,
    holds,
    ledger,
    policy_versions,
    refusals,
    rewards,
    runs,
)

_GROUP, _RUN = "group:", "run:"


def _unit(run: FromClause) -> ColumnElement[str]:
    return case((run.c.group_id.is_not(None), literal(_GROUP) + run.c.group_id), else_=literal(_RUN) + run.c.run_id)


UNIT = _unit(runs)
"""The key of the unit a run belongs to."""


def rewards_that_count(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the reward of the row has a name and a source that the rule counts: `rules.reward_counts` in SQL."""
    named = rewards.c.name.in_(rule.reward_names) if rule.reward_names else true()
    return and_(named, _from_a_source(rule))


def is_rewarded(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the run of the row has what the rule asks for: every named reward, or any."""
    given = exists().where(rewards.c.run_id == runs.c.run_id, _from_a_source(rule))
    if not rule.reward_names:
        return given
    return and_(*(given.where(rewards.c.name == name) for name in rule.reward_names))


def _from_a_source(rule: LeaseRule) -> ColumnElement[bool]:
    return rewards.c.source.in_(rule.reward_sources) if rule.reward_sources else true()


def is_wanted(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the purpose of the run is the rule's."""
    return and_(runs.c.purpose.in_(rule.purposes), runs.c.purpose != "eval")


def is_of_project(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the project of the run is the rule's."""
    return true() if rule.project is None else runs.c.project == rule.project


def is_in_window(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the run was opened in the rule's time."""
    after = true() if rule.since is None else runs.c.opened_at >= rule.since
    return after if rule.until is None else and_(after, runs.c.opened_at < rule.until)


def is_allowed(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether purpose, project and time of the run are the rule's."""
    return and_(is_wanted(rule), is_of_project(rule), is_in_window(rule))


def is_settled(rule: LeaseRule, now: float) -> ColumnElement[bool]:
    """Whether nothing of the run is waited for any more: it failed, or closed and its grace time is over.

    The grace time passes whatever rewards are there already: a newer one of the same name, or one on another role or
    call, may still come, and only a rule that wants to wait for such has a grace time.
    """
    if not rule.grace_s:
        return runs.c.status != "open"
    return or_(runs.c.status == "failed", and_(runs.c.status == "closed", runs.c.ended_at <= now - rule.grace_s))


def is_of_models(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the call of the row is to a model of the rule, and by no role that the role map gives to another one."""
    return or_(*(and_(_is_to(each, rule), _is_by_no_other(each)) for each in rule.trained))


def calls_that_count(rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the call of the row is to a model of the rule, by one of its roles: `rules.wrong_owner` in SQL."""
    return or_(*(and_(_is_to(each, rule), is_by_roles(each)) for each in rule.trained))


def is_by_roles(of: ModelCalls) -> ColumnElement[bool]:
    """Whether the role of the row is one whose calls count for the model."""
    if of.roles is None:
        return _is_by_no_other(of)
    named = and_(calls.c.role.is_not(None), calls.c.role.in_(of.roles))  # NOT (NULL IN …) is no answer
    return and_(_is_by_no_other(of), named)


def _is_to(of: ModelCalls, rule: LeaseRule) -> ColumnElement[bool]:
    return calls.c.model.in_((of.model, *rule.recorded_models)) if rule.recorded_models else calls.c.model == of.model


def _is_by_no_other(of: ModelCalls) -> ColumnElement[bool]:
    return or_(calls.c.role.is_(None), calls.c.role.not_in(of.other_roles)) if of.other_roles else true()


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


def is_refused(job_id: str, epoch: int) -> ColumnElement[bool]:
    """Whether the job found nothing to train in the batch of the run, in this epoch."""
    return exists().where(refusals.c.job_id == job_id, refusals.c.run_id == runs.c.run_id, refusals.c.epoch == epoch)


def in_reach(connection: Connection, job_id: str, rule: LeaseRule, live: Live) -> ColumnElement[bool]:
    """Whether the run of the row is of a unit that could be fresh (see `is_fresh`), or that the job holds.

    The recent versions are looked up here and named: of a subquery PostgreSQL's planner would assume that its versions
    sampled as much as others did, and would read all calls.
    """
    since = {model: live.updates.get(model, 0) - rule.max_staleness for model in rule.models}
    if all(updates <= 0 for updates in since.values()):
        return true()
    recent_of = []
    for model, updates in since.items():
        recent_of.append(policy_versions.c.model == model)
        if updates > 0:  # of the live line, then: what another line sampled counts as less than none
            recent_of[-1] &= (policy_versions.c.updates >= updates) & (line_of() == live.lines[model])
    named = select(policy_versions.c.version_id).where(or_(*recent_of))
    recent = list(connection.execute(named).scalars())
    near = union(
        select(calls.c.run_id).where(calls.c.version_dispatched.in_(recent), calls.c.run_id.is_not(None)),
        select(holds.c.run_id).where(holds.c.job_id == job_id),
    ).cte("near")
    beside = select(runs.c.group_id).where(runs.c.run_id.in_(select(near.c.run_id)), runs.c.group_id.is_not(None))
    reached = union(select(near.c.run_id), select(runs.c.run_id).where(runs.c.group_id.in_(beside))).subquery("reached")
    return runs.c.run_id.in_(select(reached.c.run_id))


def of_units(keys: Collection[str]) -> ColumnElement[bool]:
    """Whether the run of the row is of one of the units, in a form that finds them by index."""
    of_kind = {kind: [key.removeprefix(kind) for key in keys if key.startswith(kind)] for kind in (_GROUP, _RUN)}
    return or_(runs.c.group_id.in_(of_kind[_GROUP]), and_(runs.c.group_id.is_(None), runs.c.run_id.in_(of_kind[_RUN])))


def beside(run_id: str | None) -> ColumnElement[bool] | None:
    """Whether the run of the row is of the unit of one run; None of none, which is every run."""
    if run_id is None:
        return None
    one = runs.alias("one")
    return select(_unit(one)).where(one.c.run_id == run_id).scalar_subquery() == UNIT


def members(job_id: str, rule: LeaseRule, now: float, live: Live, among: ColumnElement[bool] | None = None) -> Subquery:
    """Return one row per run that the rule allows (`among` those, or all): its unit, and what decides about it.

    `lag` of a run: the updates of what is live minus those of what sampled, of its call that is furthest behind; NULL
    where nothing is live.
    """
    counted = and_(calls.c.run_id == runs.c.run_id, calls_that_count(rule))
    settled = is_settled(rule, now)
    whole = and_(runs.c.status == "closed", has_content())
    if rule.grace_s:
        whole = and_(whole, settled)
    trainable = and_(whole, exists().where(counted, is_exact()))
    eligible = and_(whole, is_rewarded(rule), exists().where(counted, is_exact()))
    lag = (
        select(func.max(_live_updates(rule, live.updates) - live.counted_updates()))
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
            case((settled, 1), else_=0).label("settled"),
            case((eligible, 1), else_=0).label("eligible"),
            case((trainable, 1), else_=0).label("trainable"),
            case((eligible, lag)).label("lag"),
            case((is_held(job_id), 1), else_=0).label("held"),
            case((is_trained(job_id, rule.epoch), 1), else_=0).label("trained"),
            case((is_refused(job_id, rule.epoch), 1), else_=0).label("refused"),
        )
        .select_from(runs.outerjoin(groups, groups.c.group_id == runs.c.group_id))
        .where(is_allowed(rule) if among is None else and_(is_allowed(rule), among))
        .subquery("members")
    )


def _live_updates(rule: LeaseRule, live: Mapping[str, int]) -> ColumnElement[int]:
    """The updates of what is live for the call of the row: of its model."""
    if not live:
        return literal(None, Integer)
    if len(rule.trained) == 1:  # what other models recorded counts as if it had
        return literal(live[rule.models[0]], Integer)
    return case(
        *((calls.c.model == model, literal(updates)) for model, updates in live.items()), else_=literal(None, Integer)
    )


def units(member: Subquery) -> Subquery:
    """Return one row per unit: its members' facts added up."""
    return (
        select(
            member.c.unit,
            func.max(member.c.planned).label("planned"),
            func.sum(member.c.settled).label("settled"),
            func.sum(member.c.eligible).label("eligible"),
            func.sum(member.c.trainable).label("trainable"),
            func.max(member.c.lag).label("lag"),
            func.max(member.c.held).label("held"),
            func.max(member.c.trained).label("trained"),
            func.max(member.c.refused).label("refused"),
            func.min(member.c.opened_at).label("opened_at"),
        )
        .group_by(member.c.unit)
        .subquery("units")
    )


def is_complete(unit: Subquery) -> ColumnElement[bool]:
    """Whether every planned member is settled."""
    return unit.c.settled >= unit.c.planned


def is_large_enough(unit: Subquery, rule: LeaseRule) -> ColumnElement[bool]:
    """Whether enough members are eligible."""
    return unit.c.eligible >= max(rule.min_group, 1)


def is_fresh(unit: Subquery, rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the oldest weights that sampled the unit are within the bound. Nothing live: nothing is stale."""
    return func.coalesce(unit.c.lag, 0) <= rule.max_staleness


def is_ready(unit: Subquery, rule: LeaseRule) -> ColumnElement[bool]:
    """Whether the unit can be leased now."""
    return and_(is_complete(unit), is_large_enough(unit, rule), is_fresh(unit, rule), is_free(unit))


def is_free(unit: Subquery) -> ColumnElement[bool]:
    """Whether the job has done nothing with the unit yet in this epoch."""
    return and_(unit.c.held == 0, unit.c.trained == 0, unit.c.refused == 0)
