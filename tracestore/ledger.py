"""The commit of a step: one transaction in which checkpoint, versions, ledger and consumption come to be.

The ledger row that names the checkpoint's hash *is* the commit (law 7): a folder on disk that no row names never
happened. Each run is entered once per (run, job, epoch), by key. Refuses a fenced trainer, one whose
weights were rolled back, and consumption that does not account for every choice the lease planned (law 5). Called by
the trainer, through `Store`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, case, func, select, update

from tracegrad.tracestore.errors import Conflict, InvalidRecord
from tracegrad.tracestore.jobs import existing_job, models_of
from tracegrad.tracestore.leases import claimed, drop_holds
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import Consumption, Lease, PolicyVersion
from tracegrad.tracestore.schema import (
    calls,
    checkpoints,
    choices,
    consumption,
    holds,
    leases,
    ledger,
    refusals,
    step_versions,
)
from tracegrad.tracestore.step_records import CheckpointRow, StepCommit
from tracegrad.tracestore.traces import stood_when_leased
from tracegrad.tracestore.versions import add, existing, require_kept


class Ledger(Noun):
    """The part of the store that says what was trained."""

    def commit_step(self, lease: Lease, commit: StepCommit) -> dict[str, PolicyVersion]:
        """Commit a finished step and return its policy versions (kind `step`) by model.

        Committing the same checkpoint by the same lease again returns them, so StoreUnavailable may be retried.

        Raises:
            LeaseLost: the lease was reclaimed, released or acknowledged otherwise.
            Abandoned: what the step began with was rolled back; the lease is still held.
            Conflict: the job committed this step already, or trained one of the runs in this epoch.
            InvalidRecord: other models, an unknown parent, or consumption that does not add up to the planned choices.
        """
        with self._db.write() as connection:
            existing_job(connection, lease.job_id, lock=True)
            done = _done(connection, lease, commit)
            if done:
                return done
            row = claimed(connection, lease)
            _check_models(lease.job_id, models_of(connection, lease.job_id), commit)
            require_kept(connection, commit.built_on())
            numbers = _check_accounted(connection, row, commit.consumption)
            _check_new(connection, row)
            made = {
                new.model: add(
                    connection,
                    model=new.model,
                    kind="step",
                    parent_id=new.parent_id,
                    checkpoint_path=new.path,
                    checkpoint_hash=commit.checkpoint_hash,
                    step=row.step,
                    job_id=row.job_id,
                    now=self._db.now(),
                )
                for new in commit.versions
            }
            _enter(connection, row, commit, made, self._db.now())
            _consume(connection, row, commit.consumption, numbers)
            connection.execute(update(leases).where(leases.c.lease_id == row.lease_id).values(state="acknowledged"))
            drop_holds(connection, row.lease_id)
            return made

    def refuse(self, lease: Lease, consumption: Sequence[Consumption]) -> None:
        """Put the runs of a lease aside in which there is nothing to train, so that this epoch leases them no more.

        `consumption` says why, choice by choice, as that of a step does; the lease is released.

        Raises:
            LeaseLost: the lease was reclaimed, released or acknowledged.
            InvalidRecord: something of it would train, or the choices do not add up to the planned ones.
        """
        with self._db.write() as connection:
            row = claimed(connection, lease)
            if any(entry.trained_tokens for entry in consumption):
                raise InvalidRecord(f"lease {lease.lease_id} has tokens to train: commit its step instead")
            _check_accounted(connection, row, consumption)
            reasons: dict[str, dict[str, int]] = {run_id: {} for run_id in row.run_ids}
            for entry in consumption:
                why = reasons[entry.run_id]
                why[str(entry.reason)] = why.get(str(entry.reason), 0) + entry.excluded_tokens
            common = {"job_id": row.job_id, "epoch": row.epoch, "created_at": self._db.now()}
            connection.execute(
                refusals.insert(), [{**common, "run_id": run_id, "reasons": why} for run_id, why in reasons.items()]
            )
            connection.execute(update(leases).where(leases.c.lease_id == row.lease_id).values(state="released"))
            drop_holds(connection, row.lease_id)

    def last_checkpoint(self, job_id: str) -> CheckpointRow | None:
        """Return the newest committed step of a job, or None."""
        with self._db.read() as connection:
            row = connection.execute(
                select(checkpoints).where(checkpoints.c.job_id == job_id).order_by(checkpoints.c.step.desc()).limit(1)
            ).one_or_none()
            if row is None:
                return None
            made = versions_of_steps(connection, job_id, [row.step])
        return CheckpointRow(
            job_id=row.job_id,
            step=row.step,
            path=row.path,
            hash=row.hash,
            versions=made[row.step],
            metrics=row.metrics,
            created_at=row.created_at,
        )


def versions_of_steps(connection: Connection, job_id: str, steps: Collection[int]) -> dict[int, dict[str, int]]:
    """Return, for each of the steps of a job, the version that it made of each model."""
    found: dict[int, dict[str, int]] = {step: {} for step in steps}
    chosen = select(step_versions).where(step_versions.c.job_id == job_id, step_versions.c.step.in_(steps))
    for row in connection.execute(chosen.order_by(step_versions.c.version_id)):
        found[row.step][row.model] = row.version_id
    return found


def _done(connection: Connection, lease: Lease, commit: StepCommit) -> dict[str, PolicyVersion]:
    """Return the versions that this very commit made before; none where it did not."""
    found = connection.execute(
        select(step_versions.c.model, step_versions.c.version_id)
        .join(
            checkpoints,
            and_(checkpoints.c.job_id == step_versions.c.job_id, checkpoints.c.step == step_versions.c.step),
        )
        .join(leases, leases.c.lease_id == checkpoints.c.lease_id)
        .where(
            checkpoints.c.lease_id == lease.lease_id,
            checkpoints.c.hash == commit.checkpoint_hash,
            leases.c.token == lease.token,
        )
        .order_by(step_versions.c.version_id)
    ).all()
    return {row.model: existing(connection, row.version_id) for row in found}


def _check_models(job_id: str, trained: Sequence[str], commit: StepCommit) -> None:
    made = [new.model for new in commit.versions]
    if not made or len(set(made)) < len(made) or not set(made) <= set(trained):
        raise InvalidRecord(
            f"job {job_id!r} trains {', '.join(trained)}, its step commits {', '.join(made) or 'no model'}: it makes "
            "one version of each model that it trained"
        )


def _check_accounted(connection: Connection, lease: Any, entries: Any) -> dict[str, int]:
    """Every choice that stood when the lease was made is accounted for, and only choices of the plan's runs are.

    Return the numbers of their calls.
    """
    planned = set(lease.run_ids)
    given: set[tuple[str, int]] = set()
    for entry in entries:
        key = (entry.call_id, entry.choice_index)
        if key in given:
            raise InvalidRecord(f"choice {key} of run {entry.run_id!r} is accounted for twice in step {lease.step}")
        if entry.run_id not in planned:
            raise InvalidRecord(f"choice {key} is of run {entry.run_id!r}, which lease {lease.lease_id} does not hold")
        given.add(key)
    stood = case((stood_when_leased(lease.calls_through, lease.attributions_through), 1), else_=0).label("stood")
    stored = connection.execute(
        select(calls.c.run_id, calls.c.seq, calls.c.call_id, choices.c.choice_index, choices.c.n_tokens, stood)
        .join(calls, calls.c.seq == choices.c.seq)
        .join(holds, holds.c.run_id == calls.c.run_id)
        .where(holds.c.lease_id == lease.lease_id)
    ).all()
    required = {(row.call_id, row.choice_index) for row in stored if row.stood}
    if required - given:
        raise InvalidRecord(
            f"step {lease.step} of job {lease.job_id!r} leaves out {len(required - given)} choices, such as "
            f"{min(required - given)}: account for each as trained or excluded with a reason"
        )
    sizes = {(row.call_id, row.choice_index): (row.run_id, row.n_tokens) for row in stored}
    for entry in entries:
        _check_entry(entry, sizes.get((entry.call_id, entry.choice_index)))
    return {row.call_id: row.seq for row in stored}


def _check_entry(entry: Consumption, stored: tuple[str, int] | None) -> None:
    who = f"choice {entry.choice_index} of call {entry.call_id!r}"
    if stored is None:
        raise InvalidRecord(f"{who} is accounted for but not stored: read the traces of the lease again")
    run_id, n_tokens = stored
    if entry.run_id != run_id:
        raise InvalidRecord(f"{who} is accounted for under run {entry.run_id!r}, it is of {run_id!r}")
    if entry.trained_tokens + entry.excluded_tokens != n_tokens or min(entry.trained_tokens, entry.excluded_tokens) < 0:
        raise InvalidRecord(
            f"{who} has {n_tokens} sampled tokens, accounted for are {entry.trained_tokens} trained + "
            f"{entry.excluded_tokens} excluded"
        )
    if entry.excluded_tokens and entry.reason is None:
        raise InvalidRecord(f"{who} excludes {entry.excluded_tokens} tokens without a reason: name it")


def _check_new(connection: Connection, lease: Any) -> None:
    step = connection.execute(
        select(checkpoints.c.hash).where(checkpoints.c.job_id == lease.job_id, checkpoints.c.step == lease.step)
    ).scalar()
    if step is not None:
        raise Conflict(f"job {lease.job_id!r} committed step {lease.step} already (checkpoint {step}): resume after it")
    held = select(holds.c.run_id).where(holds.c.lease_id == lease.lease_id)
    trained = connection.execute(
        select(ledger.c.run_id, ledger.c.step)
        .where(ledger.c.job_id == lease.job_id, ledger.c.epoch == lease.epoch, ledger.c.run_id.in_(held))
        .limit(1)
    ).one_or_none()
    if trained is not None:
        raise Conflict(
            f"run {trained.run_id!r} was trained by job {lease.job_id!r} in epoch {lease.epoch}, step {trained.step}"
        )
    count = connection.execute(select(func.count()).select_from(holds).where(holds.c.lease_id == lease.lease_id))
    if count.scalar_one() != len(lease.run_ids):
        raise Conflict(f"lease {lease.lease_id} does not hold all the runs of its plan: release it and lease again")


def _enter(
    connection: Connection, lease: Any, commit: StepCommit, made: Mapping[str, PolicyVersion], now: float
) -> None:
    connection.execute(
        checkpoints.insert(),
        {
            "job_id": lease.job_id,
            "step": lease.step,
            "path": commit.checkpoint_path,
            "hash": commit.checkpoint_hash,
            "lease_id": lease.lease_id,
            "metrics": commit.metrics,
            "created_at": now,
        },
    )
    connection.execute(
        step_versions.insert(),
        [
            {"job_id": lease.job_id, "step": lease.step, "model": model, "version_id": version.version_id}
            for model, version in made.items()
        ],
    )
    held = connection.execute(select(holds.c.run_id, holds.c.purpose).where(holds.c.lease_id == lease.lease_id)).all()
    common = {"job_id": lease.job_id, "epoch": lease.epoch}
    entered = {"step": lease.step, "checkpoint_hash": commit.checkpoint_hash, "rewards_through": lease.rewards_through}
    connection.execute(
        ledger.insert(), [{**common, **entered, "run_id": row.run_id, "purpose": row.purpose} for row in held]
    )


def _consume(connection: Connection, lease: Any, entries: Sequence[Consumption], numbers: Mapping[str, int]) -> None:
    common = {"job_id": lease.job_id, "epoch": lease.epoch}
    rows = [{**common, "seq": numbers[entry.call_id], **_consumption_row(entry)} for entry in entries]
    if rows:
        connection.execute(consumption.insert(), rows)


def _consumption_row(entry: Consumption) -> dict[str, Any]:
    return {
        "choice_index": entry.choice_index,
        "run_id": entry.run_id,
        "trained_tokens": entry.trained_tokens,
        "excluded_tokens": entry.excluded_tokens,
        "n_tokens": entry.trained_tokens + entry.excluded_tokens,
        "reason": entry.reason if entry.excluded_tokens else None,
        "model": entry.model,
    }
