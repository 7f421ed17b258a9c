"""Leases: a trainer's fenced, time-limited hold on whole groups.

The batch plan (order of the runs, seed) commits with the lease, and so do the outlines of the runs' spans, which parts
that come later would change. Every claim has a new token; only the newest may renew,
release or commit. A run is held at most once per job (a unique key), and an `eval` run never (a CHECK).
A lease that expired stays the job's until it is reclaimed or released: its groups are not handed out twice.
Called by the trainer, through `Store`; `claimed` by `ledger` too.
"""

from dataclasses import replace
from typing import Any

import msgspec
from sqlalchemy import Connection, and_, delete, func, select, update

from tracegrad.tracestore.branches import live_of
from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import InvalidRecord, LeaseLost
from tracegrad.tracestore.jobs import existing_job, models_of
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.readiness import in_reach, is_ready, members, of_units, units
from tracegrad.tracestore.records import BatchPlan, Lease, LeaseRule
from tracegrad.tracestore.runs import has_content
from tracegrad.tracestore.schema import attributions, calls, holds, jobs, leases, rewards, runs
from tracegrad.tracestore.spans import outlines_of


class Leases(Noun):
    """The part of the store that hands runs to trainers."""

    def lease(
        self, job_id: str, rule: LeaseRule, *, groups: int, lease_s: float, step: int, epoch: int, seed: int
    ) -> Lease | None:
        """Hold the `groups` oldest ready groups, or return None where fewer are ready.

        The plan lists the eligible members, group by group in order of opening. `epoch` outranks `rule.epoch`.

        Raises:
            NotFound: the job is not registered.
            InvalidRecord: the rule is for other models, or `groups` is below 1.
        """
        if groups < 1:
            raise InvalidRecord(f"job {job_id!r} asks for {groups} groups: ask for at least 1")
        rule = replace(rule, epoch=epoch)
        with self._db.write() as connection:
            job = existing_job(connection, job_id, lock=True)
            trained = models_of(connection, job_id)
            if set(trained) != set(rule.models):
                said = f"trains {', '.join(trained)}, its lease rule says {', '.join(rule.models)}"
                raise InvalidRecord(f"job {job_id!r} {said}")
            if rule_of(job.rule) != rule:
                connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(rule=rule))
            taken = _take(connection, job_id, rule, groups, self._db.now())
            if taken is None:
                return None
            return self._hold(
                connection, job_id, taken, lease_s, BatchPlan(step=step, epoch=epoch, seed=seed, run_ids=tuple(taken))
            )

    def reclaim(self, job_id: str, lease_s: float) -> Lease | None:
        """Take over the job's oldest unfinished lease with a new token and the same plan; None where there is none.

        Whoever held it before is fenced off from now on, whether or not its time was up.
        """
        with self._db.write() as connection:
            row = connection.execute(
                select(leases)
                .where(leases.c.job_id == job_id, leases.c.state == "held")
                .order_by(leases.c.lease_id)
                .limit(1)
                .with_for_update()
            ).one_or_none()
            if row is None:
                return None
            return self._set(connection, row, token=row.token + 1, expires_at=self._db.now() + lease_s)

    def renew(self, lease: Lease, lease_s: float) -> Lease:
        """Give the lease `lease_s` more seconds from now. Raises LeaseLost."""
        with self._db.write() as connection:
            row = claimed(connection, lease)
            return self._set(connection, row, token=row.token, expires_at=self._db.now() + lease_s)

    def release(self, lease: Lease) -> None:
        """Give the groups back untrained. Raises LeaseLost."""
        with self._db.write() as connection:
            claimed(connection, lease)
            connection.execute(update(leases).where(leases.c.lease_id == lease.lease_id).values(state="released"))
            drop_holds(connection, lease.lease_id)

    def _hold(
        self, connection: Connection, job_id: str, taken: dict[str, str], lease_s: float, plan: BatchPlan
    ) -> Lease:
        now = self._db.now()
        row = {
            "job_id": job_id,
            "token": 1,
            "state": "held",
            "step": plan.step,
            "epoch": plan.epoch,
            "seed": plan.seed,
            "run_ids": plan.run_ids,
            "calls_through": connection.execute(select(func.coalesce(func.max(calls.c.seq), 0))).scalar_one(),
            "rewards_through": connection.execute(select(func.coalesce(func.max(rewards.c.seq), 0))).scalar_one(),
            "attributions_through": connection.execute(
                select(func.coalesce(func.max(attributions.c.seq), 0))
            ).scalar_one(),
            "created_at": now,
            "expires_at": now + lease_s,
        }
        stored = connection.execute(insert(connection, leases).values(**row).returning(leases)).one()
        outlines = outlines_of(connection, plan.run_ids)
        common = {"job_id": job_id, "lease_id": stored.lease_id}
        connection.execute(
            insert(connection, holds),
            [
                {**common, "run_id": run_id, "purpose": purpose, "spans": outlines[run_id]}
                for run_id, purpose in taken.items()
            ],
        )
        return _lease(stored)

    def _set(self, connection: Connection, row: Any, *, token: int, expires_at: float) -> Lease:
        connection.execute(
            update(leases).where(leases.c.lease_id == row.lease_id).values(token=token, expires_at=expires_at)
        )
        return replace(_lease(row), token=token, expires_at=expires_at)


