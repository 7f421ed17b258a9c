"""The content of calls on its way into the store: encoded and cut before the transaction, written inside it.

Whoever appends holds other writers up (SQLite has one), so that all that costs time and needs no database is done
first. Refuses content that is not what a call with the same id has. Called by `calls` and `interchange`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from sqlalchemy import Connection, select, type_coerce

from tracegrad.tracestore.blocks import KnownBlocks, store_chains
from tracegrad.tracestore.chains import IDS_A_UNIT, Chain, Cut, chain_of, cut, cut_request, units_of_ids
from tracegrad.tracestore.codec import (
    encode_float32,
    encode_int32,
    encode_json,
    narrow_int32,
    widened,
)
from tracegrad.tracestore.hot import HotInsert, run_insert
from tracegrad.tracestore.kept_sets import encode_sets, widened_sets
from tracegrad.tracestore.payload_schema import call_payloads, choice_payloads, plain_type
from tracegrad.tracestore.payloads import Payload, payloads_of, unreadable
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.schema import choices
from tracegrad.tracestore.serials import Serials

Row = tuple[Any, ...]
_CHOICES = HotInsert(choices, "seq", "choice_index", "n_tokens", "finish_reason", "flags", "version_spans")
_TOKENS = HotInsert(
    choice_payloads,
    *("seq", "choice_index", "n_tokens", "token_ids", "logprobs", "message", "kept_counts", "kept_ids"),
)
_PAYLOADS = HotInsert(
    call_payloads,
    *("seq", "ids_head", "text_head", "n_prompt", "n_chained", "tail", "places", "request", "requested", "effective"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A choice as it lies: token ids as int32, logprobs as float32, JSON as its text."""

    choice_index: int
    n_tokens: int
    token_ids: bytes
    logprobs: bytes | None
    finish_reason: str | None
    flags: str
    message: str
    version_spans: str | None
    kept_counts: bytes | None = None
    kept_ids: bytes | None = None


class Draft(NamedTuple):
    """The content of a call, encoded, with its prompt and its request cut."""

    call_id: str
    prompt: bytes | None
    requested: str
    effective: str
    answers: Sequence[Answer]
    cut: Cut
    ids: Chain | None
    tail: bytes | None
    text: Chain | None

    @property
    def n_prompt(self) -> int | None:
        """How many token ids the prompt has."""
        return None if self.prompt is None else len(self.prompt) // 4

    @property
    def payload(self) -> Payload:
        """What a reader would get."""
        return Payload(self.n_prompt, self.prompt, self.cut.whole, self.requested, self.effective)


def draft_of(call: Call) -> Draft:
    """Encode the content of a call. Raises InvalidRecord for what cannot be stored exactly."""
    answers = [
        Answer(
            one.index,
            len(one.token_ids),
            encode_int32(one.token_ids),
            None if one.logprobs is None else encode_float32(one.logprobs),
            one.finish_reason,
            encode_json(one.flags),
            encode_json(one.message),
            encode_json(one.version_spans) if one.version_spans else None,
            *encode_sets(one.kept_ids),
        )
        for one in call.choices
    ]
    asked = _Asked(
        None if call.prompt_ids is None else encode_int32(call.prompt_ids),
        cut_request(call.request),
        encode_json(call.requested),
        encode_json(call.effective),
    )
    return _drafted(call.call_id, call.project, asked, answers)


def drafted(call_id: str, project: str, payload: Payload, answers: Sequence[Answer]) -> Draft:
    """Cut the prompt and the request of a call that came encoded."""
    asked = _Asked(payload.prompt, cut(payload.request), payload.requested, payload.effective)
    return _drafted(call_id, project, asked, answers)


class _Asked(NamedTuple):
    prompt: bytes | None
    cut: Cut
    requested: str
    effective: str


def _drafted(call_id: str, project: str, asked: _Asked, answers: Sequence[Answer]) -> Draft:
    units, tail = ([], None) if asked.prompt is None else units_of_ids(asked.prompt)
    return Draft(
        call_id=call_id,
        prompt=asked.prompt,
        requested=asked.requested,
        effective=asked.effective,
        answers=answers,
        cut=asked.cut,
        ids=chain_of(project, units, is_text=False) if units else None,
        tail=tail,
        text=chain_of(project, asked.cut.units, is_text=True) if asked.cut.units else None,
    )


