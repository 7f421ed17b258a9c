"""Which runs of a project have had their time: by age, and by how much newer content there is.

Oldest first, in bounded pages; what is open or held by a lease is never chosen, nor a stub (see `removal`), unless
something was said in it since. A run that goes on after its end is as old as its last call or span. The weight of a
run is the bytes of its requests, token ids, logprobs, kept sets, answers and spans, what runs of a page share counted
once: a database file is larger, by its indexes and by what is free inside. Reads only; `removal` deletes. Called by
whoever cares for a store, through `Store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, LargeBinary, and_, cast, func, or_, select, true, type_coerce
from sqlalchemy.types import Text

from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.payload_schema import call_payloads, choice_payloads
from tracegrad.tracestore.payloads import sizes_above
from tracegrad.tracestore.removal import is_more_than_a_stub
from tracegrad.tracestore.schema import calls, choices, holds, runs, spans
from tracegrad.tracestore.sweeping import heads_of

PAGE = 100
_ASKED = tuple(call_payloads.c[name] for name in ("tail", "request", "requested", "effective"))
_ANSWERED = tuple(choice_payloads.c[name] for name in ("token_ids", "logprobs", "message", "kept_counts", "kept_ids"))


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """A run's place in the order of age."""

    opened_at: float
    run_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed:
    """A run with its calls counted and its content weighed in bytes."""

    place: Place
    calls: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Unplaced:
    """Some calls without a run, oldest first: how many, the bytes of their content, and the number of the last."""

    calls: int
    weight_bytes: int
    last_seq: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Retired:
    """The runs of a project that ended, quiet since, before a time, or whose place is at or before `through`."""

    project: str
    ended_before: float | None = None
    through: Place | None = None
    busy_too: bool = False
    """Also what is open or held: a project that is deleted by force."""


class Retention(Noun):
    """The part of the store that knows what is old."""

    def retired_runs(self, which: Retired, *, after: Place | None = None, limit: int = PAGE) -> list[Weighed]:
        """Return the oldest runs that have had their time, a page of them; `after` is the last of the page before."""
        chosen = select(runs.c.opened_at, runs.c.run_id).where(*_conditions(which))
        if after is not None:
            chosen = chosen.where(
                or_(runs.c.opened_at > after.opened_at, _same_moment(after, runs.c.run_id > after.run_id))
            )
        with self._db.read() as connection:
            rows = connection.execute(chosen.order_by(runs.c.opened_at, runs.c.run_id).limit(limit)).all()
            return _weigh(connection, [Place(row.opened_at, row.run_id) for row in rows])

    def newest_runs(self, project: str, *, before: Place | None = None, limit: int = PAGE) -> list[Weighed]:
        """Return the newest runs of a project, a page of them; `before` is the last of the page before."""
        chosen = select(runs.c.opened_at, runs.c.run_id).where(runs.c.project == project)
        if before is not None:
            chosen = chosen.where(_not_newer(before), runs.c.run_id != before.run_id)
        order = (runs.c.opened_at.desc(), runs.c.run_id.desc())
        with self._db.read() as connection:
            rows = connection.execute(chosen.order_by(*order).limit(limit)).all()
            return _weigh(connection, [Place(row.opened_at, row.run_id) for row in rows])

    def weigh_runs(self, run_ids: Sequence[str]) -> list[Weighed]:
        """Return these runs weighed, oldest first. Raises NotFound."""
        chosen = select(runs.c.opened_at, runs.c.run_id).where(runs.c.run_id.in_(run_ids))
        with self._db.read() as connection:
            rows = connection.execute(chosen.order_by(runs.c.opened_at, runs.c.run_id)).all()
            missing = sorted(set(run_ids) - {row.run_id for row in rows})
            if missing:
                raise NotFound(f"no run {missing[0]!r}: `tracegrad runs` lists what there is")
            return _weigh(connection, [Place(row.opened_at, row.run_id) for row in rows])

    def weigh_unplaced(self, project: str, before: float, *, after_seq: int = 0) -> Unplaced:
        """Weigh the oldest calls of a project that have no run and arrived before a time, a page of them."""
        mine = (calls.c.run_id.is_(None), calls.c.project == project, calls.c.received_at < before)
        oldest = select(calls.c.seq).where(*mine, calls.c.seq > after_seq).order_by(calls.c.seq).limit(PAGE)
        with self._db.read() as connection:
            seqs = list(connection.execute(oldest).scalars())
            asked = select(_bytes(connection, _ASKED)).where(call_payloads.c.seq.in_(seqs))
            sampled = select(_bytes(connection, [*_ANSWERED, choices.c.version_spans]))
            sampled = sampled.join_from(choices, choice_payloads).where(choices.c.seq.in_(seqs))
            weight = sum(int(connection.execute(statement).scalar_one()) for statement in (asked, sampled))
            prompts = sizes_above(connection, heads_of(connection, call_payloads.c.seq.in_(seqs)))
        weight += sum(size for _, size in prompts.values())
        return Unplaced(calls=len(seqs), weight_bytes=weight, last_seq=seqs[-1] if seqs else after_seq)

    def place_beyond(self, project: str, weight_bytes: int) -> Place | None:
        """Return the newest run before which the newer ones weigh `weight_bytes` or more; None where all fit."""
        total = 0
        last: Place | None = None
        while page := self.newest_runs(project, before=last):
            for run in page:
                total += run.weight_bytes
                if total > weight_bytes:
                    return run.place
            last = page[-1].place
        return None


