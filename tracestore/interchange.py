"""Rows as they lie, out of one store and into another: blobs and JSON text are never decoded, so nothing can change.

Reads page by page, children before their parents, so that while others write no row comes out whose parent does not.
Writes page by page, parents first and rewards last: a half imported run is not ready for anybody. What is there
already must say the same. Left out: jobs, leases, ledger (they are of the trainer of that store), late facts (calls
have taken over what these said), publishes, keys. Called by `parquet`, through `Store`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    RowMapping,
    Table,
    TableClause,
    Text,
    and_,
    column,
    exists,
    or_,
    select,
    table,
    text,
    true,
    tuple_,
    type_coerce,
)

from tracegrad.tracestore import schema
from tracegrad.tracestore.calls import CHUNK
from tracegrad.tracestore.codec import Float32s, Int32s, JsonText
from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.runs import lock_runs

Row = dict[str, Any]
_NOT_CARRIED = {"seq", "placed_by", "role_by", "job_id"}


@dataclass(frozen=True, slots=True)
class Carried:
    """A table that is carried over: its key, and which columns must be equal where a row is there already."""

    table: Table
    key: tuple[str, ...]
    same: tuple[str, ...] | None = None
    """None: all of them."""
    page: int = 5_000

    @property
    def columns(self) -> list[str]:
        """The columns that go along."""
        return [one.name for one in self.table.c if one.name not in _NOT_CARRIED]


CARRIED = {
    one.table.name: one
    for one in (
        Carried(schema.tasks, ("task_id",), ("project", "input", "reference")),
        Carried(schema.policy_versions, ("version_id",), ("model", "kind", "checkpoint_hash", "step")),
        Carried(schema.groups, ("group_id",), ("task_id", "planned_size", "purpose")),
        Carried(schema.runs, ("run_id",), ("project", "purpose", "task_id", "group_id", "member", "opened_at")),
        Carried(schema.spans, ("run_id", "span_id"), ()),
        Carried(
            schema.calls,
            ("call_id",),
            ("model", "requested_model", "version_dispatched", "status", "dispatched_at", "quarantine", "project"),
            1_000,
        ),
        Carried(schema.rewards, ("reward_id",)),
    )
}
"""By name, parents first: the order of an import; an export goes the other way."""
_PAYLOADS = (
    Carried(schema.call_payloads, ("call_id",)),
    Carried(schema.choices, ("call_id", "choice_index")),
    Carried(schema.choice_payloads, ("call_id", "choice_index")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The runs to export: of a project, opened since a time, or these. Without `run_ids`, calls without a run too."""

    project: str | None = None
    since: float | None = None
    run_ids: tuple[str, ...] = ()


class Interchange(Noun):
    """The part of the store that gives its rows away and takes others' in."""

    def pages(self, name: str, chosen: Chosen) -> Iterator[list[Row]]:
        """Yield the rows of one carried table; each page is one snapshot. Calls have their `choices` in them."""
        carried = CARRIED[name]
        order = [carried.table.c.seq] if "seq" in carried.table.c else [carried.table.c[key] for key in carried.key]
        wanted = [one.label(f"_{one.name}") for one in order] + [_raw(carried.table.c[c]) for c in carried.columns]
        statement = select(*wanted).where(_is_chosen(carried.table, chosen)).order_by(*order).limit(carried.page)
        after: tuple[Any, ...] | None = None
        while True:
            with self._db.read() as connection:
                following = statement if after is None else statement.where(tuple_(*order) > after)
                found = [dict(row) for row in connection.execute(following).mappings()]
                if found and name == "calls":
                    _add_payloads(connection, found)
            if not found:
                return
            for row in found:
                after = tuple(row.pop(f"_{one.name}") for one in order)
            yield found

    def take_in(self, name: str, rows: Sequence[Row]) -> int:
        """Write rows of one carried table, all or none; return how many were new.

        Raises:
            Conflict: one is there already and says something else.
            InvalidRecord: one names what is not there, or breaks another constraint.
        """
        new = 0
        with self._db.write() as connection:
            for start in range(0, len(rows), CHUNK):
                some = rows[start : start + CHUNK]
                if name != "calls":
                    new += len(_insert_new(connection, CARRIED[name], some))
                    continue
                lock_runs(connection, [row["run_id"] for row in some if row["run_id"] is not None])
                new += len(_insert_new(connection, CARRIED[name], some))
                for carried, parts in zip(_PAYLOADS, _parts(some), strict=True):
                    for at in range(0, len(parts), CHUNK):
                        _insert_new(connection, carried, parts[at : at + CHUNK])
            if name == "policy_versions" and not self._db.is_sqlite:
                serial = "pg_get_serial_sequence('policy_versions', 'version_id')"
                connection.execute(text(f"SELECT setval({serial}, max(version_id)) FROM policy_versions"))
        return new


