"""Prompts into blocks: what is stored already is found (`paths`), what is new becomes as few blocks as it can.

A chain is looked up from its deepest known hash on; the rest of it becomes one block (at most UNITS_A_BLOCK units).
Where a chain leaves another in the middle of a block, the part that both have becomes a block of its own, beside the
longer one: blocks never change, so nobody waits for a reader and a head means the same for ever. That part lies twice
then, once for each place at which chains part; what follows shares it.

A block that was deleted since it was remembered ends in a constraint of the database: `KnownBlocks.write_with` then
tries again from the start. Two writers of PostgreSQL may both store what neither found; that costs room and nothing
else. Its sweeps and appends exclude each other by an advisory lock (`SWEEP_LOCK`). Called by `calls` and `interchange`
through `drafts`.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy import Connection, bindparam, func, select

from tracegrad.tracestore.chains import IDS_A_UNIT, Chain, content_of, first_word
from tracegrad.tracestore.database import Database
from tracegrad.tracestore.errors import KeyTaken, MissingRow, TransactionRollback
from tracegrad.tracestore.hot import HotInsert, HotStatement, run_hot, run_insert
from tracegrad.tracestore.paths import Forks, forks_of, paths_of
from tracegrad.tracestore.payload_schema import blocks
from tracegrad.tracestore.schema import calls
from tracegrad.tracestore.serials import Serials

UNITS_A_BLOCK = 64
_REMEMBERED = 20_000
_ATTEMPTS = 8
SWEEP_LOCK = 0x7377656570  # "sweep"
_INSERT = HotInsert(blocks, "block_id", "parent_id", "first", "n_items", "coding", "hash", "project", "content")
_SHARED = HotStatement(select(func.pg_advisory_xact_lock_shared(bindparam("key"))), "key")


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

    def write_with(
        self, database: Database, work: "Callable[[Connection, KnownBlocks, bool], Mapping[bytes, int]]"
    ) -> None:
        """Do `work` in one transaction, again from the start where a block is gone, a call has come, or for a deadlock.

        `work` is handed what it may believe and whether this is another attempt, and returns the blocks it used.
        Raises what `Database.write` does.
        """
        for attempt in range(_ATTEMPTS):
            try:
                with database.write() as connection:
                    used = work(connection, self if attempt == 0 else KnownBlocks(), attempt > 0)
            except MissingRow:  # a block, perhaps: what was found, and not remembered, cannot go before the commit
                if attempt:
                    raise
                self.forget()
            except TransactionRollback:
                if attempt + 1 == _ATTEMPTS:
                    raise
            except KeyTaken as error:
                if error.table != calls.name or attempt + 1 == _ATTEMPTS:
                    raise
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
    """What one transaction stores: new blocks by the hash of their first unit; stored ones are known by their own."""

    partly: Forks
    new: dict[bytes, _New] = field(default_factory=dict)
    stored: dict[bytes, int] = field(default_factory=dict)


def store_chains(
    connection: Connection, chains: Sequence[Chain], known: KnownBlocks, serials: Serials
) -> tuple[list[int], dict[bytes, int]]:
    """Return the id of the last block of each chain, and what is worth remembering once this is committed."""
    if not chains:
        return [], {}
    if connection.dialect.name == "postgresql":
        run_hot(connection, _SHARED, [(SWEEP_LOCK,)])
    paths = paths_of(connection, chains, known)
    plan = _Plan(forks_of(connection, paths))
    heads = []
    for path in paths:
        depth, block_id = path.deepest
        if depth:
            plan.stored[path.chain.hashes[depth - 1]] = block_id
        heads.append(_grow(plan, path.chain, depth))
    _insert(connection, plan.new.values(), serials)
    ids = [head if isinstance(head, int) else head.block_id for head in heads]
    used = {chain.hashes[-1]: block_id for chain, block_id in zip(chains, ids, strict=True)}
    return ids, {**plan.stored, **{one.hash: one.block_id for one in plan.new.values()}, **used}


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


def _insert(connection: Connection, new: Collection[_New], serials: Serials) -> None:
    """Write parents before children."""
    if not new:
        return
    ordered = sorted(new, key=lambda one: one.begin)
    for one, block_id in zip(ordered, serials.take(blocks.name, len(ordered)), strict=True):
        one.block_id = block_id
    run_insert(connection, _INSERT, [_row(one) for one in ordered])


def _row(one: _New) -> tuple[Any, ...]:
    chain = one.chain
    n_items = (1 if chain.is_text else IDS_A_UNIT) * (one.end - one.begin)
    parent_id = one.parent.block_id if isinstance(one.parent, _New) else one.parent
    project = chain.project if one.parent is None else None
    coding, content = content_of(chain.units[one.begin : one.end], is_text=chain.is_text)
    return one.block_id, parent_id, first_word(one.first), n_items, coding, one.hash, project, content
