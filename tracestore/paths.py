"""What is stored of a chain: from its root down, block by block, for all chains of a transaction at once.

A block is found by the block before it and four bytes of the hash of its first unit, and known by the hash at its end.
No index over whole hashes is kept: they are random, and such an index would cost an append more than all others.
Where two writers of PostgreSQL stored the same block at the same moment, either is found. A chain whose beginning is
remembered is looked for from there on. Read only. Called by `blocks` and `parents`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import Connection, select

from tracegrad.tracestore.chains import Chain, first_word, hashes_after, units_of_block
from tracegrad.tracestore.hot import HotLookup, look_up
from tracegrad.tracestore.payload_schema import blocks

_B = blocks.c
_ROOTS = HotLookup(select(_B.parent_id, _B.first, _B.block_id, _B.hash).where(_B.parent_id.is_(None)), _B.first)
_CHILDREN = HotLookup(select(_B.parent_id, _B.first, _B.block_id, _B.hash), _B.parent_id, _B.first)
_CONTENTS = HotLookup(select(_B.block_id, _B.hash, _B.coding, _B.content), _B.block_id)
Forks = dict[bytes, list[list[bytes]]]
"""Hash of the first unit -> the hashes of all units, of stored blocks that begin so and go another way."""
_Place = tuple[int | None, int]
"""A block and the first word of what comes after it."""


class Remembered(Protocol):
    """What a process knows without asking: see `blocks.KnownBlocks`."""

    def deepest(self, hashes: Sequence[bytes]) -> tuple[int, int]:
        """Return how many units of a chain end with a known block at most, and its id; (0, 0): none."""
        ...


@dataclass(slots=True)
class Path:
    """A chain and the stored blocks that end inside of it: how many units with each, and its id."""

    chain: Chain
    blocks: list[tuple[int, int]] = field(default_factory=list)
    begun: list[tuple[int, int]] = field(default_factory=list)
    """The stored blocks that begin as the chain goes on there and end elsewhere: after how many units, and the id."""

    @property
    def deepest(self) -> tuple[int, int]:
        """The last of these blocks; (0, 0): there is none."""
        return max(self.blocks, default=(0, 0))


def paths_of(connection: Connection, chains: Iterable[Chain], known: Remembered | None = None) -> list[Path]:
    """Look for the chains, from where they are `known`; one statement for each block of the longest."""
    paths = [Path(chain) for chain in chains]
    if known is not None:
        for path in paths:
            if (at := known.deepest(path.chain.hashes))[0]:
                path.blocks.append(at)
    ends = [(path, *path.deepest) for path in paths]
    while ends:
        open_ends: dict[_Place, list[tuple[Path, int]]] = {}
        for path, depth, block_id in ends:
            if depth < len(path.chain.hashes):
                place = (block_id if depth else None, first_word(path.chain.hashes[depth]))
                open_ends.setdefault(place, []).append((path, depth))
        ends = []
        for parent_id, first, block_id, its_hash in _after(connection, open_ends):
            for path, depth in open_ends[parent_id, first]:
                try:
                    deeper = path.chain.hashes.index(bytes(its_hash), depth) + 1
                except ValueError:
                    path.begun.append((depth, block_id))
                else:
                    path.blocks.append((deeper, block_id))
                    ends.append((path, deeper, block_id))
    return paths


def _after(connection: Connection, places: Iterable[_Place]) -> Iterator[Any]:
    roots = sorted(first for parent_id, first in places if parent_id is None)
    children = sorted(place for place in places if place[0] is not None)
    for hot, wanted in ((_ROOTS, roots), (_CHILDREN, children)):
        if wanted:
            yield from look_up(connection, hot, wanted)


def forks_of(connection: Connection, paths: Iterable[Path]) -> Forks:
    """Return the stored blocks that begin as the unknown rest of a path does, and then go another way."""
    candidates = {}
    for path in paths:
        depth, _ = path.deepest
        candidates.update({block_id: (path.chain, at) for at, block_id in path.begun if at == depth})
    found: Forks = {}
    for block_id, its_hash, coding, content in look_up(connection, _CONTENTS, sorted(candidates)) if candidates else ():
        chain, at = candidates[block_id]
        hashes = hashes_after(chain.before(at), units_of_block(coding, bytes(content)))
        if hashes[-1] == bytes(its_hash):
            found.setdefault(hashes[0], []).append(hashes)
    return found
