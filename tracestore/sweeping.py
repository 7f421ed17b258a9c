"""Blocks of prompts after calls were deleted: what nothing names any more goes as well.

From the heads of the deleted calls upwards, as long as no call and no other block names a block: that costs what was
deleted, not what is stored. Nobody begins to share a block meanwhile: SQLite has one writer, and on PostgreSQL appends
wait for the end of the sweeping transaction (see `blocks`), which sweeps last. Called by `removal`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, not_, select, text, union

from tracegrad.tracestore.blocks import SWEEP_LOCK
from tracegrad.tracestore.payload_schema import blocks, call_payloads

_AT_ONCE = 400
_HEADS = (call_payloads.c.ids_head, call_payloads.c.text_head)
_child = blocks.alias("child")
_UNNAMED = (
    not_(exists().where(_child.c.parent_id == blocks.c.block_id)),
    *(not_(exists().where(head == blocks.c.block_id)) for head in _HEADS),
)


def heads_of(connection: Connection, within: ColumnElement[bool]) -> set[int]:
    """Return the last blocks of the prompts of the payloads that `within` selects."""
    heads = [select(one.label("head")).where(within, one.is_not(None)) for one in _HEADS]
    return set(connection.execute(union(*heads)).scalars())


def sweep(connection: Connection, heads: Iterable[int]) -> int:
    """Delete these blocks and those before them that nothing names, last in a transaction; return how many."""
    candidates = set(heads)
    if candidates and connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SWEEP_LOCK})
    done = 0
    while candidates:
        found: list[Any] = []
        for some in _parts(sorted(candidates)):
            named = select(blocks.c.block_id, blocks.c.parent_id).where(blocks.c.block_id.in_(some), *_UNNAMED)
            found += connection.execute(named).all()
        for some in _parts([row.block_id for row in found]):
            connection.execute(delete(blocks).where(blocks.c.block_id.in_(some)))
        done += len(found)
        candidates = {row.parent_id for row in found if row.parent_id is not None}
    return done


def unnamed(connection: Connection, heads: Iterable[int]) -> int:
    """Count those of these blocks that are there and that nothing names."""
    count = 0
    for some in _parts(sorted(heads)):
        count += len(connection.execute(select(blocks.c.block_id).where(blocks.c.block_id.in_(some), *_UNNAMED)).all())
    return count


def _parts(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE)]
