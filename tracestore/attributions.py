"""What is said of calls after they were stored: which run, role and span, and who disagrees.

Facts are appended, one per named call and source. A call takes from them what it does not know yet, once; what it
knows it keeps, and the difference is a conflict, which is a query. A fact may come before its call (another process
answered it): `resolve_attributions` joins such pairs. A call that joins its run late is not part of a lease made
before: `placed_by` says so to the queue, so a fact that found its call late is counted from then on. A fact is of the
project whose client said it, and is about calls of that project only: of another's it says nothing, neither its run
nor a conflict. Called by the proxy, through `Store`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, or_, select, update

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import InvalidRecord
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import AttributionConflict, LateAttribution
from tracegrad.tracestore.runs import lock_runs, open_or_touch
from tracegrad.tracestore.schema import attributions, calls, spans

WINDOW = 10_000
"""How many of the newest facts `resolve_attributions` looks at."""
_OWN = attributions.c.project == calls.c.project
_NAMED = and_(
    _OWN, or_(attributions.c.call_id == calls.c.call_id, attributions.c.completion_id == calls.c.completion_id)
)


class Attributions(Noun):
    """The part of the store that learns late who called."""

    def attribute_late(self, facts: Sequence[LateAttribution], project: str = "default") -> None:
        """Append facts and let their calls take over what these do not know. The same fact again is a no-op.

        Unknown runs are opened as live runs of `project`. A fact of a call that `project` does not know waits (see
        `resolve_attributions`).

        Raises:
            InvalidRecord: a fact names no call, or a span without a run.
        """
        for fact in facts:
            if fact.call_id is None and fact.completion_id is None:
                raise InvalidRecord(
                    f"a fact of source {fact.source!r} names no call: give a call id or a completion id"
                )
            if fact.span_id is not None and fact.run_id is None:
                raise InvalidRecord(f"the span {fact.span_id!r} needs its run")
        if not facts:
            return
        with self._db.write() as connection:
            run_ids = {fact.run_id: project for fact in facts if fact.run_id is not None}
            if run_ids:
                lock_runs(connection, run_ids)
                open_or_touch(connection, run_ids, self._db.now())
            for fact in facts:
                _append(connection, fact, project, self._db.now())

    def resolve_attributions(self) -> int:
        """Apply the newest facts that came before their calls; return how many of them gave their call something.

        Such a fact gets a new number: by its old one, a lease made between the two would seem to have known the call.
        """
        with self._db.read() as connection:
            newest = connection.execute(select(func.coalesce(func.max(attributions.c.seq), 0))).scalar_one()
            waiting = _unapplied(connection, newest - WINDOW)
        if not waiting:
            return 0
        with self._db.write() as connection:
            lock_runs(connection, {row.run_id for row in waiting if row.run_id is not None})
            return sum(_apply(connection, newest) for row in waiting for newest in _renumbered(connection, row))

    def attribution_conflicts(self, run_id: str | None = None, call_id: str | None = None) -> list[AttributionConflict]:
        """Return where a fact says another run or role than its call: of one run (either side), one call, or all."""
        differs = or_(
            and_(attributions.c.run_id.is_not(None), attributions.c.run_id != calls.c.run_id),
            and_(attributions.c.role.is_not(None), attributions.c.role != calls.c.role),
        )
        said = (attributions.c.run_id.label("said_run"), attributions.c.role.label("said_role"), attributions.c.source)
        kept = (calls.c.call_id, calls.c.run_id, calls.c.run_source, calls.c.role, calls.c.role_source)
        statement = select(*said, *kept).join(calls, _NAMED).where(differs).order_by(attributions.c.seq)
        if run_id is not None:
            statement = statement.where(or_(attributions.c.run_id == run_id, calls.c.run_id == run_id))
        if call_id is not None:
            statement = statement.where(calls.c.call_id == call_id)
        with self._db.read() as connection:
            return [conflict for row in connection.execute(statement) for conflict in _conflicts(row)]


def _append(connection: Connection, fact: LateAttribution, project: str, now: float) -> None:
    row = {
        "project": project,
        "source": fact.source,
        "call_id": fact.call_id,
        "completion_id": fact.completion_id,
        "run_id": fact.run_id,
        "role": fact.role,
        "span_id": fact.span_id,
        "created_at": now,
    }
    stored = connection.execute(
        insert(connection, attributions).values(**row).on_conflict_do_nothing().returning(attributions)
    ).one_or_none()
    if stored is not None:
        _apply(connection, stored)


def _renumbered(connection: Connection, fact: Row[Any]) -> Sequence[Row[Any]]:
    """Put a fact at the end of all facts; none where somebody else did, or deleted it."""
    row = dict(fact._mapping)
    if not connection.execute(delete(attributions).where(attributions.c.seq == row.pop("seq"))).rowcount:
        return []
    return connection.execute(insert(connection, attributions).values(**row).returning(attributions)).all()


def _apply(connection: Connection, fact: Row[Any]) -> bool:
    """Give the call of a stored fact what it does not know; say whether it took anything."""
    by_id = calls.c.call_id == fact.call_id if fact.call_id is not None else calls.c.completion_id == fact.completion_id
    named = and_(by_id, calls.c.project == fact.project)
    took = False
    if fact.run_id is not None:
        given = {"run_id": fact.run_id, "run_source": fact.source, "placed_by": fact.seq}
        took |= _fill(connection, named, "run_id", given)
    if fact.role is not None:
        took |= _fill(connection, named, "role", {"role": fact.role, "role_source": fact.source, "role_by": fact.seq})
    if fact.span_id is not None:
        known = select(spans.c.span_id).where(spans.c.run_id == fact.run_id, spans.c.span_id == fact.span_id)
        if connection.execute(known).first() is not None:
            took |= _fill(connection, and_(named, calls.c.run_id == fact.run_id), "span_id", {"span_id": fact.span_id})
    return took


def _fill(connection: Connection, named: Any, column: str, values: Mapping[str, Any]) -> bool:
    done = connection.execute(update(calls).where(named, calls.c[column].is_(None)).values(**values))
    return bool(done.rowcount)


def _unapplied(connection: Connection, after: int) -> Sequence[Row[Any]]:
    missing = or_(
        and_(attributions.c.run_id.is_not(None), calls.c.run_id.is_(None)),
        and_(attributions.c.role.is_not(None), calls.c.role.is_(None)),
    )
    by_call = select(attributions).join(calls, attributions.c.call_id == calls.c.call_id)
    by_completion = select(attributions).join(calls, attributions.c.completion_id == calls.c.completion_id)
    found: dict[int, Row[Any]] = {}
    for joined in (by_call, by_completion):
        for row in connection.execute(joined.where(_OWN, missing, attributions.c.seq > after)):
            found[row.seq] = row
    return [found[seq] for seq in sorted(found)]


def _conflicts(row: Any) -> list[AttributionConflict]:
    found = []
    if row.said_run is not None and row.run_id is not None and row.said_run != row.run_id:
        found.append(_conflict(row, "run", row.run_id, row.run_source, row.said_run))
    if row.said_role is not None and row.role is not None and row.said_role != row.role:
        found.append(_conflict(row, "role", row.role, row.role_source, row.said_role))
    return found


def _conflict(row: Any, field: Any, kept: str, kept_source: Any, said: str) -> AttributionConflict:
    return AttributionConflict(
        call_id=row.call_id, field=field, kept=kept, kept_source=kept_source, said=said, said_source=row.source
    )
