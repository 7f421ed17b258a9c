"""Calls with their choices, written in one transaction before the reply ends (law 3).

Refuses a call whose lengths disagree (law 4) and a call id that says something else the second time; the same call
again is a no-op. Runs and spans that the call names and the store does not know are opened beside it. What it was asked
and what it answered is written by `drafts`.
Called by the proxy (through `group_commit`) and by `Store`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Double, bindparam, case, func, select

from tracegrad.tracestore.blocks import KnownBlocks
from tracegrad.tracestore.codec import encode_json
from tracegrad.tracestore.drafts import Draft, differences, draft_of, insert_drafts
from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound
from tracegrad.tracestore.hot import HotInsert, run_insert
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.runs import lock_runs, open_or_touch
from tracegrad.tracestore.schema import calls
from tracegrad.tracestore.serials import Serials
from tracegrad.tracestore.spans import upsert_spans
from tracegrad.tracestore.version_spans import cover

_KNOWN = select(calls.c.call_id).where(calls.c.call_id.in_(bindparam("ids", expanding=True)))
CHUNK = 400
"""Ids in one IN list."""


class Calls(Noun):
    """The part of the store that takes calls in."""

    def append_calls(self, calls: Sequence[Call]) -> None:
        """Commit calls durably, all or none. Unknown runs are opened as live, spans are written or completed.

        Raises:
            InvalidRecord: lengths that disagree, a repeated choice index, a span of another run, an unknown version.
            Conflict: a call id exists with other content.
            StoreUnavailable: nothing was committed.
        """
        batch = _distinct(calls)
        if not batch:
            return
        for call in batch.values():
            _check(call)
        drafts = [draft_of(call) for call in batch.values()]

        def append(connection: Connection, known_blocks: KnownBlocks, again: bool) -> Mapping[bytes, int]:
            known = _known(connection, list(batch)) if again else ()  # a call that came before is rare, and refused
            for draft in drafts:
                if draft.call_id in known:
                    _refuse_other_content(connection, batch[draft.call_id], draft)
            fresh = [draft for draft in drafts if draft.call_id not in known]
            return _insert(connection, [batch[draft.call_id] for draft in fresh], fresh, known_blocks, self._db.now())

        self._blocks.write_with(self._db, append)

    def find_call(self, call_or_completion_id: str, project: str | None = None) -> tuple[str, str | None]:
        """Return (call id, run id or None) of a call named by our id or by the completion id of its answer.

        With `project`, calls of others are unknown.

        Raises:
            NotFound: neither.
            Conflict: several calls have that completion id.
        """
        with self._db.read() as connection:
            columns = select(calls.c.call_id, calls.c.run_id)
            if project is not None:
                columns = columns.where(calls.c.project == project)
            row = connection.execute(columns.where(calls.c.call_id == call_or_completion_id)).one_or_none()
            if row is not None:
                return row.call_id, row.run_id
            rows = connection.execute(columns.where(calls.c.completion_id == call_or_completion_id).limit(2)).all()
        if not rows:
            raise NotFound(
                f"no call has the id or completion id {call_or_completion_id!r}: was it answered by this proxy?"
            )
        if len(rows) > 1:
            raise Conflict(f"several calls have the completion id {call_or_completion_id!r}: name the call id")
        return rows[0].call_id, rows[0].run_id

    def find_attempt(
        self,
        request_hash: str,
        run_id: str | None,
        since: float,
        *,
        project: str = "default",
        exclude: Collection[str] = (),
    ) -> str | None:
        """Return the newest call of the run (None: of no run) with this body that arrived after `since`, or None.

        `since` is in Unix seconds, `exclude` names calls that are other people's attempts; calls of other projects are
        not looked at. Who retries a request asks this to learn which call it repeats.
        """
        same_run = calls.c.run_id.is_(None) if run_id is None else calls.c.run_id == run_id
        with self._db.read() as connection:
            found = connection.execute(
                select(calls.c.call_id)
                .where(calls.c.request_hash == request_hash, same_run, calls.c.received_at > since)
                .where(calls.c.project == project, calls.c.call_id.not_in(exclude))
                .order_by(calls.c.received_at.desc(), calls.c.seq.desc())
                .limit(1)
            ).scalar()
        return None if found is None else str(found)


def _distinct(batch: Sequence[Call]) -> dict[str, Call]:
    distinct: dict[str, Call] = {}
    for call in batch:
        if distinct.setdefault(call.call_id, call) != call:
            raise Conflict(
                f"call {call.call_id!r} stands twice in one batch with different content: give each its own id"
            )
    return distinct


def _check(call: Call) -> None:
    seen: set[int] = set()
    for choice in call.choices:
        if choice.index in seen:
            raise InvalidRecord(f"call {call.call_id!r} has choice {choice.index} twice: number the choices from 0")
        seen.add(choice.index)
        if choice.logprobs is not None and len(choice.logprobs) != len(choice.token_ids):
            raise InvalidRecord(
                f"call {call.call_id!r} choice {choice.index} has {len(choice.token_ids)} token ids and "
                f"{len(choice.logprobs)} logprobs: record logprobs None and quarantine the call"
            )
        kept = choice.kept_ids
        if kept is not None and (
            len(kept) != len(choice.token_ids)
            or any(token not in ids for token, ids in zip(choice.token_ids, kept, strict=True))
        ):
            raise InvalidRecord(
                f"call {call.call_id!r} choice {choice.index} has {len(choice.token_ids)} token ids and {len(kept)} "
                f"kept sets: record one for each token, with the token in it, or kept_ids None"
            )
        firsts = [first for first, _ in choice.version_spans]
        if firsts and not cover(choice.version_spans, len(choice.token_ids)):
            raise InvalidRecord(
                f"call {call.call_id!r} choice {choice.index} has {len(choice.token_ids)} token ids, and version spans "
                f"from tokens {firsts}: begin with 0, go up, and stay inside, or quarantine the call"
            )
    span = call.attribution.span
    if span is not None and span.run_id != call.attribution.run_id:
        raise InvalidRecord(
            f"call {call.call_id!r} is of run {call.attribution.run_id!r}, its span {span.span_id!r} of {span.run_id!r}"
        )


def _known(connection: Connection, call_ids: list[str]) -> set[str]:
    known: set[str] = set()
    for start in range(0, len(call_ids), CHUNK):
        known.update(connection.execute(_KNOWN, {"ids": call_ids[start : start + CHUNK]}).scalars())
    return known


def _insert(
    connection: Connection, batch: Sequence[Call], drafts: Sequence[Draft], known_blocks: KnownBlocks, now: float
) -> Mapping[bytes, int]:
    if not batch:
        return {}
    active = {call.attribution.run_id: call.project for call in batch if call.attribution.run_id is not None}
    if active:
        lock_runs(connection, active)
        open_or_touch(connection, active, now)
    upsert_spans(connection, [call.attribution.span for call in batch if call.attribution.span is not None])
    serials = Serials(connection)
    seqs = serials.take(calls.name, len(batch))
    rows = [(seq, *_call_row(call)) for seq, call in zip(seqs, batch, strict=True)]
    run_insert(connection, _INSERT, rows)
    return insert_drafts(connection, dict(zip(seqs, drafts, strict=True)), known_blocks, serials)


_NAMES = (
    "call_id",
    "completion_id",
    "run_id",
    "run_source",
    "role",
    "role_source",
    "span_id",
    "model",
    "requested_model",
    "version_dispatched",
    "version_completed",
    "status",
    "received_at",
    "dispatched_at",
    "first_token_at",
    "completed_at",
    "stream",
    "quarantine",
    "error",
    "endpoint",
    "project",
    "request_hash",
    "retry_of",
    "continues",
    "continues_choice",
    "drift",
    "token_in",
)
_INSERT = HotInsert(calls, "seq", *_NAMES)


def _call_row(call: Call) -> tuple[Any, ...]:
    """Return the values of `_NAMES`."""
    who, when, origin = call.attribution, call.timing, call.continues
    return (
        call.call_id,
        call.completion_id,
        who.run_id,
        who.run_source,
        who.role,
        who.role_source,
        None if who.span is None else who.span.span_id,
        call.model,
        call.requested_model,
        call.version_dispatched,
        call.version_completed,
        call.status,
        when.received_at,
        when.dispatched_at,
        when.first_token_at,
        when.completed_at,
        call.stream,
        call.quarantine,
        call.error,
        call.endpoint,
        call.project,
        call.request_hash,
        call.retry_of,
        None if origin is None else origin.call_id,
        None if origin is None else origin.choice,
        None if origin is None else origin.drift,
        None if origin is None else origin.token_in,
    )


def _refuse_other_content(connection: Connection, call: Call, draft: Draft) -> None:
    """Compare what is stored with `call`, bytes with bytes (so that NaN equals NaN)."""
    wanted = dict(zip(_NAMES, _call_row(call), strict=True))
    columns = [_as_it_came(calls.c[name]) for name in wanted]
    stored = connection.execute(select(calls.c.seq, *columns).where(calls.c.call_id == call.call_id)).one()
    other = [what for _, what in differences(connection, {stored.seq: draft})]
    if other or _canonical(wanted) != _canonical({name: stored._mapping[name] for name in wanted}):
        what = (other or ["metadata"])[0]
        raise Conflict(f"call {call.call_id!r} is stored with other content ({what}): give each call its own id")


def _as_it_came(column: Any) -> Any:
    """What a call took over from a later fact (see `attributions`) is not what it was appended with."""
    taken_by = _TAKEN_BY.get(column.name) if column.table is calls else None
    return column if taken_by is None else case((taken_by.is_(None), column)).label(column.name)


_TAKEN_BY = {
    **dict.fromkeys(("run_id", "run_source"), calls.c.placed_by),
    **dict.fromkeys(("role", "role_source"), calls.c.role_by),
    "span_id": func.coalesce(calls.c.span_by, calls.c.placed_by),  # a call that had no run had no span
}


def _canonical(row: Mapping[str, Any]) -> list[str]:
    """Return the row as text, each value as it is stored."""
    words = []
    for name in sorted(row):
        value = row[name]
        as_stored = float(value) if isinstance(value, int) and isinstance(calls.c[name].type, Double) else value
        words.append(f"{name}={encode_json(as_stored)}")
    return words
