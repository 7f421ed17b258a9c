"""Policy versions: published (or to be published) sets of weights of a model.

The row is written before any swap; its id comes from the database and is never used twice. A version is never
deleted: a rollback marks it abandoned, and what it sampled stays valid off-policy data.
Called by the trainer, the publisher and the command line, through `Store`; inside their transactions by `ledger` and
`publishes`.
"""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, or_, select, update

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import Abandoned, InvalidRecord, NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import PolicyVersion, VersionKind
from tracegrad.tracestore.schema import jobs, policy_versions, publishes


class Versions(Noun):
    """The part of the store that knows weights by number."""

    def add_version(
        self,
        *,
        model: str,
        kind: VersionKind,
        parent_id: int | None,
        checkpoint_path: str,
        checkpoint_hash: str,
        step: int,
        job_id: str | None,
    ) -> PolicyVersion:
        """Write a version and return it with its new id.

        Raises:
            InvalidRecord: unknown job, or a parent that is unknown or another model's.
        """
        with self._db.write() as connection:
            return add(
                connection,
                model=model,
                kind=kind,
                parent_id=parent_id,
                checkpoint_path=checkpoint_path,
                checkpoint_hash=checkpoint_hash,
                step=step,
                job_id=job_id,
                now=self._db.now(),
            )

    def get_version(self, version_id: int) -> PolicyVersion:
        """Return one version. Raises NotFound."""
        with self._db.read() as connection:
            return existing(connection, version_id)

    def list_versions(self, model: str | None = None) -> list[PolicyVersion]:
        """Return the versions, of one model or of all, oldest first."""
        chosen = select(policy_versions).order_by(policy_versions.c.version_id)
        if model is not None:
            chosen = chosen.where(policy_versions.c.model == model)
        with self._db.read() as connection:
            return [_version(row) for row in connection.execute(chosen)]

    def models_of(self, version_ids: Collection[int]) -> dict[int, str]:
        """Return version -> its model; unknown ones are left out."""
        chosen = select(policy_versions.c.version_id, policy_versions.c.model)
        if not version_ids:
            return {}
        with self._db.read() as connection:
            rows = connection.execute(chosen.where(policy_versions.c.version_id.in_(list(version_ids))))
            return {int(version): str(model) for version, model in rows}

    def abandon_version(self, version_id: int) -> None:
        """Mark a version as one not to build on. Doing it twice is a no-op. Raises NotFound."""
        with self._db.write() as connection:
            existing(connection, version_id)
            connection.execute(
                update(policy_versions).where(policy_versions.c.version_id == version_id).values(abandoned=True)
            )

    def require_kept(self, version_ids: Collection[int]) -> None:
        """Refuse to go on from weights that were rolled back. Raises Abandoned, NotFound."""
        with self._db.read() as connection:
            require_kept(connection, version_ids, lock=False)

    def live_version(self, model: str) -> PolicyVersion | None:
        """Return the version of the newest publish of `model` that went live, or None."""
        with self._db.read() as connection:
            return find_live(connection, model)


def find_live(connection: Connection, model: str) -> PolicyVersion | None:
    """Return the live version of `model`, or None where nothing was ever published."""
    row = connection.execute(
        select(policy_versions)
        .join(publishes, publishes.c.version_id == policy_versions.c.version_id)
        .where(publishes.c.model == model, publishes.c.state == "live")
        .order_by(publishes.c.publish_id.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else _version(row)


def existing(connection: Connection, version_id: int) -> PolicyVersion:
    """Return the version. Raises NotFound."""
    row = connection.execute(select(policy_versions).where(policy_versions.c.version_id == version_id)).one_or_none()
    if row is None:
        raise NotFound(f"no policy version {version_id}: `tracegrad versions` lists them")
    return _version(row)


def require_kept(connection: Connection, version_ids: Collection[int], *, lock: bool = True) -> None:
    """Refuse to build on abandoned weights; `lock`: they cannot be abandoned before this transaction is over.

    Raises Abandoned.
    """
    chosen = select(policy_versions.c.version_id, policy_versions.c.abandoned).where(
        policy_versions.c.version_id.in_(version_ids)
    )
    for row in connection.execute(chosen.with_for_update(read=True) if lock else chosen):
        if row.abandoned:
            raise Abandoned(f"version {row.version_id}, which it builds on, was abandoned (`tracegrad rollback`)")


def abandon_newer(connection: Connection, version: PolicyVersion) -> None:
    """Abandon the newer versions of the model, but for those of jobs that publish nothing (`--offline`).

    A step that is being committed is waited for, so it is seen; one that comes later is refused (`require_kept`).
    """
    mine = policy_versions.c.model == version.model
    served = select(publishes.c.version_id).where(publishes.c.model == version.model)
    publishing = select(policy_versions.c.job_id).where(policy_versions.c.version_id.in_(served))
    connection.execute(
        select(jobs.c.job_id).where(jobs.c.job_id.in_(publishing)).order_by(jobs.c.job_id).with_for_update()
    )
    known = or_(policy_versions.c.version_id.in_(served), policy_versions.c.job_id.in_(publishing))
    connection.execute(
        update(policy_versions)
        .where(mine, policy_versions.c.version_id > version.version_id, known)
        .values(abandoned=True)
    )


def add(
    connection: Connection,
    *,
    model: str,
    kind: VersionKind,
    parent_id: int | None,
    checkpoint_path: str,
    checkpoint_hash: str,
    step: int,
    job_id: str | None,
    now: float,
) -> PolicyVersion:
    """Insert a version inside a transaction. Raises InvalidRecord.

    Of weights that descend from nothing known the number of updates is taken to be that of their step; a line of
    versions begins with them.
    """
    if job_id is not None and connection.execute(select(jobs.c.job_id).where(jobs.c.job_id == job_id)).first() is None:
        raise InvalidRecord(f"a version of {model!r} names the unknown job {job_id!r}: register_job first")
    updates, line = step, None
    if parent_id is not None:
        chosen = select(policy_versions.c.model, policy_versions.c.updates, policy_versions.c.line)
        parent = connection.execute(chosen.where(policy_versions.c.version_id == parent_id)).one_or_none()
        if parent is None or parent.model != model:
            whose = None if parent is None else parent.model
            raise InvalidRecord(f"a version of {model!r} names the parent {parent_id}, which is of {whose!r}")
        updates, line = parent.updates + (kind == "step"), parent.line or parent_id
    row = {
        "model": model,
        "kind": kind,
        "parent_id": parent_id,
        "checkpoint_path": checkpoint_path,
        "checkpoint_hash": checkpoint_hash,
        "step": step,
        "updates": updates,
        "line": line,
        "job_id": job_id,
        "abandoned": False,
        "created_at": now,
    }
    statement = insert(connection, policy_versions).values(**row).returning(policy_versions)
    return _version(connection.execute(statement).one())


def _version(row: Any) -> PolicyVersion:
    return PolicyVersion(
        version_id=row.version_id,
        model=row.model,
        kind=row.kind,
        parent_id=row.parent_id,
        checkpoint_path=row.checkpoint_path,
        checkpoint_hash=row.checkpoint_hash,
        step=row.step,
        updates=row.updates,
        line=row.line or row.version_id,
        job_id=row.job_id,
        abandoned=row.abandoned,
        created_at=row.created_at,
    )
