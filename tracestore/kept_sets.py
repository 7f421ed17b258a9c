"""Kept sets as they lie: of each sampled token the ids that top-p, top-k or min-p left, counted and then one by one.

Both columns are token ids narrowed as `codec` narrows them. Raises ValueError for bytes that are no such sets.
Called by `drafts`, `traces`, `diagnosis_payloads` and `kept_check`.
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
    if counts is None and ids is None:
        return None, None
    if counts is None or ids is None:
        raise ValueError("kept ids and their counts are not there together")
    wide = widened(counts, n_tokens)
    return wide, widened(ids, _total(wide))


def are_counted(counts: bytes | None, ids_bytes: int | None, n_tokens: int) -> bool:
    """Whether narrowed ids of so many bytes (None: there are none) can be what the counts of so many tokens say."""
    if counts is None or ids_bytes is None:
        return counts is None and ids_bytes is None
    try:
        total = _total(widened(counts, n_tokens))
    except ValueError:
        return False
    return ids_bytes in (2 * total, 3 * total, 4 * total)


def sets_of(counts: bytes | None, ids: bytes | None, n_tokens: int) -> Sets | None:
    """Return the sets of a stored choice, None where it has none."""
    wide, flat = widened_sets(counts, ids, n_tokens)
    if wide is None or flat is None:
        return None
    every = decode_int32(flat)
    return tuple(every[start:end] for start, end in pairwise(accumulate(decode_int32(wide), initial=0)))


def _total(wide: bytes) -> int:
    """Return how many ids counts, as int32, say there are."""
    counts = decode_int32(wide)
    if min(counts, default=0) < 0:
        raise ValueError(f"a set of {min(counts)} kept ids")
    return sum(counts)
