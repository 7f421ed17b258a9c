"""Whether the blocks of prompts are what their hashes say, and prompts as long as their calls count them.

Reads page by page, each page a snapshot, so that memory is bounded and a long check holds nobody back. A block is
hashed again from the hash before it: one that is sound, behind sound ones, is what was appended, and of its project.
Called by `upkeep`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import select

from tracegrad.tracestore.chains import IDS_A_UNIT, TEXT, hashes_after, root_hash, units_of_block
from tracegrad.tracestore.database import Database
from tracegrad.tracestore.payload_schema import blocks, call_payloads
from tracegrad.tracestore.payloads import sound_payloads_of
from tracegrad.tracestore.schema import calls

_PAGE = 400
_EXAMPLES = 5
Found = tuple[str, int, tuple[str, ...]]
_before = blocks.alias("before")
_CHAINED = (
    select(blocks, _before.c.hash.label("hash_before"), _before.c.coding.label("coding_before"))
    .outerjoin(_before, _before.c.block_id == blocks.c.parent_id)
    .order_by(blocks.c.block_id)
    .limit(_PAGE)
)
_PROMPTS = select(call_payloads.c.seq, calls.c.call_id).join(calls, calls.c.seq == call_payloads.c.seq)
_PROMPTS = _PROMPTS.order_by(call_payloads.c.seq).limit(_PAGE)


def chains_checked(database: Database, heard: Callable[[str], None]) -> Iterator[Found]:
    """Hash every block again; yield what is wrong, with how many and some of their ids."""
    what = "prompts that are not what their hash says"
    heard(what)
    wrong: list[int] = []
    last = 0
    while True:
        with database.read() as connection:
            rows = connection.execute(_CHAINED.where(blocks.c.block_id > last)).all()
        if not rows:
            break
        last = rows[-1].block_id
        wrong += [row.block_id for row in rows if not _is_sound(row)]
    if wrong:
        yield what, len(wrong), tuple(map(str, wrong[:_EXAMPLES]))


def _is_sound(row: Any) -> bool:
    is_text = row.coding == TEXT
    if row.parent_id is None:
        before = root_hash(row.project, is_text=is_text)
    elif row.hash_before is None or (row.coding_before == TEXT) is not is_text:
        return False
    else:
        before = bytes(row.hash_before)
    try:
        units = units_of_block(row.coding, bytes(row.content))
    except ValueError:
        return False
    items = len(units) * (1 if is_text else IDS_A_UNIT)
    return items == row.n_items and bool(units) and hashes_after(before, units)[-1] == bytes(row.hash)


def prompts_checked(database: Database, heard: Callable[[str], None]) -> Iterator[Found]:
    """Put every prompt together; yield what cannot be, with how many and some of their calls."""
    what = "prompts that cannot be put together as they are counted"
    heard(what)
    wrong: list[str] = []
    last = 0
    while True:
        with database.read() as connection:
            rows = connection.execute(_PROMPTS.where(call_payloads.c.seq > last)).all()
            _, broken = sound_payloads_of(connection, [row.seq for row in rows])
        if not rows:
            break
        last = rows[-1].seq
        wrong += [row.call_id for row in rows if row.seq in broken]
    if wrong:
        yield what, len(wrong), tuple(wrong[:_EXAMPLES])
