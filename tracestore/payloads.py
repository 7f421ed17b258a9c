"""What calls were asked, put together again from their rows and the blocks of their prompts.

Every distinct block that the asked-for calls need is read once; memory is bounded by what is asked for at once.
Raises TraceStoreError where a chain is broken (`tracegrad store check` says where). Read only. Called by whoever gives
calls back: `traces`, `continued`, `interchange`, `diagnosis_payloads`, and by `calls` to compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Text, bindparam, func, select, type_coerce

from tracegrad.tracestore.chains import paste, plain_of
from tracegrad.tracestore.codec import decode_int32, decode_json, widened
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.payload_schema import blocks, call_payloads

_AT_ONCE = 400
_B = blocks.c
_UP = select(_B.block_id, _B.parent_id).where(_B.block_id.in_(bindparam("ids", expanding=True))).cte(recursive=True)
_UP = _UP.union(select(_B.block_id, _B.parent_id).join(_UP, _B.block_id == _UP.c.parent_id))
_REACHED = select(_B.block_id, _B.parent_id, _B.coding, _B.content).join(_UP, _UP.c.block_id == _B.block_id)
_SIZES = select(_B.block_id, _B.parent_id, func.length(_B.content).label("size")).join(
    _UP, _UP.c.block_id == _B.block_id
)
_ROWS = select(
    *(call_payloads.c[name] for name in ("seq", "ids_head", "text_head", "n_prompt", "n_chained", "tail", "places")),
    call_payloads.c.request,
    type_coerce(call_payloads.c.requested, Text).label("requested"),
    type_coerce(call_payloads.c.effective, Text).label("effective"),
).where(call_payloads.c.seq.in_(bindparam("seqs", expanding=True)))


@dataclass(frozen=True, slots=True)
class Payload:
    """A call's payload as it was appended: token ids as int32, JSON as its text (the request in UTF-8)."""

    n_prompt: int | None
    prompt: bytes | None
    request: bytes
    requested: str
    effective: str

    @property
    def prompt_ids(self) -> tuple[int, ...] | None:
        """The token ids."""
        return None if self.prompt is None else decode_int32(self.prompt)

    @property
    def request_json(self) -> Any:
        """The request as a value of its own."""
        return decode_json(self.request)


def payloads_of(connection: Connection, seqs: Sequence[int]) -> dict[int, Payload]:
    """Return the payloads of these calls by their number; those of stubs are missing.

    Raises:
        TraceStoreError: one cannot be put together.
    """
    found, broken = sound_payloads_of(connection, seqs)
    if broken:
        seq, why = next(iter(broken.items()))
        raise unreadable(f"what call number {seq} was asked", why)
    return found


def unreadable(what: str, why: object) -> TraceStoreError:
    """Return the error of whoever is to give back what is broken."""
    return TraceStoreError(f"{what} cannot be put together ({why}): run `tracegrad store check`")


def sound_payloads_of(connection: Connection, seqs: Sequence[int]) -> tuple[dict[int, Payload], dict[int, str]]:
    """As `payloads_of`; the second is why those are missing that cannot be put together."""
    found: dict[int, Payload] = {}
    broken: dict[int, str] = {}
    reader = ChainReader(connection)
    for start in range(0, len(seqs), _AT_ONCE):
        some = seqs[start : start + _AT_ONCE]
        rows = connection.execute(_ROWS, {"seqs": some}).all()
        reader.load({head for row in rows for head in (row.ids_head, row.text_head) if head is not None})
        for row in rows:
            try:
                found[row.seq] = _payload(reader, row)
            except ValueError as error:
                broken[row.seq] = str(error)
    return found, broken


def _payload(reader: "ChainReader", row: Any) -> Payload:
    prompt = None
    if row.tail is not None:
        chained = b"" if row.ids_head is None else reader.ids(row.ids_head)
        prompt = chained + widened(row.tail, row.n_prompt - row.n_chained)
        if len(prompt) != 4 * row.n_prompt:
            raise ValueError(f"{row.n_prompt} token ids are counted, {len(prompt) // 4} are there")
    request = row.request.encode()
    if row.text_head is not None:
        request = paste(request, row.places, reader.text(row.text_head))
    return Payload(row.n_prompt, prompt, request, row.requested, row.effective)


def sizes_above(connection: Connection, heads: set[int]) -> dict[int, tuple[int | None, int]]:
    """Return the blocks of these chains: the one before each, and its bytes."""
    found: dict[int, tuple[int | None, int]] = {}
    wanted = sorted(heads)
    for start in range(0, len(wanted), _AT_ONCE):
        for row in connection.execute(_SIZES, {"ids": wanted[start : start + _AT_ONCE]}):
            found[row.block_id] = row.parent_id, row.size
    return found


class ChainReader:
    """Blocks that were read, and what chains of them say. Raises ValueError for what is missing or broken."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._parents: dict[int, int | None] = {}
        self._packed: dict[int, tuple[int, bytes]] = {}
        self._plain: dict[int, bytes] = {}

    def load(self, heads: set[int]) -> None:
        """Read the chains that end with these blocks, as far as they are not here."""
        wanted = sorted(heads - self._parents.keys())
        for start in range(0, len(wanted), _AT_ONCE):
            for row in self._connection.execute(_REACHED, {"ids": wanted[start : start + _AT_ONCE]}).all():
                if row.block_id not in self._parents:
                    self._parents[row.block_id] = row.parent_id
                    self._packed[row.block_id] = row.coding, row.content

    def ids(self, head: int) -> bytes:
        """Return the token ids of a chain as int32."""
        return b"".join(self._parts(head))

    def text(self, head: int) -> bytes:
        """Return the items of a chain with commas between them."""
        return b",".join(self._parts(head))

    def _parts(self, head: int) -> list[bytes]:
        parts: list[bytes] = []
        at: int | None = head
        while at is not None:
            parts.append(self._part(at))
            at = self._parents[at]
        parts.reverse()
        return parts

    def _part(self, block_id: int) -> bytes:
        if (packed := self._packed.pop(block_id, None)) is not None:
            self._plain[block_id] = plain_of(*packed)
        if (plain := self._plain.get(block_id)) is None:
            raise ValueError(f"block {block_id} is missing or broken")
        return plain
