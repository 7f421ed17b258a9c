"""Training jobs and what waits for them.

A job is one trainer configuration with its own checkpoints and ledger; several may read the same runs.
Called by the trainer and by the proxy's backlog endpoint, through `Store`.
"""

from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, func, or_, select, update

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import Conflict, NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.publishes import is_publishing, live_step
from tracegrad.tracestore.readiness import in_reach, is_allowed, is_exact, is_ready, members, units
from tracegrad.tracestore.records import Backlog, Json, LeaseRule
from tracegrad.tracestore.schema import calls, jobs, runs


class Jobs(Noun):
    """The part of the store that knows training jobs."""

    def register_job(self, job_id: str, model: str, config: Json) -> None:
        """Announce a job. Registering it again keeps its ledger and takes the new configuration.

        Raises:
            Conflict: the job trains another model.
        """
        with self._db.write() as connection:
            row = {"job_id": job_id, "model": model, "config": config, "created_at": self._db.now()}
            connection.execute(insert(connection, jobs).on_conflict_do_nothing(index_elements=["job_id"]), [row])
            stored = existing_job(connection, job_id)
            if stored.model != model:
                raise Conflict(
                    f"job {job_id!r} trains {stored.model!r}, not {model!r}: give the new job a name of its own"
                )
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(config=config))

    def backlog(self, job_id: str, rule: LeaseRule) -> Backlog:
        """Return what waits for the job under `rule`. A job that is not registered yet has consumed nothing."""
        with self._db.read() as connection:
            live = live_step(connection, rule.model)
            unit = units(members(job_id, rule, self._db.now(), in_reach(connection, job_id, rule, live)))
            ready = is_ready(unit, rule, live)
            leased = and_(unit.c.held == 1, unit.c.eligible > 0)
            counts = [func.coalesce(func.sum(case((kind, 1), else_=0)), 0) for kind in (ready, leased)]
            found = connection.execute(select(*counts).select_from(unit)).one()
            return Backlog(
                ready_groups=int(found[0]),
                leased_groups=int(found[1]),
                publishing=is_publishing(connection, rule.model),
            )

    def recorded_elsewhere(self, rule: LeaseRule) -> dict[str, int]:
        """Return, by model, how many of the runs that `rule` allows have exact calls by its roles to other models."""
        by_role: list[ColumnElement[bool]] = [] if rule.roles is None else [calls.c.role.in_(rule.roles)]
        if rule.other_roles:
            by_role.append(or_(calls.c.role.is_(None), calls.c.role.not_in(rule.other_roles)))
        chosen = (
            select(calls.c.model, func.count(func.distinct(calls.c.run_id)))
            .join(runs, runs.c.run_id == calls.c.run_id)
            .where(calls.c.model.not_in(rule.models), is_exact(), is_allowed(rule), runs.c.status == "closed", *by_role)
            .group_by(calls.c.model)
            .order_by(calls.c.model)
        )
        with self._db.read() as connection:
            return {str(model): int(count) for model, count in connection.execute(chosen)}


def existing_job(connection: Connection, job_id: str, *, lock: bool = False) -> Any:
    """Return the row of a job. Raises NotFound."""
    chosen = select(jobs).where(jobs.c.job_id == job_id)
    row = connection.execute(chosen.with_for_update() if lock else chosen).one_or_none()
    if row is None:
        raise NotFound(f"no training job {job_id!r}: register_job first")
    return row
