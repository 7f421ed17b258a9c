"""Prompts into blocks: what is stored already is found by its hash, what is new becomes as few blocks as it can.

A chain is looked up from its deepest known hash on; the rest of it becomes one block (at most UNITS_A_BLOCK units).
Where a chain leaves another in the middle of a block, the part that both have becomes a block of its own, beside the
longer one: blocks never change, so nobody waits for a reader and a head means the same for ever. That part lies twice
then, once for each place at which chains part; what follows shares it.

Two writers of one chain, and a block that was deleted since it was remembered, end in a constraint of the database:
`KnownBlocks.write_with` then tries again from the start. PostgreSQL's sweeps and appends exclude each other by an
advisory lock (`SWEEP_LOCK`). Called by `calls` and `interchange` through `drafts`.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, text

from tracegrad.tracestore.chains import IDS_A_UNIT, Chain, content_of, first_word, hashes_after, units_of_block
from tracegrad.tracestore.database import Database
from tracegrad.tracestore.errors import Conflict, InvalidRecord, TraceStoreError
from tracegrad.tracestore.hot import HotLookup, HotStatement, look_up, run_hot
from tracegrad.tracestore.payload_schema import blocks

UNITS_A_BLOCK = 64
_REMEMBERED = 20_000
_ATTEMPTS = 8
SWEEP_LOCK = 0x7377656570  # "sweep"
_B = blocks.c
_BY_HASH = HotLookup(select(_B.hash, _B.block_id), _B.hash)
_PLACE = (_B.block_id, _B.hash)
_ROOTS = HotLookup(select(*_PLACE, _B.first).where(_B.parent_id.is_(None)), _B.first)
_CHILDREN = HotLookup(select(*_PLACE, _B.parent_id, _B.first), _B.parent_id, _B.first)
_CONTENTS = HotLookup(select(*_PLACE, _B.coding, _B.content), _B.block_id)
_INSERT = HotStatement(blocks.insert())
_SHARED = HotStatement(select(func.pg_advisory_xact_lock_shared(bindparam("key"))))
_NEXT = HotStatement(
    text("SELECT nextval(CAST(pg_get_serial_sequence(:name, :key) AS regclass)) FROM generate_series(1, :count)")
)
_LAST = {
    table: HotStatement(
        text(
            "SELECT max(COALESCE((SELECT seq FROM sqlite_sequence WHERE name = :name), 0),"
            f" COALESCE((SELECT max({key}) FROM {table}), 0))"
        )
    )
    for table, key in (("calls", "seq"), ("blocks", "block_id"))
}
"""As AUTOINCREMENT counts: on from the highest id that was ever given, or is there."""


class KnownBlocks:
    """What a process remembers of stored blocks: hash -> id, the last used ones. A hint, never the truth."""

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._ids: dict[bytes, int] = {}
        self._most = most
        self._lock = threading.Lock()

    def deepest(self, hashes: Sequence[bytes]) -> tuple[int, int]:
        """Return how many units of a chain end with a known block at most, and that block's id; (0, 0): none."""
        for count in range(len(hashes), 0, -1):
            if (block_id := self._ids.get(hashes[count - 1])) is not None:
                return count, block_id
        return 0, 0

    def remember(self, used: Mapping[bytes, int]) -> None:
        """Take over what a committed transaction used."""
        with self._lock:
            for its_hash, block_id in used.items():
                self._ids.pop(its_hash, None)
                self._ids[its_hash] = block_id
            for oldest in list(islice(self._ids, max(len(self._ids) - self._most, 0))):
                del self._ids[oldest]

    def forget(self) -> None:
        """Blocks were deleted, or one was not there."""
        with self._lock:
            self._ids.clear()

    def write_with(self, database: Database, work: "Callable[[Connection, KnownBlocks], Mapping[bytes, int]]") -> None:
        """Do `work` in one transaction, from the start again where a block is not what was remembered or found.

        `work` is handed what it may believe, and returns the blocks it used. Raises what `Database.write` does.
        """
        for attempt in range(_ATTEMPTS):
            try:
                with database.write() as connection:
                    used = work(connection, self if attempt == 0 else KnownBlocks())
            except (InvalidRecord, Conflict) as error:
                if not _is_stale(error, attempt):
                    raise
                self.forget()
            else:
                self.remember(used)
                return