def claimed(connection: Connection, lease: Lease) -> Any:
    """Lock and return the row of a lease that `lease` still holds. Raises LeaseLost."""
    row = connection.execute(select(leases).where(leases.c.lease_id == lease.lease_id).with_for_update()).one_or_none()
    if row is None or row.job_id != lease.job_id:
        raise LeaseLost(f"lease {lease.lease_id} of job {lease.job_id!r} does not exist: lease again")
    if row.token != lease.token:
        raise LeaseLost(
            f"lease {lease.lease_id} of job {lease.job_id!r} was reclaimed (token {row.token}, yours is {lease.token})"
            ": another trainer works on it; stop"
        )
    if row.state != "held":
        raise LeaseLost(f"lease {lease.lease_id} of job {lease.job_id!r} is {row.state} already: lease again")
    return row


def drop_holds(connection: Connection, lease_id: int) -> None:
    """Free the runs of a lease."""
    connection.execute(delete(holds).where(holds.c.lease_id == lease_id))


def _take(connection: Connection, job_id: str, rule: LeaseRule, wanted: int, now: float) -> dict[str, str] | None:
    """Return run id -> purpose of the eligible members of `wanted` ready groups, locked; None where fewer are ready."""
    live = live_of(connection, rule.models)
    unit = units(members(job_id, rule, now, live, in_reach(connection, job_id, rule, live)))
    ready = select(unit.c.unit).where(is_ready(unit, rule))
    chosen = list(connection.execute(ready.order_by(unit.c.opened_at, unit.c.unit).limit(wanted)).scalars())
    if len(chosen) < wanted:
        return None
    near = members(job_id, rule, now, live, of_units(chosen))
    rows = connection.execute(
        select(near.c.unit, near.c.run_id, near.c.purpose)
        .where(near.c.eligible == 1)
        .order_by(near.c.member, near.c.run_id)
    ).all()
    by_unit: dict[str, dict[str, str]] = {key: {} for key in chosen}
    for row in rows:
        by_unit[row.unit][row.run_id] = row.purpose
    taken = {run_id: purpose for key in chosen for run_id, purpose in by_unit[key].items()}
    there = and_(runs.c.run_id.in_(taken), has_content())
    free = select(runs.c.run_id).where(there).order_by(runs.c.run_id).with_for_update(key_share=True, skip_locked=True)
    whole = all(len(by_unit[key]) >= max(rule.min_group, 1) for key in chosen)
    if not whole or len(connection.execute(free).all()) < len(taken):
        return None  # a member is being written to this moment, or was just deleted: ask again
    return taken


def rule_of(stored: Any) -> LeaseRule | None:
    """Return the rule that a job last leased by, or None before its first lease."""
    return None if stored is None else msgspec.convert(stored, LeaseRule)


def _lease(row: Any) -> Lease:
    return Lease(
        lease_id=row.lease_id,
        token=row.token,
        job_id=row.job_id,
        plan=BatchPlan(step=row.step, epoch=row.epoch, seed=row.seed, run_ids=tuple(row.run_ids)),
        expires_at=row.expires_at,
        state=row.state,
    )
