"""Runs as a list for people, newest first, with counts and current rewards; and the calls that belong to no run.

Reads no payload. Called by `tracegrad runs`, the commands that go through all runs, and the proxy, through `Store`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import CallStatus, Purpose, RunStatus, RunSummary
from tracegrad.tracestore.rewards import current_rewards
from tracegrad.tracestore.runs import find_run, run_of
from tracegrad.tracestore.schema import api_keys, calls, choices, runs, tasks
from tracegrad.tracestore.section import near_misses


@dataclass(frozen=True, kw_only=True, slots=True)
class UnplacedCall:
    """A call that belongs to no run, in short."""

    call_id: str
    completion_id: str | None
    project: str
    role: str | None
    model: str
    requested_model: str
    version: int | None
    status: CallStatus
    quarantine: str | None
    received_at: float
    n_sampled_tokens: int


class RunList(Noun):
    """The part of the store that lists."""

    def list_runs(
        self,
        *,
        project: str | None = None,
        purpose: Purpose | None = None,
        status: RunStatus | None = None,
        task_id: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[RunSummary]:
        """Return up to `limit` runs, newest first; `before` is the id of the last run of the page before.

        Raises:
            NotFound: `before` names no run.
        """
        wanted = {"project": project, "purpose": purpose, "status": status, "task_id": task_id}
        chosen = select(runs).where(*(runs.c[name] == value for name, value in wanted.items() if value is not None))
        with self._db.read() as connection:
            if before is not None:
                chosen = chosen.where(older_than(connection, before))
            rows = connection.execute(chosen.order_by(runs.c.opened_at.desc(), runs.c.run_id.desc()).limit(limit)).all()
            return _summaries(connection, [run_of(row) for row in rows])

    def require_project(self, project: str) -> None:
        """Refuse a project that a store with others in it does not know: runs, tasks, keys, or calls without a run.

        Raises:
            NotFound: it is none; the message names those that are like it.
        """
        alone = select(calls.c.project).where(calls.c.run_id.is_(None))
        places = [*(select(table.c.project) for table in (runs, api_keys, tasks)), alone]
        with self._db.read() as connection:
            for each in places:
                if connection.execute(each.where(each.selected_columns.project == project).limit(1)).first():
                    return
            names = {str(name) for each in places for name in connection.execute(each.distinct()).scalars()}
        if names:
            raise NotFound(f"no project {project!r} in this store{near_misses(project, names)}")

    def list_unplaced_calls(
        self, *, project: str | None = None, limit: int = 50, before: str | None = None
    ) -> list[UnplacedCall]:
        """Return up to `limit` calls that nobody placed in a run, newest first; `before` is the last of a page.

        Raises:
            NotFound: `before` names no call.
        """
        chosen = select(calls).where(calls.c.run_id.is_(None))
        if project is not None:
            chosen = chosen.where(calls.c.project == project)
        with self._db.read() as connection:
            if before is not None:
                last = connection.execute(select(calls.c.seq).where(calls.c.call_id == before)).scalar()
                if last is None:
                    raise NotFound(f"no call {before!r} to list before: start again without `before`")
                chosen = chosen.where(calls.c.seq < last)
            rows = connection.execute(chosen.order_by(calls.c.seq.desc()).limit(limit)).all()
            tokens = _sampled_tokens(connection, [row.call_id for row in rows])
        return [
            UnplacedCall(
                call_id=row.call_id,
                completion_id=row.completion_id,
                project=row.project,
                role=row.role,
                model=row.model,
                requested_model=row.requested_model,
                version=row.version_dispatched,
                status=row.status,
                quarantine=row.quarantine,
                received_at=row.received_at,
                n_sampled_tokens=tokens.get(row.call_id, 0),
            )
            for row in rows
        ]


def older_than(connection: Connection, run_id: str) -> ColumnElement[bool]:
    """Whether the run of the row comes after this one in a list, newest first. Raises NotFound."""
    last = find_run(connection, run_id)
    if last is None:
        raise NotFound(f"no run {run_id!r} to list before: start again without `before`")
    earlier = and_(runs.c.opened_at == last.opened_at, runs.c.run_id < run_id)
    return or_(runs.c.opened_at < last.opened_at, earlier)


def _sampled_tokens(connection: Connection, call_ids: Sequence[str]) -> dict[str, int]:
    chosen = select(calls.c.call_id, func.sum(choices.c.n_tokens)).join_from(calls, choices)
    chosen = chosen.where(calls.c.call_id.in_(call_ids)).group_by(calls.c.call_id)
    return {call_id: int(tokens) for call_id, tokens in connection.execute(chosen)}


def _summaries(connection: Connection, listed: Sequence[Any]) -> list[RunSummary]:
    run_ids = [run.run_id for run in listed]
    within = calls.c.run_id.in_(run_ids)
    sums = (
        select(calls.c.run_id, func.sum(choices.c.n_tokens).label("n"))
        .join(choices, choices.c.seq == calls.c.seq)
        .where(within)
        .group_by(calls.c.run_id)
    )
    tokens = {row.run_id: row.n for row in connection.execute(sums)}
    n_calls: dict[str, int] = defaultdict(int)
    roles: dict[str, set[str]] = defaultdict(set)
    versions: dict[str, set[int]] = defaultdict(set)
    facts = select(calls.c.run_id, calls.c.role, calls.c.version_dispatched, func.count().label("n"))
    for row in connection.execute(
        facts.where(within).group_by(calls.c.run_id, calls.c.role, calls.c.version_dispatched)
    ):
        n_calls[row.run_id] += row.n
        roles[row.run_id].update(() if row.role is None else (row.role,))
        versions[row.run_id].update(() if row.version_dispatched is None else (row.version_dispatched,))
    rewards: dict[str, dict[str, float]] = defaultdict(dict)
    for reward in current_rewards(connection, run_ids):
        if reward.call_id is None:
            rewards[reward.run_id][reward.name if reward.role is None else f"{reward.role}:{reward.name}"] = (
                reward.value
            )
    return [
        RunSummary(
            run=run,
            n_calls=n_calls[run.run_id],
            n_sampled_tokens=int(tokens.get(run.run_id, 0)),
            rewards=rewards[run.run_id],
            roles=tuple(sorted(roles[run.run_id])),
            versions=tuple(sorted(versions[run.run_id])),
        )
        for run in listed
    ]