@dataclass(slots=True)
class _New:
    """A block to be written. `parent` is the id of a stored one or another new one."""

    chain: Chain
    begin: int
    end: int
    parent: "int | _New | None"
    block_id: int = 0

    @property
    def first(self) -> bytes:
        return self.chain.hashes[self.begin]

    @property
    def hash(self) -> bytes:
        return self.chain.hashes[self.end - 1]


Head = int | _New


@dataclass(slots=True)
class _Plan:
    """What one transaction stores: new blocks by the hash of their first unit, stored ones by that and by their own."""

    new: dict[bytes, _New] = field(default_factory=dict)
    stored: dict[bytes, int] = field(default_factory=dict)
    partly: dict[bytes, list[list[bytes]]] = field(default_factory=dict)
    """Hash of the first unit -> the hashes of all units, of stored blocks that begin so and go another way."""


def store_chains(
    connection: Connection, chains: Sequence[Chain], known: KnownBlocks
) -> tuple[list[int], dict[bytes, int]]:
    """Return the id of the last block of each chain, and what is worth remembering once this is committed."""
    if not chains:
        return [], {}
    if connection.dialect.name == "postgresql":
        run_hot(connection, _SHARED, [{"key": SWEEP_LOCK}])
    plan = _Plan()
    anchors = _look_for(connection, chains, known, plan)
    heads = [_grow(plan, chain, at) for chain, at in zip(chains, anchors, strict=True)]
    _insert(connection, plan.new.values())
    ids = [head if isinstance(head, int) else head.block_id for head in heads]
    used = {chain.hashes[-1]: block_id for chain, block_id in zip(chains, ids, strict=True)}
    return ids, {**plan.stored, **{one.hash: one.block_id for one in plan.new.values()}, **used}


def _is_stale(error: TraceStoreError, attempt: int) -> bool:
    """Whether a transaction may have failed for a block that somebody deleted or wrote meanwhile."""
    told = str(error)
    return attempt + 1 < _ATTEMPTS and ("blocks" in told or (attempt == 0 and "FOREIGN KEY" in told))


def serials(connection: Connection, table: str, key: str, count: int) -> Iterable[int]:
    """Return ids that no row of the table has or had, for explicit inserts of this transaction."""
    if connection.dialect.name == "sqlite":  # the only writer
        begin = run_hot(connection, _LAST[table], [{"name": table}])[0][0] + 1
        return range(begin, begin + count)
    return [row[0] for row in run_hot(connection, _NEXT, [{"name": table, "key": key, "count": count}])]


def _look_for(connection: Connection, chains: Sequence[Chain], known: KnownBlocks, plan: _Plan) -> list[int]:
    """Fill the plan with what is stored of the chains; return how many units of each are known at most."""
    remembered = []
    for chain in chains:
        depth, block_id = known.deepest(chain.hashes)
        remembered.append(depth)
        if depth:
            plan.stored[chain.hashes[depth - 1]] = block_id
    firsts = {first_word(chain.hashes[0]) for chain, depth in zip(chains, remembered, strict=True) if not depth}
    roots = look_up(connection, _ROOTS, sorted(firsts)) if firsts else []
    begun = {row[2] for row in roots}
    wanted = {
        unit
        for chain, depth in zip(chains, remembered, strict=True)
        if depth or first_word(chain.hashes[0]) in begun
        for unit in chain.hashes[depth:]
    }
    plan.stored.update(look_up(connection, _BY_HASH, sorted(wanted)) if wanted else ())
    anchors = []
    for chain, depth in zip(chains, remembered, strict=True):
        deeper = (n for n in range(len(chain.hashes), depth, -1) if chain.hashes[n - 1] in plan.stored)
        anchors.append(next(deeper, depth))
    _look_for_forks(connection, chains, anchors, plan, roots)
    return anchors


