"""What is said of calls after they were stored: which run, role and span, and who disagrees.

Facts are appended, one per named call and source. A call takes from them what it does not know yet, once; what it
knows it keeps, and the difference is a conflict, which is a query. A fact may come before its call (another process
answered it): `resolve_attributions` joins such pairs. A call that joins its run late is not part of a lease made
before: `placed_by` says so to the queue, so a fact that found its call late is counted from then on. A fact is of the
project whose client said it, and is about calls of that project only: of another's it says nothing, neither its run
nor a conflict. Called by the proxy, through `Store`.

A lease knows the facts up to a number. So a fact takes its number while it holds the runs that it changes, that of its
call too where it brings a role alone: numbers then grow in commit order as a lease of the run sees them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, or_, select, update

from tracegrad.tracestore.calls import CHUNK
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
_Names = tuple[str, str | None, str | None]
"""What a fact calls its call: project, and either its id or its completion id."""


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
            held = _hold(connection, run_ids, [_names(project, fact) for fact in facts])
            if run_ids:
                open_or_touch(connection, run_ids, self._db.now())
            ordered = sorted(facts, key=lambda fact: (fact.call_id or "", fact.completion_id or ""))
            for fact in ordered:  # two may tell the same of calls that are yet to come, and hold nothing in common
                stored = _append(connection, fact, project, self._db.now())
                if stored is not None:
                    _apply(connection, stored, held[_names(project, fact)])

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
            run_ids = {row.run_id for row in waiting if row.run_id is not None}
            held = _hold(connection, run_ids, [_names(row.project, row) for row in waiting])
            named = ((row, seqs) for row in waiting if (seqs := held[_names(row.project, row)]))
            return sum(
                _apply(connection, newest, seqs) for row, seqs in named for newest in _renumbered(connection, row)
            )

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


def _names(project: str, fact: LateAttribution | Row[Any]) -> _Names:
    return (project, None, fact.completion_id) if fact.call_id is None else (project, fact.call_id, None)


def _hold(connection: Connection, run_ids: Iterable[str], named: Sequence[_Names]) -> dict[_Names, list[int]]:
    """Hold these runs and those of the named calls, then the calls, until the transaction ends; return the calls' seqs.

    A call is held as well because one without a run may be given one by somebody else. Not returned is a call that was
    given another run while this waited, or is stored later: what is said of it waits for `resolve_attributions`.
    """
    columns = (calls.c.seq, calls.c.run_id, calls.c.call_id, calls.c.completion_id, calls.c.project)
    wanted = set(named)
    found: list[Any] = []
    for start in range(0, len(named), CHUNK):
        _, call_ids, completion_ids = zip(*named[start : start + CHUNK], strict=True)
        for column, said in ((calls.c.call_id, call_ids), (calls.c.completion_id, completion_ids)):
            found += connection.execute(
                select(*columns).where(column.in_([one for one in said if one is not None]))
            ).all()
    mine = {row.seq: row.run_id for row in found if not wanted.isdisjoint(_names_of(row))}
    locked = {*run_ids, *(run_id for run_id in mine.values() if run_id is not None)}
    if locked:
        lock_runs(connection, locked)
    held: dict[_Names, list[int]] = defaultdict(list)
    seqs = sorted(mine)
    for start in range(0, len(seqs), CHUNK):
        some = select(*columns).where(calls.c.seq.in_(seqs[start : start + CHUNK])).order_by(calls.c.seq)
        for row in connection.execute(some.with_for_update(key_share=True)):
            for name in _names_of(row) if row.run_id is None or row.run_id in locked else ():
                held[name].append(row.seq)
    return held


def _names_of(call: Any) -> tuple[_Names, _Names]:
    return (call.project, call.call_id, None), (call.project, None, call.completion_id)


def _append(connection: Connection, fact: LateAttribution, project: str, now: float) -> Row[Any] | None:
    """Store a fact; None where it is stored already."""
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
    return connection.execute(
        insert(connection, attributions).values(**row).on_conflict_do_nothing().returning(attributions)
    ).one_or_none()


def _renumbered(connection: Connection, fact: Row[Any]) -> Sequence[Row[Any]]:
    """Put a fact at the end of all facts; none where somebody else did, or deleted it."""
    row = dict(fact._mapping)
    if not connection.execute(delete(attributions).where(attributions.c.seq == row.pop("seq"))).rowcount:
        return []
    return connection.execute(insert(connection, attributions).values(**row).returning(attributions)).all()


def _apply(connection: Connection, fact: Row[Any], seqs: Sequence[int]) -> bool:
    """Give the calls of a stored fact, which are held, what they do not know; say whether they took anything."""
    named = calls.c.seq.in_(seqs)
    took = False
    if fact.run_id is not None:
        given = {"run_id": fact.run_id, "run_source": fact.source, "placed_by": fact.seq}
        took |= _fill(connection, named, "run_id", given)
    if fact.role is not None:
        took |= _fill(connection, named, "role", {"role": fact.role, "role_source": fact.source, "role_by": fact.seq})
    if fact.span_id is not None:
        known = select(spans.c.span_id).where(spans.c.run_id == fact.run_id, spans.c.span_id == fact.span_id)
        if connection.execute(known).first() is not None:
            here = and_(named, calls.c.run_id == fact.run_id)
            took |= _fill(connection, here, "span_id", {"span_id": fact.span_id, "span_by": fact.seq})
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
