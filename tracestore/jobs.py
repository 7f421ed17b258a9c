"""Training jobs and what waits for them.

A job is one trainer configuration with its own checkpoints and ledger; several may read the same runs.
Called by the trainer, the proxy's backlog endpoint and the commands that look at jobs, through `Store`.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, case, delete, func, or_, select, update

from tracegrad.tracestore.branches import live_of
from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import Conflict, NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.publishes import is_publishing
from tracegrad.tracestore.readiness import in_reach, is_allowed, is_by_roles, is_exact, is_ready, members, units
from tracegrad.tracestore.records import Backlog, Json, LeaseRule
from tracegrad.tracestore.schema import (
    calls,
    checkpoints,
    holds,
    job_models,
    jobs,
    leases,
    policy_versions,
    refusals,
    runs,
)
from tracegrad.tracestore.section import near_misses
from tracegrad.tracestore.versions import find_live


class Jobs(Noun):
    """The part of the store that knows training jobs."""

    def register_job(self, job_id: str, models: Sequence[str], config: Json) -> None:
        """Announce a job. Registering it again keeps its ledger and takes the new configuration.

        Raises:
            Conflict: the job trains other models.
        """
        with self._db.write() as connection:
            row = {"job_id": job_id, "config": config, "created_at": self._db.now()}
            connection.execute(insert(connection, jobs).on_conflict_do_nothing(index_elements=["job_id"]), [row])
            existing_job(connection, job_id, lock=True)
            stored = models_of(connection, job_id)
            if not stored:
                connection.execute(job_models.insert(), [{"job_id": job_id, "model": model} for model in models])
            elif set(stored) != set(models):
                raise Conflict(
                    f"job {job_id!r} trains {', '.join(stored)}, not {', '.join(models)}: give the new job a name of "
                    "its own"
                )
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(config=config))

    def remove_job(self, job_id: str) -> list[int]:
        """Remove a job that never trained anything: a name that was mistyped. Return its versions, abandoned now.

        They stay, of no job: what they sampled knows its version.

        Raises:
            NotFound: no such job.
            Conflict: it has committed a step, a trainer holds a lease for it, or one of its versions is live.
        """
        with self._db.write() as connection:
            existing_job(connection, job_id, lock=True)
            steps = connection.execute(
                select(func.max(checkpoints.c.step)).where(checkpoints.c.job_id == job_id)
            ).scalar()
            if steps is not None:
                raise Conflict(f"job {job_id!r} has trained {steps} steps: its ledger says what became of their runs")
            held = (leases.c.job_id == job_id, leases.c.state == "held", leases.c.expires_at > self._db.now())
            if (lease := connection.execute(select(leases.c.lease_id).where(*held)).first()) is not None:
                raise Conflict(f"a trainer holds lease {lease.lease_id} for job {job_id!r}: stop it first")
            for model in models_of(connection, job_id):
                if (live := find_live(connection, model)) is not None and live.job_id == job_id:
                    raise Conflict(
                        f"version {live.version_id} of job {job_id!r} is live: publish another one first "
                        "(`tracegrad rollback`, or a trainer of the right job)"
                    )
            mine = policy_versions.c.job_id == job_id
            changed = update(policy_versions).where(mine).values(job_id=None, abandoned=True)
            versions = list(connection.execute(changed.returning(policy_versions.c.version_id)).scalars())
            for table in (refusals, holds, leases, job_models, jobs):
                connection.execute(delete(table).where(table.c.job_id == job_id))
            return sorted(versions)

    def backlog(self, job_id: str, rule: LeaseRule) -> Backlog:
        """Return what waits for the job under `rule`. A job that is not registered yet has consumed nothing."""
        with self._db.read() as connection:
            live = live_of(connection, rule.models)
            unit = units(members(job_id, rule, self._db.now(), live, in_reach(connection, job_id, rule, live)))
            ready = is_ready(unit, rule)
            leased = and_(unit.c.held == 1, unit.c.eligible > 0)
            counts = [func.coalesce(func.sum(case((kind, 1), else_=0)), 0) for kind in (ready, leased)]
            found = connection.execute(select(*counts).select_from(unit)).one()
            return Backlog(
                ready_groups=int(found[0]),
                leased_groups=int(found[1]),
                publishing=is_publishing(connection, rule.models),
            )

    def recorded_elsewhere(self, rule: LeaseRule) -> dict[str, int]:
        """Return, by model, how many of the runs that `rule` allows have exact calls by its roles to other models."""
        known = (*rule.models, *rule.recorded_models)
        whose = (calls.c.model.not_in(known), or_(*(is_by_roles(each) for each in rule.trained)))
        chosen = (
            select(calls.c.model, func.count(func.distinct(calls.c.run_id)))
            .join(runs, runs.c.run_id == calls.c.run_id)
            .where(*whose, is_exact(), is_allowed(rule), runs.c.status == "closed")
            .group_by(calls.c.model)
            .order_by(calls.c.model)
        )
        with self._db.read() as connection:
            return {str(model): int(count) for model, count in connection.execute(chosen)}


def models_of(connection: Connection, job_id: str) -> tuple[str, ...]:
    """Return the models that a job trains, by name."""
    chosen = select(job_models.c.model).where(job_models.c.job_id == job_id).order_by(job_models.c.model)
    return tuple(connection.execute(chosen).scalars())


def existing_job(connection: Connection, job_id: str, *, lock: bool = False) -> Any:
    """Return the row of a job. Raises NotFound."""
    chosen = select(jobs).where(jobs.c.job_id == job_id)
    row = connection.execute(chosen.with_for_update() if lock else chosen).one_or_none()
    if row is None:
        raise no_such_job(connection, job_id)
    return row


def no_such_job(connection: Connection, job_id: str) -> NotFound:
    """Return what to raise where a job is not known."""
    names = connection.execute(select(jobs.c.job_id)).scalars().all()
    return NotFound(f"no training job {job_id!r}{near_misses(job_id, names)}: `tracegrad train` registers its own")