def _plain(stored: Any) -> Any:
    """Return the type that lies below a codec."""
    return {Int32s: LargeBinary(), Float32s: LargeBinary(), JsonText: Text()}.get(type(stored.type), stored.type)


def _raw(stored: Any) -> Any:
    """Return the column without its codec."""
    return type_coerce(stored, _plain(stored)).label(stored.name)


def _raw_table(stored: Table, names: Sequence[str]) -> TableClause:
    return table(stored.name, *(column(name, _plain(stored.c[name])) for name in names))


def _is_chosen(stored: Table, chosen: Chosen) -> ColumnElement[bool]:
    runs = schema.runs
    conditions: list[ColumnElement[bool]] = []
    if chosen.project is not None:
        conditions.append(runs.c.project == chosen.project)
    if chosen.since is not None:
        conditions.append(runs.c.opened_at >= chosen.since)
    if chosen.run_ids:
        conditions.append(runs.c.run_id.in_(chosen.run_ids))
    if not conditions or stored is schema.policy_versions:
        return true()
    these = and_(*conditions)
    if stored is runs:
        return these
    if "task_id" in stored.c:
        key = "group_id" if stored is schema.groups else "task_id"
        return exists().where(runs.c[key] == stored.c[key], these)
    within: ColumnElement[bool] = stored.c.run_id.in_(select(runs.c.run_id).where(these))
    if stored is not schema.calls or chosen.run_ids:
        return within
    alone: list[ColumnElement[bool]] = [stored.c.run_id.is_(None)]
    if chosen.project is not None:
        alone.append(stored.c.project == chosen.project)
    if chosen.since is not None:
        alone.append(stored.c.received_at >= chosen.since)
    return or_(within, and_(*alone))


def _add_payloads(connection: Connection, rows: list[Row]) -> None:
    """Give each call its payload and its choices; those of a stub have none (see `removal`)."""
    by_id = {row["call_id"]: row for row in rows}
    for row in rows:
        row.update(n_prompt=None, prompt_ids=None, request=None, requested=None, effective=None, choices=[])
    payloads, choices, tokens = (one.table for one in _PAYLOADS)
    call_ids = list(by_id)
    for start in range(0, len(call_ids), CHUNK):
        some = call_ids[start : start + CHUNK]
        asked = select(*map(_raw, payloads.c)).where(payloads.c.call_id.in_(some))
        for asked_row in connection.execute(asked).mappings():
            by_id[asked_row["call_id"]].update(asked_row)
        answered = (
            select(*map(_raw, choices.c), *(_raw(tokens.c[name]) for name in ("token_ids", "logprobs", "message")))
            .join(tokens, and_(tokens.c.call_id == choices.c.call_id, tokens.c.choice_index == choices.c.choice_index))
            .where(choices.c.call_id.in_(some))
            .order_by(choices.c.call_id, choices.c.choice_index)
        )
        for choice in connection.execute(answered).mappings():
            by_id[choice["call_id"]]["choices"].append(dict(choice))


def _parts(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Take calls apart into the rows of the three tables of their content; a stub's has none."""
    whole = [row for row in rows if row["request"] is not None]
    sampled = [{**choice, "call_id": row["call_id"]} for row in whole for choice in row["choices"]]
    return whole, sampled, sampled


def _insert_new(connection: Connection, carried: Carried, rows: Sequence[Row]) -> list[Row]:
    """Insert the rows whose key is not there; compare the others. Return the inserted."""
    if not rows:
        return []
    raw = _raw_table(carried.table, carried.columns)
    key = tuple_(*(raw.c[name] for name in carried.key))
    ids = [tuple(row[name] for name in carried.key) for row in rows]
    there = {
        tuple(row[name] for name in carried.key): row
        for row in connection.execute(select(raw).where(key.in_(ids))).mappings()
    }
    fresh = []
    for row, id_ in zip(rows, ids, strict=True):
        stored = there.get(id_)
        if stored is None:
            fresh.append({name: row[name] for name in carried.columns})
        else:
            _check_same(carried, row, stored)
    if fresh:
        connection.execute(raw.insert(), fresh)
    return fresh


def _check_same(carried: Carried, row: Row, stored: RowMapping) -> None:
    for name in carried.columns if carried.same is None else carried.same:
        if row[name] != stored[name]:
            who = " ".join(str(row[key]) for key in carried.key)
            raise Conflict(
                f"{carried.table.name} {who} is here already with another {name}: import into a store of its own"
            )
