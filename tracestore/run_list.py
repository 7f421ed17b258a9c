"""Runs as a list for people: newest first, with counts and current rewards. Reads no payload."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select

from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import Purpose, RunStatus, RunSummary
from tracegrad.tracestore.rewards import current_rewards
from tracegrad.tracestore.runs import find_run, run_of
from tracegrad.tracestore.schema import calls, choices, runs


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
                last = find_run(connection, before)
                if last is None:
                    raise NotFound(f"no run {before!r} to list before: start again without `before`")
                earlier = and_(runs.c.opened_at == last.opened_at, runs.c.run_id < before)
                chosen = chosen.where(or_(runs.c.opened_at < last.opened_at, earlier))
            rows = connection.execute(chosen.order_by(runs.c.opened_at.desc(), runs.c.run_id.desc()).limit(limit)).all()
            return _summaries(connection, [run_of(row) for row in rows])


def _summaries(connection: Connection, listed: Sequence[Any]) -> list[RunSummary]:
    run_ids = [run.run_id for run in listed]
    within = calls.c.run_id.in_(run_ids)
    sums = (
        select(calls.c.run_id, func.sum(choices.c.n_tokens).label("n"))
        .join(choices, choices.c.call_id == calls.c.call_id)
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