def _look_for_forks(
    connection: Connection, chains: Sequence[Chain], anchors: Sequence[int], plan: _Plan, roots: list[Any]
) -> None:
    """Note the stored blocks that begin as the unknown rest of a chain does, and then go another way."""
    open_ends: dict[tuple[int | None, int], tuple[Chain, int]] = {}
    for chain, at in zip(chains, anchors, strict=True):
        if at < len(chain.hashes):
            parent = plan.stored[chain.hashes[at - 1]] if at else None
            open_ends[parent, first_word(chain.hashes[at])] = (chain, at)
    found = [(row[0], row[1], None, row[2]) for row in roots]
    children = sorted((parent, first) for parent, first in open_ends if parent is not None)
    found += look_up(connection, _CHILDREN, children) if children else []
    candidates = {row[0]: open_ends[row[2], row[3]] for row in found if (row[2], row[3]) in open_ends}
    for block_id, its_hash, coding, content in look_up(connection, _CONTENTS, sorted(candidates)) if candidates else ():
        chain, at = candidates[block_id]
        hashes = hashes_after(chain.before(at), units_of_block(coding, bytes(content)))
        if hashes[-1] == bytes(its_hash):
            plan.partly.setdefault(hashes[0], []).append(hashes)


def _grow(plan: _Plan, chain: Chain, at: int) -> Head:
    """Add what is missing of a chain from unit `at` on; return its last block."""
    hashes = chain.hashes
    head: Head | None = plan.stored[hashes[at - 1]] if at else None
    while at < len(hashes):
        other = plan.new.get(hashes[at])
        if other is not None:
            theirs = other.chain.hashes[other.begin : other.end]
            if (common := _common(hashes, at, theirs)) < len(theirs):
                other = _parted(plan, other, common)
            head, at = other, at + common
            continue
        end = min(len(hashes), at + UNITS_A_BLOCK)
        shared = max((_common(hashes, at, theirs) for theirs in plan.partly.get(hashes[at], ())), default=0)
        made = _New(chain, at, at + shared if shared else end, head)
        plan.new[hashes[at]] = made
        head, at = made, made.end
    assert head is not None
    return head


def _common(hashes: Sequence[bytes], at: int, theirs: Sequence[bytes]) -> int:
    """How many of their units are ours from `at` on. (Hashes of chains, once different, stay so.)"""
    most = min(len(hashes) - at, len(theirs))
    return next((n for n in range(most) if hashes[at + n] != theirs[n]), most)


def _parted(plan: _Plan, longer: _New, common: int) -> _New:
    """Part a block that is not written yet: what named it goes on to name its end."""
    upper = _New(longer.chain, longer.begin, longer.begin + common, longer.parent)
    plan.new[upper.first] = upper
    longer.begin, longer.parent = upper.end, upper
    plan.new[longer.first] = longer
    return upper


def _insert(connection: Connection, new: Iterable[_New]) -> None:
    """Write parents before children, and what several writers write in the same order, so that none waits in a ring."""
    ordered = sorted(new, key=lambda one: (one.begin, one.hash))
    if not ordered:
        return
    for one, block_id in zip(ordered, serials(connection, "blocks", "block_id", len(ordered)), strict=True):
        one.block_id = block_id
    run_hot(connection, _INSERT, [_row(one) for one in ordered])


def _row(one: _New) -> dict[str, Any]:
    chain = one.chain
    coding, content = content_of(chain.units[one.begin : one.end], is_text=chain.is_text)
    length = 1 if chain.is_text else IDS_A_UNIT
    return {
        "block_id": one.block_id,
        "parent_id": one.parent.block_id if isinstance(one.parent, _New) else one.parent,
        "first": first_word(one.first),
        "n_items": length * (one.end - one.begin),
        "coding": coding,
        "hash": one.hash,
        "project": chain.project if one.parent is None else None,
        "content": content,
    }