def insert_drafts(
    connection: Connection, drafts: Mapping[int, Draft], known: KnownBlocks, serials: Serials
) -> Mapping[bytes, int]:
    """Write the content of calls, by the number of each; return the blocks to remember once this is committed."""
    answers = [(seq, answer) for seq, draft in drafts.items() for answer in draft.answers]
    run_insert(connection, _CHOICES, [_choice_row(seq, answer) for seq, answer in answers])
    run_insert(connection, _TOKENS, [_token_row(seq, answer) for seq, answer in answers])
    return insert_payloads(connection, drafts, known, serials)


def insert_payloads(
    connection: Connection, drafts: Mapping[int, Draft], known: KnownBlocks, serials: Serials
) -> Mapping[bytes, int]:
    """As `insert_drafts`, of calls whose choices are there."""
    chains = [chain for draft in drafts.values() for chain in (draft.ids, draft.text) if chain is not None]
    ids, used = store_chains(connection, chains, known, serials)
    head = iter(ids)
    rows = []
    for seq, draft in drafts.items():
        heads = [None if chain is None else next(head) for chain in (draft.ids, draft.text)]
        rows.append(_payload_row(seq, draft, *heads))
    run_insert(connection, _PAYLOADS, rows)
    return used


def differences(connection: Connection, drafts: Mapping[int, Draft]) -> Iterator[tuple[str, str]]:
    """Compare the content of stored calls, by number, with that of drafts: yield the call id and what is another.

    A call whose content was deleted has nothing to compare.
    """
    stored = payloads_of(connection, list(drafts))
    answers = answers_of(connection, list(drafts))
    for seq, draft in drafts.items():
        if seq not in stored:
            continue
        ours = sorted(draft.answers, key=lambda one: one.choice_index)
        theirs = answers.get(seq, [])
        pairs: list[tuple[Any, Any]] = [(stored[seq], draft.payload)]
        pairs += zip(theirs, ours, strict=False)
        different = [one.name for left, right in pairs for one in fields(left) if _differ(left, right, one.name)]
        if len(theirs) != len(ours):
            different.append("number of choices")
        if different:
            yield draft.call_id, different[0]


def _differ(left: Any, right: Any, name: str) -> bool:
    return bool(getattr(left, name) != getattr(right, name))


def answers_of(connection: Connection, seqs: Sequence[int]) -> dict[int, list[Answer]]:
    """Return the choices of calls as they lie, by the number of the call and in order.

    Raises:
        TraceStoreError: one has token ids or kept sets that are not as many as it counts.
    """
    columns = [choices.c.choice_index, choices.c.n_tokens, choice_payloads.c.token_ids, choice_payloads.c.logprobs]
    columns += [choices.c.finish_reason, choices.c.flags, choice_payloads.c.message, choices.c.version_spans]
    columns += [choice_payloads.c.kept_counts, choice_payloads.c.kept_ids]
    raw = [type_coerce(one, plain_type(one)).label(one.name) for one in columns]
    found: dict[int, list[Answer]] = {}
    for row in connection.execute(
        select(choices.c.seq, *raw)
        .join_from(choices, choice_payloads)
        .where(choices.c.seq.in_(seqs))
        .order_by(choices.c.seq, choices.c.choice_index)
    ):
        try:
            tokens = widened(row.token_ids, row.n_tokens)
            kept = widened_sets(row.kept_counts, row.kept_ids, row.n_tokens)
        except ValueError as error:
            raise unreadable(f"choice {row.choice_index} of call number {row.seq}", error) from error
        counted = row.choice_index, row.n_tokens, tokens, row.logprobs
        answer = Answer(*counted, row.finish_reason, row.flags, row.message, row.version_spans, *kept)
        found.setdefault(row.seq, []).append(answer)
    return found


def _payload_row(seq: int, draft: Draft, ids_head: int | None, text_head: int | None) -> Row:
    n_chained = 0 if draft.ids is None else IDS_A_UNIT * len(draft.ids.units)
    tail = None if draft.tail is None else narrow_int32(draft.tail)[1]
    asked = draft.cut.places, draft.cut.rest.decode(), draft.requested, draft.effective
    return (seq, ids_head, text_head, draft.n_prompt, n_chained, tail, *asked)


def _choice_row(seq: int, answer: Answer) -> Row:
    return seq, answer.choice_index, answer.n_tokens, answer.finish_reason, answer.flags, answer.version_spans


def _token_row(seq: int, answer: Answer) -> Row:
    ids, *kept = (
        None if blob is None else narrow_int32(blob)[1]
        for blob in (answer.token_ids, answer.kept_counts, answer.kept_ids)
    )
    return seq, answer.choice_index, answer.n_tokens, ids, answer.logprobs, answer.message, *kept
