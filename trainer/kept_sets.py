"""Kept sets: the tokens that top-p and top-k left when a token was sampled (the sampling mask), replayed.

A token drawn from a truncated distribution has the probability softmax(logits / T) *renormalised over its kept set*;
without that its ratio is wrong before the first update. The set is fixed data: it is replayed, not chosen anew by the
weights of today. Kept sets are ragged, so they lie flat: `_K` one entry per kept token, edges in ascending order. An
edge without one (count 0) keeps the whole vocabulary. Refuses nothing: `packing` checks them. Called by `policy`.

Source: DeepSeek-V3.2 2025 (arXiv 2512.02556, "keep sampling mask").
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptSets:
    """`token_K`: kept token ids; `edge_K`: the edge of each (int64, ascending); an edge not named keeps everything."""

    token_K: Tensor
    edge_K: Tensor

    @staticmethod
    def of_row(count_E: Tensor, token_K: Tensor, order_E: Tensor) -> "KeptSets | None":
        """Read a row's counts and flat tokens; edges are then numbered as in `order_E`. None where none is kept."""
        if not token_K.numel():
            return None
        place_E = torch.empty_like(order_E)
        place_E[order_E] = torch.arange(len(order_E), device=order_E.device)
        edge_K = torch.repeat_interleave(place_E, count_E)
        order_K = torch.argsort(edge_K, stable=True)
        return KeptSets(token_K=token_K[order_K], edge_K=edge_K[order_K])

    def between(self, first: int, last: int) -> "KeptSets":
        """Return the sets of the edges first..last-1, numbered from 0."""
        bounds = torch.tensor([first, last], device=self.edge_K.device)
        start, end = torch.searchsorted(self.edge_K, bounds).tolist()
        return KeptSets(token_K=self.token_K[start:end], edge_K=self.edge_K[start:end] - first)


def renormalised(
    logprobs_SV: Tensor, slot_E: Tensor, logprobs_E: Tensor, entropy_E: Tensor | None, kept: KeptSets
) -> tuple[Tensor, Tensor | None]:
    """Return logprobs and entropies (nats, (E,)) of the edges over their kept sets; others as they were.

    `logprobs_SV`: log-softmax over the vocabulary at each slot of a chunk; `slot_E`: the slot of each edge.
    """
    value_K = logprobs_SV[slot_E[kept.edge_K], kept.token_K]
    with torch.no_grad():  # the largest of each set, so that no sum underflows
        top_E = torch.full_like(logprobs_E, -torch.inf).scatter_reduce(0, kept.edge_K, value_K, "amax")
        restricted_E = torch.isfinite(top_E)
        top_E = torch.where(restricted_E, top_E, 0.0)
    share_K = (value_K - top_E[kept.edge_K]).exp()
    zero_E = torch.zeros_like(logprobs_E)
    sum_E = torch.where(restricted_E, zero_E.index_add(0, kept.edge_K, share_K), 1.0)
    mass_E = top_E + sum_E.log()
    if entropy_E is not None:  # log mass - sum p log p / mass
        own_E = mass_E - zero_E.index_add(0, kept.edge_K, share_K * value_K) / sum_E
        entropy_E = torch.where(restricted_E, own_E, entropy_E)
    return logprobs_E - mass_E, entropy_E
