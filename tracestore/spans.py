"""Spans: what ran inside a run, told in parts by calls, hooks and posted run trees.

A part writes what it knows; what an earlier part said is kept where a later one says nothing. Refuses what is not JSON;
an unknown run is opened as a live one. A lease keeps outlines of them, for parts come after it. Called by `calls`,
`attributions` and `leases`, and by the proxy through `Store`; the graph they form is derived in `edges`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any

import msgspec
from sqlalchemy import Connection, Text, case, func, literal_column, or_, select, type_coerce

from tracegrad.tracestore.codec import JsonText, encode_json
from tracegrad.tracestore.database import insert_for
from tracegrad.tracestore.hot import HotStatement, run_hot
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import Span
from tracegrad.tracestore.runs import lock_runs, open_or_touch
from tracegrad.tracestore.schema import calls, holds, spans

_FIELDS = tuple(field.name for field in fields(Span))
_KEY = ("run_id", "span_id")
_VALUES = attrgetter(*_FIELDS)
_OUTLINE = tuple(name for name in _FIELDS if name not in ("run_id", "input", "output", "error"))
_JSON = [place for place, name in enumerate(_FIELDS) if isinstance(spans.c[name].type, JsonText)]


class Spans(Noun):
    """The part of the store that knows what ran inside a run."""

    def put_spans(self, spans: Sequence[Span], project: str = "default") -> None:
        """Write parts of spans, in order. Unknown runs are opened as live runs of `project`.

        Raises:
            InvalidRecord: an input or output that is not JSON.
        """
        if not spans:
            return
        with self._db.write() as connection:
            run_ids = {span.run_id: project for span in spans}
            lock_runs(connection, run_ids)
            open_or_touch(connection, run_ids, self._db.now())
            upsert_spans(connection, spans)

    def list_spans(self, run_id: str) -> list[Span]:
        """Return the spans of a run in order of their start (those without one last, then by superstep and id)."""
        with self._db.read() as connection:
            return spans_of(connection, [run_id]).get(run_id, [])

    def calls_within(self, run_id: str, span_id: str) -> list[str]:
        """Return the ids of the calls that were made in a span or in what ran inside of it, in order of arrival."""
        with self._db.read() as connection:
            here = select(spans.c.span_id, spans.c.parent_span_id).where(spans.c.run_id == run_id)
            parents = {row.span_id: row.parent_span_id for row in connection.execute(here)}
            made = select(calls.c.call_id, calls.c.span_id).where(calls.c.run_id == run_id)
            made = made.where(calls.c.span_id.is_not(None)).order_by(calls.c.seq)
            return [row.call_id for row in connection.execute(made) if span_id in _upwards(row.span_id, parents)]

    def runs_of_spans(self, span_ids: Sequence[str]) -> dict[str, str]:
        """Return span id -> run, of those span ids that are stored; of two runs that have one, the later."""
        statement = select(spans.c.span_id, spans.c.run_id).where(spans.c.span_id.in_(span_ids))
        with self._db.read() as connection:
            return {row.span_id: row.run_id for row in connection.execute(statement.order_by(spans.c.run_id))}


def _upwards(span_id: str, parents: Mapping[str, str | None]) -> set[str]:
    """The span and those around it; sources that disagree may have told of a ring."""
    around: set[str] = set()
    at: str | None = span_id
    while at is not None and at not in around:
        around.add(at)
        at = parents.get(at)
    return around


def upsert_spans(connection: Connection, parts: Sequence[Span]) -> None:
    """Write parts of spans whose runs exist and are locked, in the order given; what is said twice running, once."""
    if parts:
        told = [part for before, part in zip([None, *parts], parts, strict=False) if part != before]
        run_hot(connection, _upsert_for(connection.dialect.name), [_row(part) for part in told])


def _row(part: Span) -> list[Any]:
    row = list(_VALUES(part))
    for place in _JSON:
        row[place] = None if row[place] is None else encode_json(row[place])
    return row


def spans_of(connection: Connection, run_ids: Sequence[str]) -> dict[str, list[Span]]:
    """Return run id -> its spans, ordered as `Spans.list_spans` says."""
    found: dict[str, list[Span]] = {}
    for row in connection.execute(select(spans).where(spans.c.run_id.in_(run_ids)).order_by(*_order())):
        found.setdefault(row.run_id, []).append(_span(row))
    return found


def outlines_of(connection: Connection, run_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return each of the run ids -> its spans in that order, as JSON: what is known of them but input, output, error.

    That is all the graph of a run is made of; what a node read and returned is most of what a span weighs.
    """
    found: dict[str, list[dict[str, Any]]] = {run_id: [] for run_id in run_ids}
    columns = [spans.c[name] for name in ("run_id", *_OUTLINE)]
    for run_id, *values in connection.execute(select(*columns).where(spans.c.run_id.in_(run_ids)).order_by(*_order())):
        said = zip(_OUTLINE, values, strict=True)
        found[run_id].append({name: value for name, value in said if value is not None})
    return found


def leased_spans(connection: Connection, lease_id: int, run_ids: Sequence[str]) -> dict[str, list[Span]]:
    """Return run id -> its outlined spans when it was leased, of those that the lease holds and has outlines of."""
    kept = select(holds.c.run_id, holds.c.spans).where(
        holds.c.lease_id == lease_id, holds.c.run_id.in_(run_ids), holds.c.spans.is_not(None)
    )
    return {
        row.run_id: [msgspec.convert({"run_id": row.run_id, **said}, Span) for said in row.spans]
        for row in connection.execute(kept)
    }


def _order() -> tuple[Any, ...]:
    unknown_last = case((spans.c.started_at.is_(None), 1), else_=0)
    return unknown_last, spans.c.started_at, func.coalesce(spans.c.superstep, -1), spans.c.span_id


def span_of(connection: Connection, run_id: str, span_id: str) -> Span | None:
    """Return one span, or None."""
    here = (spans.c.run_id == run_id, spans.c.span_id == span_id)
    row = connection.execute(select(spans).where(*here)).one_or_none()
    return None if row is None else _span(row)


def _span(row: Any) -> Span:
    values = {name: getattr(row, name) for name in _FIELDS}
    wrote = None if row.wrote is None else tuple(row.wrote)
    return Span(**{**values, "triggers": tuple(row.triggers), "wrote": wrote})


@cache
def _upsert_for(dialect: str) -> HotStatement:
    """The newer name and kind; of the rest the newer, where it says anything, but for `source`: the first that told.

    A row that would stay as it is is not written: the calls of a span tell it again and again.
    """
    statement = insert_for(dialect, spans)
    given, known = statement.excluded, spans.c
    changed: dict[str, Any] = {name: given[name] for name in ("name", "kind")}
    says_none = type_coerce(given.triggers, Text) == literal_column("'[]'")
    changed["triggers"] = case((says_none, known.triggers), else_=given.triggers)
    changed["source"] = func.coalesce(known.source, given.source)
    for name in _FIELDS:
        if name not in (*_KEY, *changed):
            changed[name] = func.coalesce(given[name], known[name])
    news = or_(*(value.is_distinct_from(known[name]) for name, value in changed.items()))
    return HotStatement(statement.on_conflict_do_update(index_elements=list(_KEY), set_=changed, where=news), *_FIELDS)