def _conditions(which: Retired) -> list[ColumnElement[bool]]:
    conditions = [runs.c.project == which.project, is_more_than_a_stub()]
    if not which.busy_too:
        held = select(holds.c.run_id).where(holds.c.run_id == runs.c.run_id).exists()
        conditions += [runs.c.status != "open", ~held]
    reasons = []
    if which.ended_before is not None:
        before = which.ended_before
        started = runs.c.opened_at < before  # says the same again, to the index
        ended = or_(runs.c.ended_at.is_(None), runs.c.ended_at < before)
        reasons.append(and_(started, runs.c.active_at < before, ended))
    if which.through is not None:
        reasons.append(_not_newer(which.through))
    return [*conditions, or_(*reasons) if reasons else true()]


def _not_newer(place: Place) -> ColumnElement[bool]:
    return or_(runs.c.opened_at < place.opened_at, _same_moment(place, runs.c.run_id <= place.run_id))


def _same_moment(place: Place, by_id: ColumnElement[bool]) -> ColumnElement[bool]:
    return and_(runs.c.opened_at == place.opened_at, by_id)


def _weigh(connection: Connection, places: Sequence[Place]) -> list[Weighed]:
    run_ids = [place.run_id for place in places]
    within = calls.c.run_id.in_(run_ids)
    made = select(calls.c.run_id, func.count(), _bytes(connection, _ASKED))
    made = made.join(call_payloads, call_payloads.c.seq == calls.c.seq).where(within)
    counted = connection.execute(made.group_by(calls.c.run_id)).all()
    n_calls = dict.fromkeys(run_ids, 0) | {run_id: int(count) for run_id, count, _ in counted}
    weights = dict.fromkeys(run_ids, 0) | {run_id: int(weight) for run_id, _, weight in counted}
    sampled = select(calls.c.run_id, _bytes(connection, [*_ANSWERED, choices.c.version_spans]))
    sampled = sampled.join_from(calls, choices, choices.c.seq == calls.c.seq).join(choice_payloads).where(within)
    told = select(spans.c.run_id, _bytes(connection, [spans.c[name] for name in ("input", "output", "wrote", "error")]))
    told = told.where(spans.c.run_id.in_(run_ids))
    for statement in (sampled.group_by(calls.c.run_id), told.group_by(spans.c.run_id)):
        for run_id, weight in connection.execute(statement):
            weights[run_id] += int(weight)
    for run_id, weight in _prompts(connection, run_ids).items():
        weights[run_id] += weight
    return [Weighed(place=place, calls=n_calls[place.run_id], weight_bytes=weights[place.run_id]) for place in places]


def _prompts(connection: Connection, run_ids: Sequence[str]) -> dict[str, int]:
    """Weigh the blocks of prompts: each for the first of these runs that has it, since they share them."""
    heads: dict[str, set[int]] = {run_id: set() for run_id in run_ids}
    for head in (call_payloads.c.ids_head, call_payloads.c.text_head):
        of_runs = select(calls.c.run_id, head).join(call_payloads, call_payloads.c.seq == calls.c.seq)
        of_runs = of_runs.where(calls.c.run_id.in_(run_ids), head.is_not(None)).distinct()
        for run_id, block_id in connection.execute(of_runs):
            heads[run_id].add(block_id)
    sizes = sizes_above(connection, set().union(*heads.values()))
    weights = {}
    for run_id in run_ids:
        waiting, weight = list(heads[run_id]), 0
        while waiting:
            parent_id, size = sizes.pop(waiting.pop(), (None, 0))
            weight += size
            waiting += [] if parent_id is None else [parent_id]
        weights[run_id] = weight
    return weights


def _bytes(connection: Connection, columns: Sequence[ColumnElement[object]]) -> ColumnElement[int]:
    """Add up how many bytes the columns hold. (SQLite's length() of a text counts characters.)"""
    total: ColumnElement[int] = func.coalesce(func.sum(_sum([_size(connection, one) for one in columns])), 0)
    return total


def _size(connection: Connection, column: ColumnElement[object]) -> ColumnElement[int]:
    if isinstance(getattr(column.type, "impl", column.type), Text):
        plain: ColumnElement[object] = type_coerce(column, Text)
        if connection.dialect.name == "sqlite":
            return func.coalesce(func.length(cast(plain, LargeBinary)), 0)
        return func.coalesce(func.octet_length(plain), 0)
    return func.coalesce(func.length(column), 0)


def _sum(parts: Sequence[ColumnElement[int]]) -> ColumnElement[int]:
    """Return their sum as one expression."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
