"""Which earlier call a call goes on from, as its prompt tells: the one whose prompt is the longest beginning of it.

Nothing is stored for this: a prompt's hashes name every beginning of it, and calls name the block theirs ends with.
By token ids where both have a whole unit of them, else by messages (and tools) where both are large enough to be cut.
`Call.continues` is what the proxy knew while it served; this is what the store can say of any call, imported ones too.
Looks at the newest SAME_HEAD calls of a beginning, those of the same run first. Read only. Called through `Store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, select

from tracegrad.tracestore.chains import IDS_A_UNIT, chain_of, cut, units_of_ids
from tracegrad.tracestore.codec import widened
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.paths import paths_of
from tracegrad.tracestore.payload_schema import call_payloads
from tracegrad.tracestore.payloads import Payload, payloads_of
from tracegrad.tracestore.schema import calls

SAME_HEAD = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainParent:
    """The earlier call, and how much of the prompt is its: so many token ids, or messages and other large values."""

    call_id: str
    by: Literal["ids", "text"]
    shared: int


class Parents(Noun):
    """The part of the store that knows what prompts have in common."""

    def parent_call(self, call_id: str) -> ChainParent | None:
        """Return the earlier call whose whole prompt is the longest beginning of this one's; None: there is none.

        Of several with the same prompt the newest of the same run, else the newest. Equal prompts count: samples of one
        prompt are each other's beginning. Raises NotFound, also for a call whose content was deleted.
        """
        with self._db.read() as connection:
            columns = (calls.c.seq, calls.c.run_id, calls.c.project)
            row = connection.execute(select(*columns).where(calls.c.call_id == call_id)).one_or_none()
            payload = None if row is None else payloads_of(connection, [row.seq]).get(row.seq)
            if row is None or payload is None:
                raise NotFound(
                    f"no call {call_id!r}, or its content was deleted: `find_call` knows completion ids as well"
                )
            return _by_ids(connection, row, payload) or _by_text(connection, row, payload)


def _by_ids(connection: Connection, call: Any, payload: Payload) -> ChainParent | None:
    prompt = payload.prompt or b""
    units, _ = units_of_ids(prompt)
    for depth, head in _stored(connection, call.project, units, is_text=False):
        rest = prompt[4 * IDS_A_UNIT * depth :]
        found = []
        for other in _with_head(connection, call_payloads.c.ids_head, head, call):
            tail = widened(other.tail, other.n_prompt - other.n_chained)
            if rest.startswith(tail):
                found.append((len(tail), other))
        if found:
            _, longest = max(found, key=lambda one: one[0])  # the first of equals
            return ChainParent(call_id=longest.call_id, by="ids", shared=longest.n_prompt)
    return None


def _by_text(connection: Connection, call: Any, payload: Payload) -> ChainParent | None:
    units = cut(payload.request).units
    for depth, head in _stored(connection, call.project, units, is_text=True):
        for other in _with_head(connection, call_payloads.c.text_head, head, call):
            return ChainParent(call_id=other.call_id, by="text", shared=depth)
    return None


def _stored(connection: Connection, project: str, units: Sequence[bytes], *, is_text: bool) -> list[tuple[int, int]]:
    """Return the stored blocks that end where a unit of the prompt does, deepest first: how many units, and its id."""
    chains = [chain_of(project, units, is_text=is_text)] if units else []
    return sorted((at for path in paths_of(connection, chains) for at in path.blocks), reverse=True)


def _with_head(connection: Connection, column: Any, head: int, call: Any) -> Sequence[Any]:
    same_run = calls.c.run_id.is_not_distinct_from(call.run_id)
    payload = (call_payloads.c.tail, call_payloads.c.n_prompt, call_payloads.c.n_chained)
    return connection.execute(
        select(calls.c.call_id, *payload)
        .join_from(call_payloads, calls, calls.c.seq == call_payloads.c.seq)
        .where(column == head, call_payloads.c.seq < call.seq)
        .order_by(same_run.desc(), call_payloads.c.seq.desc())
        .limit(SAME_HEAD)
    ).all()
