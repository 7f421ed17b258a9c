"""What a training job did and what waits for it: steps with their metrics, staleness, leases, publishes.

Read only, no payload. Conservation of a job's tokens is `Store.consumption`. Called by `tracegrad doctor`, through
`Store`.
"""

from collections import defaultdict
from typing import Any

from sqlalchemy import case, func, select

from tracegrad.tracestore.branches import descent, live_of
from tracegrad.tracestore.diagnosis_extent import calls_within
from tracegrad.tracestore.diagnosis_records import (
    Extent,
    HeldLease,
    JobFacts,
    StepFacts,
    Training,
    WaitingGroups,
)
from tracegrad.tracestore.jobs import models_of
from tracegrad.tracestore.leases import rule_of
from tracegrad.tracestore.ledger import versions_of_steps
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.publishes import publish_of
from tracegrad.tracestore.readiness import beside, is_complete, is_free, is_large_enough, members, units
from tracegrad.tracestore.records import Publish
from tracegrad.tracestore.schema import (
    calls,
    checkpoints,
    consumption,
    jobs,
    leases,
    ledger,
    policy_versions,
    publishes,
    step_versions,
)


class JobDiagnosis(Noun):
    """The part of the store that says how training goes."""

    def list_jobs(self) -> list[JobFacts]:
        """Return the training jobs, the oldest first."""
        with self._db.read() as connection:
            return [
                JobFacts(
                    job_id=row.job_id,
                    models=models_of(connection, row.job_id),
                    config=row.config,
                    rule=rule_of(row.rule),
                )
                for row in connection.execute(select(jobs).order_by(jobs.c.created_at, jobs.c.job_id)).all()
            ]

    def trained_by(self, run_id: str) -> list[Training]:
        """Return the steps that trained a run."""
        chosen = select(ledger).where(ledger.c.run_id == run_id).order_by(ledger.c.job_id, ledger.c.epoch)
        with self._db.read() as connection:
            return [
                Training(
                    job_id=row.job_id,
                    epoch=row.epoch,
                    step=row.step,
                    checkpoint_hash=row.checkpoint_hash,
                    versions=versions_of_steps(connection, row.job_id, [row.step])[row.step],
                )
                for row in connection.execute(chosen).all()
            ]

    def trained_staleness(self, job_id: str, extent: Extent) -> dict[int, int]:
        """Return lag -> trained tokens: how far the weights that were trained were from those that sampled them.

        0 is on-policy. Counted as staleness is (see `branches`): what a rolled-back version sampled is as old as the
        way by where its branch left the line. A later rollback changes nothing of what was trained before.
        """
        made = policy_versions.alias("made")
        trained, sampled = made.c.parent_id, policy_versions.c.version_id
        ordinal = func.coalesce(made.c.updates, ledger.c.step)
        chosen = (
            select(trained, ordinal, sampled, policy_versions.c.updates, func.sum(consumption.c.trained_tokens))
            .join_from(
                consumption,
                ledger,
                (ledger.c.job_id == consumption.c.job_id)
                & (ledger.c.run_id == consumption.c.run_id)
                & (ledger.c.epoch == consumption.c.epoch),
            )
            .join(calls, calls.c.seq == consumption.c.seq)
            .outerjoin(
                step_versions,
                (step_versions.c.job_id == ledger.c.job_id)
                & (step_versions.c.step == ledger.c.step)
                & (step_versions.c.model == func.coalesce(consumption.c.model, calls.c.model)),
            )
            .outerjoin(made, made.c.version_id == step_versions.c.version_id)
            .join(policy_versions, policy_versions.c.version_id == calls.c.version_dispatched)
            .where(consumption.c.job_id == job_id, consumption.c.trained_tokens > 0, calls_within(extent))
            .group_by(trained, ordinal, sampled, policy_versions.c.updates)
        )
        by_lag: dict[int, int] = defaultdict(int)
        with self._db.read() as connection:
            versions = descent(connection)
            for weights, made_by, sampler, its_own, tokens in connection.execute(chosen):
                lag = abs(made_by - 1 - its_own) if weights is None else versions.apart(weights, sampler)
                by_lag[lag] += int(tokens)
        return dict(sorted(by_lag.items()))

    def waiting_groups(self, job_id: str, extent: Extent) -> WaitingGroups | None:
        """Return the groups that the job could lease but for their age; None before its first lease.

        What a later version than the live one sampled (serving is pinned, say) has the age 0. Of the extent only the
        run narrows it: then its group alone is looked at.
        """
        with self._db.read() as connection:
            rule = rule_of(connection.execute(select(jobs.c.rule).where(jobs.c.job_id == job_id)).scalar())
            if rule is None:
                return None
            live = live_of(connection, rule.models)
            unit = units(members(job_id, rule, self._db.now(), live, beside(extent.run_id)))
            ripe = select(case((unit.c.lag > 0, unit.c.lag), else_=0).label("lag")).where(
                is_free(unit), is_complete(unit), is_large_enough(unit, rule)
            )
            aged = ripe.subquery("aged")
            rows = connection.execute(select(aged.c.lag, func.count()).group_by(aged.c.lag).order_by(aged.c.lag))
            by_lag = {int(steps): int(groups) for steps, groups in rows}
            return WaitingGroups(max_staleness=rule.max_staleness, by_lag=by_lag)

    def held_leases(self, job_id: str) -> list[HeldLease]:
        """Return the leases of a job that have not ended, the oldest first."""
        now = self._db.now()
        chosen = select(leases).where(leases.c.job_id == job_id, leases.c.state == "held").order_by(leases.c.lease_id)
        with self._db.read() as connection:
            return [held_lease(row, now) for row in connection.execute(chosen)]

    def last_steps(self, job_id: str, limit: int = 5) -> list[StepFacts]:
        """Return the newest committed steps of a job with what the trainer measured, the newest first."""
        chosen = (
            select(checkpoints).where(checkpoints.c.job_id == job_id).order_by(checkpoints.c.step.desc()).limit(limit)
        )
        with self._db.read() as connection:
            rows = connection.execute(chosen).all()
            made = versions_of_steps(connection, job_id, [row.step for row in rows])
        return [
            StepFacts(step=row.step, versions=made[row.step], created_at=row.created_at, metrics=row.metrics)
            for row in rows
        ]

    def last_publishes(self, model: str, limit: int = 5) -> list[Publish]:
        """Return the newest publishes of a model, the newest first."""
        chosen = select(publishes).where(publishes.c.model == model).order_by(publishes.c.publish_id.desc())
        with self._db.read() as connection:
            return [publish_of(row) for row in connection.execute(chosen.limit(limit))]


def held_lease(row: Any, now: float) -> HeldLease:
    """Return the row of an unfinished lease as a record."""
    return HeldLease(
        lease_id=row.lease_id,
        job_id=row.job_id,
        step=row.step,
        runs=len(row.run_ids),
        expired_s=now - row.expires_at,
        expires_at=row.expires_at,
    )
