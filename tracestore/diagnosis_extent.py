"""Conditions for a part of the store, on calls, runs and groups: what an `Extent` means in SQL.

Called by the `diagnosis*` modules and by `conservation`.
"""

from sqlalchemy import ColumnElement, and_, exists, select, true

from tracegrad.tracestore.diagnosis_records import Extent
from tracegrad.tracestore.schema import calls, groups, runs, tasks


def calls_within(extent: Extent) -> ColumnElement[bool]:
    """Whether the call of the row is looked at."""
    wanted: list[ColumnElement[bool]] = []
    if extent.run_id is not None:
        wanted.append(calls.c.run_id == extent.run_id)
    if extent.project is not None:
        wanted.append(calls.c.project == extent.project)
    if extent.models is not None:
        wanted.append(calls.c.model.in_(extent.models))
    if extent.since is not None:
        wanted.append(calls.c.received_at >= extent.since)
    return and_(true(), *wanted)


def runs_within(extent: Extent) -> ColumnElement[bool]:
    """Whether the run of the row is looked at."""
    wanted: list[ColumnElement[bool]] = []
    if extent.run_id is not None:
        wanted.append(runs.c.run_id == extent.run_id)
    if extent.project is not None:
        wanted.append(runs.c.project == extent.project)
    if extent.models is not None:
        wanted.append(exists().where(calls.c.run_id == runs.c.run_id, calls.c.model.in_(extent.models)))
    if extent.since is not None:
        wanted.append(runs.c.opened_at >= extent.since)
    return and_(true(), *wanted)


def groups_within(extent: Extent) -> ColumnElement[bool]:
    """Whether the group of the row is looked at: of one run, that run's group."""
    member = runs.alias("member")
    wanted: list[ColumnElement[bool]] = []
    if extent.run_id is not None:
        of_run = select(member.c.group_id).where(member.c.run_id == extent.run_id)
        wanted.append(groups.c.group_id == of_run.scalar_subquery())
    if extent.project is not None:
        wanted.append(exists().where(tasks.c.task_id == groups.c.task_id, tasks.c.project == extent.project))
    if extent.models is not None:
        wanted.append(
            exists().where(
                member.c.group_id == groups.c.group_id,
                calls.c.run_id == member.c.run_id,
                calls.c.model.in_(extent.models),
            )
        )
    if extent.since is not None:
        wanted.append(groups.c.created_at >= extent.since)
    return and_(true(), *wanted)
