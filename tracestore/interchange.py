"""Rows out of one store and into another: values are never decoded, only put together, so nothing can change.

Reads page by page, children before their parents, so that while others write no row comes out whose parent does not.
A page is so many rows, and fewer where these weigh more than PAGE_BYTES: kept sets can be a megabyte a call.
Writes page by page, parents first and rewards last: a half imported run is not ready for anybody. What is there
already must say the same. Left out: jobs, leases, ledger (they are of the trainer of that store), late facts (calls
have taken over what these said), publishes, keys. Called by `parquet`, through `Store`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Table,
    and_,
    case,
    exists,
    func,
    not_,
    or_,
    select,
    text,
    true,
    tuple_,
    type_coerce,
)

from tracegrad.tracestore import schema
from tracegrad.tracestore.blocks import KnownBlocks
from tracegrad.tracestore.calls import CHUNK
from tracegrad.tracestore.drafts import Answer, Draft, answers_of, differences, drafted, insert_drafts
from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.payload_schema import call_payloads, choice_payloads, plain_type, raw_table
from tracegrad.tracestore.payloads import Payload, payloads_of
from tracegrad.tracestore.runs import lock_runs
from tracegrad.tracestore.serials import Serials
from tracegrad.tracestore.tasks import NOTHING

Row = dict[str, Any]
PAGE_BYTES = 32 << 20
"""What a page weighs at most, its last part aside: tokens as int32, logprobs as float32, JSON as text."""
_PARTS = 8
"""The content of a page of calls is read in parts that are guessed to weigh this fraction of it."""
_UNCOUNTED_BYTES = 64 << 10
"""What the request of a call is taken for whose prompt has no token ids."""
_ANSWER = [one.name for one in fields(Answer)]
_GO_ON = text(
    """
    SELECT count(nextval(CAST(serial AS regclass)))
    FROM (SELECT pg_get_serial_sequence('policy_versions', 'version_id') AS serial) AS named, generate_series(
        1, (SELECT max(version_id) FROM policy_versions) - COALESCE(pg_sequence_last_value(CAST(serial AS regclass)), 0)
    )
    """
)
"""Numbers go on after the highest that was imported. By steps: setval could turn back what others take meanwhile."""
_NOT_CARRIED = {"seq", "placed_by", "role_by", "span_by", "job_id"}


@dataclass(frozen=True, slots=True)
class Carried:
    """A table that is carried over: its key, and which columns must be equal where a row is there already.

    `later` are those that may be filled in later: what the export knows of them must be known here, and alike; what it
    does not know yet says nothing. `bare` are those that are compared where the content was deleted, here or there.
    """

    table: Table
    key: tuple[str, ...]
    same: tuple[str, ...] | None = None
    """None: all of them."""
    later: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    page: int = 5_000

    @property
    def columns(self) -> list[str]:
        """The columns that go along."""
        return [one.name for one in self.table.c if one.name not in _NOT_CARRIED]


_IDENTITY = ("project", "purpose", "task_id", "group_id", "member", "opened_at")
_SERVED = ("model", "requested_model", "version_dispatched", "status", "dispatched_at", "project")
_TOLD = ("parent_span_id", "namespace", "superstep", "triggers", "wrote", "input", "output", "error")
_UNKNOWN = {"status": "open", "triggers": "[]"}
"""What a column that may be filled in later holds before, where that is not NULL."""
CARRIED = {
    one.table.name: one
    for one in (
        Carried(schema.tasks, ("task_id",), ("project", "input", "reference"), bare=("project",)),
        Carried(schema.policy_versions, ("version_id",), ("model", "kind", "checkpoint_hash", "step")),
        Carried(schema.groups, ("group_id",), ("task_id", "planned_size", "purpose")),
        Carried(schema.runs, ("run_id",), _IDENTITY, ("status", "ended_by", "error", "ended_at"), _IDENTITY),
        Carried(schema.spans, ("run_id", "span_id"), ("name", "kind"), (*_TOLD, "started_at", "ended_at")),
        Carried(
            schema.calls, ("call_id",), (*_SERVED, "quarantine"), ("run_id", "role", "span_id"), _SERVED, page=1_000
        ),
        Carried(schema.rewards, ("reward_id",)),
    )
}
"""By name, parents first: the order of an import; an export goes the other way."""


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
                with connection.execute(following.execution_options(yield_per=20)) as result:
                    found = list(_up_to_a_page(map(dict, result.mappings())))
                if found and name == "calls":
                    found = list(_up_to_a_page(_with_payloads(connection, found)))
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
        if name == "calls":
            return self._take_in_calls(rows)
        new = 0
        with self._db.write() as connection:
            if name in ("spans", "rewards"):  # of a run that is leased here: see `lock_runs`
                lock_runs(connection, [row["run_id"] for row in rows])
            for start in range(0, len(rows), CHUNK):
                new += len(_insert_new(connection, CARRIED[name], rows[start : start + CHUNK]))
            if name == "policy_versions" and not self._db.is_sqlite:
                connection.execute(_GO_ON)
        return new

    def _take_in_calls(self, rows: Sequence[Row]) -> int:
        drafts = {row["call_id"]: _draft(row) for row in rows if row["request"] is not None}  # a stub has no content
        fresh: list[str] = []

        def write(connection: Connection, known: KnownBlocks, _again: bool) -> Mapping[bytes, int]:
            fresh.clear()
            used: dict[bytes, int] = {}
            lock_runs(connection, [row["run_id"] for row in rows if row["run_id"] is not None])
            for start in range(0, len(rows), CHUNK):
                some = rows[start : start + CHUNK]
                new = {row["call_id"] for row in _insert_new(connection, CARRIED["calls"], some)}
                fresh.extend(new)
                numbered = _numbers(connection, [row["call_id"] for row in some if row["call_id"] in drafts])
                there = {seq: drafts[call_id] for seq, call_id in numbered.items() if call_id not in new}
                for call_id, what in differences(connection, there):
                    raise Conflict(
                        f"call {call_id} is here already with another {what}: import into a store of its own"
                    )
                mine = {seq: drafts[call_id] for seq, call_id in numbered.items() if call_id in new}
                used.update(insert_drafts(connection, mine, known, Serials(connection)))
            return used

        self._blocks.write_with(self._db, write)
        return len(fresh)


def _raw(stored: Any) -> Any:
    """Return the column without its codec."""
    return type_coerce(stored, plain_type(stored)).label(stored.name)


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


def _up_to_a_page(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the first rows, up to the one that makes a page full."""
    weight = 0
    for row in rows:
        yield row
        weight += _weight(row)
        if weight >= PAGE_BYTES:
            return


