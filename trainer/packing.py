"""Packing: choices laid into rows as prefix trees, so that a shared context is computed once (law 5).

Every choice contributes the context it was sampled in (prompt, then its own tokens but the last) and one edge per
sampled token. Contexts merge where token ids are exactly equal from the start; edges never merge: two identical
answers stay two sets of edges over the same nodes. A row is the depth-first pre-order of its tree, so that
"j is i or an ancestor of i" is ``j <= i < end[j]``. Refused: a choice without context, a kept set
without its token. Called by `batches`.

How: distinct contexts in lexicographic order are the depth-first order of their trie, and neighbours share exactly
their common prefix. Cutting the order into rows costs the common prefix at the cut, computed again; the cuts are
chosen by dynamic programming to be cheapest overall.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracegrad.trainer.credit import token_starts
from tracegrad.trainer.errors import PackingError
from tracegrad.trainer.samples import ChoiceSample

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One forest of contexts in depth-first pre-order (T nodes) with its edges (E sampled tokens).

    Node i holds `token_ids_T[i]` at position `depth_T[i]`; its subtree is ``i:end_T[i]``. Edge e leads from node
    `edge_parent_E[e]` to the token `edge_token_E[e]`, sampled at `edge_temperature_E[e]`: token
    `edge_offset_E[e]` of choice `edge_choice_E[e]`, entry `edge_index_E[e]` of the batch's flat `_N` arrays. Its
    kept set is the next `edge_kept_E[e]` ids of `kept_token_K`; 0: the whole vocabulary.
    """

    token_ids_T: Ints
    depth_T: Ints
    end_T: Ints
    edge_parent_E: Ints
    edge_token_E: Ints
    edge_temperature_E: NDArray[np.float64]
    edge_choice_E: Ints
    edge_offset_E: Ints
    edge_index_E: Ints
    edge_kept_E: Ints
    kept_token_K: Ints

    @property
    def n_nodes(self) -> int:
        """Tokens the model computes for this row."""
        return len(self.token_ids_T)

    @property
    def n_edges(self) -> int:
        """Tokens this row trains."""
        return len(self.edge_token_E)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingStats:
    """`n_nodes`: computed tokens. `n_unique`: nodes of the trie over all choices. `n_naive`: one row per choice."""

    n_choices: int
    n_edges: int
    n_nodes: int
    n_unique: int
    n_naive: int
    n_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """The rows of some choices. Invariant: every sampled token of every packed choice is exactly one edge."""

    rows: tuple[Row, ...]
    stats: PackingStats


def pack(
    choices: Sequence[ChoiceSample],
    *,
    row_tokens: int,
    attention_cost: float = 0.0,
    row_cost: float = 0.0,
    easy_tokens: int | None = None,
    select: Sequence[int] | None = None,
) -> Packing:
    """Lay the selected choices (default all) into rows of at most `row_tokens` nodes.

    A single context longer than that gets a row of its own. Rows minimise ``tokens + attention_cost * tokens^2 +
    row_cost``, summed, then their number, then their squares. With both costs 0 (default) that is the fewest
    computed tokens: one row where everything fits. A positive `attention_cost` (see `Policy.attention_cost`) also
    cuts where a dense mask would waste more than the repeated prefix costs. Beyond `easy_tokens` a row costs `row_cost`
    and a token for as many more: it is cut into parts of about that length, to hold less memory at once, where nothing
    is computed again. `edge_choice_E` and
    `edge_index_E` count over all of `choices`, also when only some are selected. Deterministic.

    Raises:
        PackingError: a choice has no context or a wrong kept set, or `row_tokens` is not positive.
    """
    if row_tokens < 1:
        raise PackingError(f"row_tokens is {row_tokens}: a row holds at least one token")
    chosen = range(len(choices)) if select is None else select
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index in chosen:
        choice = choices[index]
        if not choice.prompt_ids:
            raise PackingError(f"call {choice.call_id}: a choice without context has nothing to be sampled from")
        if choice.token_ids:
            by_context.setdefault(choice.prompt_ids + choice.token_ids[:-1], []).append(index)
    contexts = sorted(by_context)
    arrays = [np.asarray(context, dtype=np.int64) for context in contexts]
    shared = _common_prefixes(arrays)
    starts = token_starts(choices)

    def cost(tokens: int) -> float:
        beyond = 0.0 if easy_tokens is None else max(0.0, tokens / easy_tokens - 1.0)
        return tokens + attention_cost * tokens * tokens + row_cost + beyond * (row_cost + 1)

    rows = tuple(
        _row(arrays[first:last], shared[first:last], [by_context[c] for c in contexts[first:last]], choices, starts)
        for first, last in _cuts([len(array) for array in arrays], shared, row_tokens, cost)
    )
    stats = PackingStats(
        n_choices=len(chosen),
        n_edges=sum(row.n_edges for row in rows),
        n_nodes=sum(row.n_nodes for row in rows),
        n_unique=sum(len(array) - common for array, common in zip(arrays, shared, strict=True)),
        n_naive=sum(len(context) * len(users) for context, users in by_context.items()),
        n_rows=len(rows),
    )
    return Packing(rows=rows, stats=stats)


