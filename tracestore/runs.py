"""Runs: opened, ended by hook, explicit close or idle time-out, never reopened.

Opening is idempotent by id. A failed run stays failed (law 6: it is not a reward of 0, and not a success either).
Called by the proxy and the rollout driver, through `Store`; `open_or_touch` and `lock_runs` by `calls`, `rewards`,
`leases` too.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Executable, literal_column, select, update

from tracegrad.tracestore.database import insert_for
from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound
from tracegrad.tracestore.hot import HotStatement, run_hot
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import EndedBy, Run, RunStatus
from tracegrad.tracestore.schema import CONTENT_DELETED, runs
from tracegrad.tracestore.tasks import find_group, is_task

ACTIVE_WITHIN_S = 1.0
"""How much later than `active_at` the last call of a run may have come."""
_AT_ONCE = 400


class Runs(Noun):
    """The part of the store that knows runs."""

    def open_run(self, run: Run) -> Run:
        """Open a run and return the stored row; `opened_at` 0 means now.

        A run of a group takes the group's task where it names none. Opening it again returns what is stored.

        Raises:
            Conflict: the id is another run's, or the member of the group is taken.
            InvalidRecord: unknown task or group, a purpose or task that is not the group's, a member outside the
                planned size, or a status other than open.
        """
        with self._db.write() as connection:
            wanted = _completed(connection, run)
            now = run.opened_at or self._db.now()
            _insert_ignore(connection, [_row(wanted, now)])
            stored = find_run(connection, run.run_id)
            if stored is None:
                taken = connection.execute(
                    select(runs.c.run_id).where(runs.c.group_id == run.group_id, runs.c.member == run.member)
                ).scalar()
                raise Conflict(
                    f"run {run.run_id!r}: member {run.member} of group {run.group_id!r} is run {taken!r}; take another"
                )
            if _identity(stored) != _identity(wanted):
                raise Conflict(
                    f"run {run.run_id!r} exists as {_identity(stored)}, not {_identity(wanted)}: use another run id"
                )
            return stored

    def ensure_runs(self, run_ids: Sequence[str], project: str) -> None:
        """Open those of `run_ids` that are unknown as live runs of `project`; leave the others as they are."""
        if run_ids:
            with self._db.write() as connection:
                open_unknown(connection, run_ids, project, self._db.now())

    def end_run(self, run_id: str, *, status: RunStatus, ended_by: EndedBy, error: str | None = None) -> Run:
        """Close or fail a run and return it. Ending it the same way again is a no-op; a failed run stays failed.

        Raises:
            NotFound: no such run.
            Conflict: it is closed and is now said to have failed.
            InvalidRecord: `status` is `open`.
        """
        if status not in ("closed", "failed"):
            raise InvalidRecord(f"run {run_id!r} cannot end as {status!r}: say closed or failed")
        with self._db.write() as connection:
            lock_runs(connection, [run_id])
            stored = _existing(connection, run_id)
            if stored.status == "closed" and status == "failed":
                raise Conflict(f"run {run_id!r} is closed already and cannot fail now: its group may be in training")
            if stored.status != "open":
                return stored
            connection.execute(
                update(runs)
                .where(runs.c.run_id == run_id)
                .values(status=status, ended_by=ended_by, error=error, ended_at=self._db.now())
            )
            return _existing(connection, run_id)

    def close_idle_runs(self, project: str, idle_s: float) -> int:
        """Close the open live runs of `project` whose last call (or opening) is older than `idle_s`; say how many."""
        now = self._db.now()
        idle = (
            runs.c.project == project,
            runs.c.purpose == "live",
            runs.c.status == "open",
            runs.c.active_at < now - idle_s - ACTIVE_WITHIN_S,
        )
        with self._db.read() as connection:
            found = list(connection.execute(select(runs.c.run_id).where(*idle).order_by(runs.c.run_id)).scalars())
        if not found:
            return 0
        closed = 0
        with self._db.write() as connection:
            for start in range(0, len(found), _AT_ONCE):
                some = found[start : start + _AT_ONCE]
                lock_runs(connection, some)  # an update alone would lock them in the order of its index
                still = update(runs).where(runs.c.run_id.in_(some), *idle)
                closed += connection.execute(still.values(status="closed", ended_by="idle", ended_at=now)).rowcount
        return closed

    def get_run(self, run_id: str) -> Run:
        """Return one run. Raises NotFound."""
        with self._db.read() as connection:
            return _existing(connection, run_id)

    def group_runs(self, group_id: str) -> list[Run]:
        """Return the runs of a group by member. Raises NotFound."""
        with self._db.read() as connection:
            if find_group(connection, group_id) is None:
                raise NotFound(f"no group {group_id!r}: put it with put_groups (POST /tracegrad/v1/groups)")
            rows = connection.execute(select(runs).where(runs.c.group_id == group_id).order_by(runs.c.member))
            return [run_of(row) for row in rows]


def run_of(row: Any) -> Run:
    """Return the record of a row of `runs`."""
    return Run(
        run_id=row.run_id,
        project=row.project,
        purpose=row.purpose,
        task_id=row.task_id,
        group_id=row.group_id,
        member=row.member,
        status=row.status,
        ended_by=row.ended_by,
        error=row.error,
        opened_at=row.opened_at,
        ended_at=row.ended_at,
    )


def find_run(connection: Connection, run_id: str) -> Run | None:
    """Return the stored run, or None."""
    row = connection.execute(select(runs).where(runs.c.run_id == run_id)).one_or_none()
    return None if row is None else run_of(row)


def open_unknown(connection: Connection, run_ids: Iterable[str], project: str, now: float) -> None:
    """Insert the unknown ones of `run_ids` as live runs."""
    rows = [_row(Run(run_id=run_id, project=project), now) for run_id in sorted(set(run_ids))]
    _insert_ignore(connection, rows)


def open_or_touch(connection: Connection, projects: Mapping[str, str], now: float) -> None:
    """As `open_unknown`, from run id -> project; the known ones are marked active at `now`, never earlier.

    What was marked less than ACTIVE_WITHIN_S ago stays as it is: a run of many calls is not written with each.
    """
    rows = [(run_id, project, "live", "open", now, now) for run_id, project in sorted(projects.items())]
    run_hot(connection, _open_or_touch_for(connection.dialect.name), rows)


@cache
def _open_or_touch_for(dialect: str) -> HotStatement:
    statement = insert_for(dialect, runs)
    newer = statement.excluded.active_at
    return HotStatement(
        statement.on_conflict_do_update(
            index_elements=["run_id"],
            set_={"active_at": newer},
            where=runs.c.active_at < newer - literal_column(str(ACTIVE_WITHIN_S)),
        ),
        *("run_id", "project", "purpose", "status", "opened_at", "active_at"),
    )


def has_content() -> ColumnElement[bool]:
    """Whether the run of the row is more than the stub that a deletion leaves: that one lacks things on purpose."""
    return runs.c.error.is_distinct_from(CONTENT_DELETED)


def lock_runs(connection: Connection, run_ids: Iterable[str]) -> None:
    """Hold the rows of these runs until the transaction ends (PostgreSQL; a SQLite writer is alone anyway).

    Whoever adds calls, rewards or late facts to a run, leases it or ends it does this first, always in the order of the
    ids: so the sequence numbers inside one run grow in commit order, and two writers cannot wait for each other in a
    ring. Who only names the run in a row of its own (a step that is committed) does not wait: it locks in no order.
    """
    if connection.dialect.name == "postgresql":
        ids = sorted(set(run_ids))
        connection.execute(
            select(runs.c.run_id).where(runs.c.run_id.in_(ids)).order_by(runs.c.run_id).with_for_update(key_share=True)
        )


def _existing(connection: Connection, run_id: str) -> Run:
    run = find_run(connection, run_id)
    if run is None:
        raise NotFound(f"no run {run_id!r}: `tracegrad runs` lists what there is (POST /tracegrad/v1/runs opens one)")
    return run


def _completed(connection: Connection, run: Run) -> Run:
    """Return `run` with the group's task; refuse what cannot be a new run."""
    if run.status != "open":
        raise InvalidRecord(f"run {run.run_id!r} cannot be opened as {run.status!r}: open it, then end it")
    if (run.group_id is None) != (run.member is None):
        raise InvalidRecord(
            f"run {run.run_id!r} has group {run.group_id!r} and member {run.member}: set both or neither"
        )
    if run.group_id is None or run.member is None:
        if run.task_id is not None and not is_task(connection, run.task_id):
            raise InvalidRecord(f"run {run.run_id!r} names the unknown task {run.task_id!r}: put the task first")
        return run
    group = find_group(connection, run.group_id)
    if group is None:
        raise InvalidRecord(f"run {run.run_id!r} names the unknown group {run.group_id!r}: put the group first")
    if run.purpose != group.purpose:
        raise InvalidRecord(
            f"run {run.run_id!r} has purpose {run.purpose!r}, its group {group.group_id!r} {group.purpose!r}: take that"
        )
    if run.task_id not in (None, group.task_id):
        raise InvalidRecord(
            f"run {run.run_id!r} has task {run.task_id!r}, its group {group.group_id!r} {group.task_id!r}: take that"
        )
    if not 0 <= run.member < group.planned_size:
        raise InvalidRecord(
            f"run {run.run_id!r} is member {run.member} of group {group.group_id!r}, which plans {group.planned_size}"
        )
    return Run(
        run_id=run.run_id,
        project=run.project,
        purpose=run.purpose,
        task_id=group.task_id,
        group_id=run.group_id,
        member=run.member,
    )


def _identity(run: Run) -> dict[str, Any]:
    """What makes it this run and no other."""
    return {
        "project": run.project,
        "purpose": run.purpose,
        "task_id": run.task_id,
        "group_id": run.group_id,
        "member": run.member,
    }


def _row(run: Run, now: float) -> dict[str, Any]:
    return {"run_id": run.run_id, **_identity(run), "status": "open", "opened_at": now, "active_at": now}


def _insert_ignore(connection: Connection, rows: list[dict[str, Any]]) -> None:
    connection.execute(_insert_ignore_for(connection.dialect.name), rows)


@cache
def _insert_ignore_for(dialect: str) -> Executable:
    statement: Executable = insert_for(dialect, runs).on_conflict_do_nothing()
    return statement