def _weight(row: Row) -> int:
    """Return the bytes of a row's content, about."""
    own = sum(len(value) for value in row.values() if isinstance(value, str | bytes))
    return own + sum(map(_weight, row.get("choices", ())))


def _with_payloads(connection: Connection, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield calls with their payloads and their choices, read a part of a page at a time."""
    guessed = _guessed_bytes(connection, [row["_seq"] for row in rows])
    part: list[Row] = []
    weight = 0
    for row in rows:
        if part and weight + guessed[row["_seq"]] > PAGE_BYTES // _PARTS:
            _add_payloads(connection, part)
            yield from part
            part, weight = [], 0
        part.append(row)
        weight += guessed[row["_seq"]]
    _add_payloads(connection, part)
    yield from part


def _guessed_bytes(connection: Connection, seqs: Sequence[int]) -> dict[int, int]:
    """Guess from counts what calls weigh: four bytes a token id, a logprob, and the text of a token."""
    prompt = case(
        (call_payloads.c.n_prompt.is_not(None), 8 * call_payloads.c.n_prompt),
        (call_payloads.c.text_head.is_not(None), _UNCOUNTED_BYTES),
        else_=0,
    )
    asked = select(call_payloads.c.seq, prompt.label("size"))
    kept = func.coalesce(2 * func.length(choice_payloads.c.kept_ids), 0)  # two bytes an id at the least
    sampled = select(choice_payloads.c.seq, func.sum(16 * choice_payloads.c.n_tokens + kept).label("size"))
    found = dict.fromkeys(seqs, 0)
    for sizes in (asked, sampled.group_by(choice_payloads.c.seq)):
        for row in connection.execute(sizes.where(sizes.selected_columns.seq.in_(seqs))):
            found[row.seq] += int(row.size)
    return found


def _add_payloads(connection: Connection, rows: list[Row]) -> None:
    """Give each call its payload and its choices; those of a stub have none (see `removal`)."""
    seqs = [row["_seq"] for row in rows]
    payloads = payloads_of(connection, seqs)
    answers = answers_of(connection, seqs)
    for row in rows:
        seq = row["_seq"]
        row.update(prompt_ids=None, request=None, requested=None, effective=None)
        if (payload := payloads.get(seq)) is not None:
            row.update(prompt_ids=payload.prompt, request=payload.request.decode())
            row.update(requested=payload.requested, effective=payload.effective)
        row["choices"] = [asdict(one) for one in answers.get(seq, ())]


def _draft(row: Row) -> Draft:
    request = row["request"].encode()
    payload = Payload(row["n_prompt"], row["prompt_ids"], request, row["requested"], row["effective"])
    answers = [Answer(**{name: one[name] for name in _ANSWER}) for one in row["choices"]]
    return drafted(row["call_id"], row["project"], payload, answers)


def _numbers(connection: Connection, call_ids: Sequence[str]) -> dict[int, str]:
    calls, found = schema.calls, {}
    for start in range(0, len(call_ids), CHUNK):
        named = select(calls.c.seq, calls.c.call_id).where(calls.c.call_id.in_(call_ids[start : start + CHUNK]))
        found.update({row.seq: row.call_id for row in connection.execute(named)})
    return found


def _insert_new(connection: Connection, carried: Carried, rows: Sequence[Row]) -> list[Row]:
    """Insert the rows whose key is not there; compare the others. Return the inserted.

    What was deleted, here or there, says nothing else than what has its content; a task takes it.
    """
    if not rows:
        return []
    raw = raw_table(carried.table, carried.columns)
    key = tuple_(*(raw.c[name] for name in carried.key))
    ids = [tuple(row[name] for name in carried.key) for row in rows]
    there = {
        tuple(row[name] for name in carried.key): row
        for row in connection.execute(select(raw).where(key.in_(ids))).mappings()
    }
    stubs = _stubs(connection, [row["call_id"] for row in there.values()]) if carried.table is schema.calls else set()
    fresh = []
    for row, id_ in zip(rows, ids, strict=True):
        stored = there.get(id_)
        if stored is None:
            fresh.append({name: row[name] for name in carried.columns})
        elif _is_deleted(carried.table, row) or _is_deleted(carried.table, stored) or id_[0] in stubs:
            _check_same(replace(carried, same=carried.bare, later=()), row, stored)
            if carried.table is schema.tasks and row["input"] != NOTHING:
                content = {name: row[name] for name in ("input", "reference")}
                connection.execute(raw.update().where(raw.c.task_id == row["task_id"]).values(content))
        else:
            _check_same(carried, row, stored)
    if fresh:
        connection.execute(raw.insert(), fresh)
    return fresh


def _stubs(connection: Connection, call_ids: Sequence[str]) -> set[str]:
    """Those of the stored calls whose content was deleted: every other has a request."""
    asked = exists().where(call_payloads.c.seq == schema.calls.c.seq)
    named = select(schema.calls.c.call_id).where(schema.calls.c.call_id.in_(call_ids), not_(asked))
    return set(connection.execute(named).scalars())


def _is_deleted(table: Table, row: Row | RowMapping) -> bool:
    """Whether the row says that its content was deleted. (A stored call does not: see `_stubs`.)"""
    if table is schema.runs:
        return bool(row["error"] == schema.CONTENT_DELETED)
    if table is schema.tasks:
        return bool(row["input"] == NOTHING)
    return table is schema.calls and row.get("request", "") is None


def _check_same(carried: Carried, row: Row, stored: RowMapping) -> None:
    said = [name for name in carried.later if row[name] not in (None, _UNKNOWN.get(name))]
    for name in (*(carried.columns if carried.same is None else carried.same), *said):
        if row[name] != stored[name]:
            who = " ".join(str(row[key]) for key in carried.key)
            raise Conflict(
                f"{carried.table.name} {who} is here already with another {name}: import into a store of its own"
            )
