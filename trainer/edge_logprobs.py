"""Log-probabilities and entropies of edges out of logits, a few rows of logits at a time.

The gradient of a token's log-probability is ``one_hot - p``: every edge of a slot weighs the same p, so a slot's row
of p is scaled once by the sum of its edges' gradients, and each token adds its own. autograd would instead hold
zeros of the logits' shape for the gathering, and scale, convert and subtract each in a pass of its own. What is held
are the logits as they came, and a number or two for each slot: in both passes a few rows become float32, in a buffer
that stays in the cache. Outputs and gradients are made in float32; gradients leave as the logits came. Refuses nothing.
Called by `policy`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK_VALUES = 1 << 18
"""Logits that are float32 at once on a CPU: 1 MB, twice. A GPU takes all rows."""


def edge_logprobs(
    logits_SV: Tensor, temperature_S: Tensor, slot_E: Tensor, token_E: Tensor, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (E,) float32 log-probabilities of the tokens at the slots' temperatures, and the slots' entropies, nats.

    `slot_E`, `token_E`: int64, the slot and the token of each edge.
    """
    logprobs_E, entropy_E = _EdgeLogprobs.apply(logits_SV, temperature_S, (slot_E, token_E), with_entropy)
    return logprobs_E, entropy_E if with_entropy else None


class _EdgeLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_SV: Tensor, temperature_S: Tensor, edges: tuple[Tensor, Tensor], with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        slot_E, token_E = edges
        lse_S, entropy_S = (torch.zeros_like(temperature_S) for _ in range(2))
        for rows, scaled_RV, spare_RV in _blocks(logits_SV, temperature_S):
            greatest_R = scaled_RV.amax(-1)
            scaled_RV.sub_(greatest_R[:, None])
            total_R = torch.exp(scaled_RV, out=spare_RV).sum(-1)
            lse_S[rows] = greatest_R + total_R.log()
            if with_entropy:  # log sum e^z - sum p z, with z less its greatest
                entropy_S[rows] = total_R.log() - spare_RV.mul_(scaled_RV).sum(-1) / total_R
        ctx.save_for_backward(logits_SV, temperature_S, slot_E, token_E, lse_S, entropy_S)
        ctx.set_materialize_grads(False)
        own_E = logits_SV[slot_E, token_E].float() / temperature_S[slot_E]
        return own_E - lse_S[slot_E], entropy_S[slot_E]

    @staticmethod
    def backward(ctx: Any, d_logprobs_E: Tensor | None, d_entropy_E: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits_SV, temperature_S, slot_E, token_E, lse_S, entropy_S = ctx.saved_tensors
        if d_logprobs_E is None:
            d_logprobs_E = torch.zeros_like(token_E, dtype=lse_S.dtype)
        both_S = torch.zeros_like(lse_S)
        if d_entropy_E is not None:
            both_S.index_add_(0, slot_E, d_entropy_E)
        less_S = torch.zeros_like(lse_S).index_add_(0, slot_E, d_logprobs_E)
        own_E = d_logprobs_E / temperature_S[slot_E]
        order_E = torch.argsort(slot_E, stable=True)
        sorted_E = slot_E[order_E]
        grad_SV = torch.empty_like(logits_SV)
        for rows, scaled_RV, p_RV in _blocks(logits_SV, temperature_S):
            scaled_RV.sub_(lse_S[rows, None])
            torch.exp(scaled_RV, out=p_RV)
            if d_entropy_E is None:
                p_RV.mul_((-less_S[rows] / temperature_S[rows])[:, None])
            else:  # dH/dz = -p (log p + H)
                scaled_RV.add_(entropy_S[rows, None]).mul_(-both_S[rows, None]).sub_(less_S[rows, None])
                p_RV.mul_(scaled_RV.div_(temperature_S[rows, None]))
            first, last = torch.searchsorted(sorted_E, sorted_E.new_tensor([rows.start, rows.stop])).tolist()
            here = order_E[first:last]
            p_RV.index_put_((slot_E[here] - rows.start, token_E[here]), own_E[here], accumulate=True)
            grad_SV[rows] = p_RV
        return grad_SV, None, None, None


def _blocks(logits_SV: Tensor, temperature_S: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield some rows, their logits over their temperatures in float32, and as much space. Both are written over."""
    n_slots, n_tokens = logits_SV.shape
    at_once = n_slots if logits_SV.is_cuda else max(1, min(n_slots, _BLOCK_VALUES // n_tokens))
    buffer, spare = (torch.empty(at_once, n_tokens, dtype=torch.float32, device=logits_SV.device) for _ in range(2))
    plain = bool((temperature_S == 1.0).all())
    for first in range(0, n_slots, max(at_once, 1)):
        rows = slice(first, min(first + at_once, n_slots))
        scaled_RV = buffer[: rows.stop - first].copy_(logits_SV[rows])
        if not plain:
            scaled_RV /= temperature_S[rows, None]
        yield rows, scaled_RV, spare[: rows.stop - first]
