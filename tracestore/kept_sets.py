"""Kept sets as they lie: of each sampled token the ids that top-p, top-k or min-p left, counted and then one by one.

Both columns are token ids narrowed as `codec` narrows them. Raises ValueError for bytes that are no such sets.
Called by `drafts` and `traces`.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

from tracegrad.tracestore.codec import decode_int32, encode_int32, widened

Sets = tuple[tuple[int, ...], ...]


def encode_sets(kept: Sequence[Sequence[int]] | None) -> tuple[bytes | None, bytes | None]:
    """Return (counts, ids) as int32. Raises InvalidRecord for an id outside int32."""
    if kept is None:
        return None, None
    return encode_int32([len(ids) for ids in kept]), encode_int32([*chain.from_iterable(kept)])


def widened_sets(counts: bytes | None, ids: bytes | None, n_tokens: int) -> tuple[bytes | None, bytes | None]:
    """Return the int32 of narrowed (counts, ids) of so many tokens."""
    if counts is None or ids is None:
        return None, None
    wide = widened(counts, n_tokens)
    return wide, widened(ids, sum(decode_int32(wide)))


def sets_of(counts: bytes | None, ids: bytes | None, n_tokens: int) -> Sets | None:
    """Return the sets of a stored choice, None where it has none."""
    wide, flat = widened_sets(counts, ids, n_tokens)
    if wide is None or flat is None:
        return None
    every = decode_int32(flat)
    return tuple(every[start:end] for start, end in pairwise(accumulate(decode_int32(wide), initial=0)))