def _common_prefixes(arrays: Sequence[Ints]) -> list[int]:
    """For each context the length of the prefix it shares with the one before it (0 for the first)."""
    shared = [0] * len(arrays)
    for index in range(1, len(arrays)):
        before, here = arrays[index - 1], arrays[index]
        length = min(len(before), len(here))
        differs = np.flatnonzero(before[:length] != here[:length])
        shared[index] = int(differs[0]) if len(differs) else length
    return shared


def _cuts(
    lengths: Sequence[int], shared: Sequence[int], row_tokens: int, cost_of: Callable[[int], float]
) -> list[tuple[int, int]]:
    """Cut the order into the cheapest rows: ``best[k] = min over j < k of best[j] + cost of the row j..k-1``.

    Costs compare lexicographically: (`cost_of` the row's tokens, rows, tokens^2). A row j..k-1 holds all of context j
    and what each later one adds to its predecessor.
    """
    best: list[tuple[float, int, float]] = [(0.0, 0, 0.0)]
    came_from = [0]
    for last in range(1, len(lengths) + 1):
        chosen, origin, added = None, last - 1, 0
        for first in range(last - 1, -1, -1):
            if added > row_tokens:
                break
            tokens = added + lengths[first]
            if tokens <= row_tokens or first == last - 1:
                base, square = best[first], float(tokens) * tokens
                cost = (base[0] + cost_of(tokens), base[1] + 1, base[2] + square)
                if chosen is None or cost < chosen:
                    chosen, origin = cost, first
            added += lengths[first] - shared[first]
        assert chosen is not None
        best.append(chosen)
        came_from.append(origin)
    rows: list[tuple[int, int]] = []
    last = len(lengths)
    while last > 0:
        rows.append((came_from[last], last))
        last = came_from[last]
    return rows[::-1]


def _row(
    arrays: Sequence[Ints],
    shared: Sequence[int],
    users: Sequence[Sequence[int]],
    choices: Sequence[ChoiceSample],
    starts: Ints,
) -> Row:
    tokens, depths, parents, edges = [], [], [], []
    n_nodes = len(arrays[0]) + sum(len(a) - s for a, s in zip(arrays[1:], shared[1:], strict=True))
    end_T = np.full(n_nodes, n_nodes, dtype=np.int64)
    path = np.zeros(0, dtype=np.int64)
    count = 0
    for position, array in enumerate(arrays):
        common = shared[position] if position else 0
        new = len(array) - common
        end_T[path[common:]] = count
        path = np.concatenate([path[:common], np.arange(count, count + new)])
        tokens.append(array[common:])
        depths.append(np.arange(common, len(array)))
        count += new
        for index in users[position]:
            before = len(choices[index].prompt_ids) - 1
            parents.append(path[before : before + len(choices[index].token_ids)])
            edges.append(index)
    lengths = [len(parent) for parent in parents]
    offsets = np.concatenate([np.arange(length) for length in lengths])
    choice_E = np.repeat(np.asarray(edges, dtype=np.int64), lengths)
    return Row(
        token_ids_T=np.concatenate(tokens),
        depth_T=np.concatenate(depths),
        end_T=end_T,
        edge_parent_E=np.concatenate(parents),
        edge_token_E=np.concatenate([np.asarray(choices[index].token_ids, dtype=np.int64) for index in edges]),
        edge_temperature_E=np.repeat([choices[index].temperature for index in edges], lengths),
        edge_choice_E=choice_E,
        edge_offset_E=offsets,
        edge_index_E=starts[choice_E] + offsets,
        edge_kept_E=np.concatenate([_kept_counts(choices[index]) for index in edges]),
        kept_token_K=np.asarray(
            [token for index in edges for kept in choices[index].kept_ids or () for token in kept], dtype=np.int64
        ),
    )


def _kept_counts(choice: ChoiceSample) -> Ints:
    """Return the size of each token's kept set, 0 where the choice was sampled from the whole vocabulary."""
    if choice.kept_ids is None:
        return np.zeros(len(choice.token_ids), dtype=np.int64)
    if len(choice.kept_ids) != len(choice.token_ids):
        raise PackingError(
            f"call {choice.call_id}: {len(choice.token_ids)} tokens, but kept sets of {len(choice.kept_ids)}"
        )
    for place, (token, kept) in enumerate(zip(choice.token_ids, choice.kept_ids, strict=True)):
        if token not in kept:
            raise PackingError(f"call {choice.call_id}: token {place} ({token}) is not in its own kept set")
    return np.asarray([len(kept) for kept in choice.kept_ids], dtype=np.int64)
