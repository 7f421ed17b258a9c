"""Log-probabilities and entropies of edges out of logits, with a backward pass of three passes over the logits.

The gradient of a token's log-probability is ``one_hot - p``: every edge of a slot weighs the same p, so a slot's row
of p is scaled once by the sum of its edges' gradients, and each token adds its own. autograd would instead hold
zeros of the logits' shape for the gathering, and scale, convert and subtract each in a pass of its own. Outputs and
gradients are made in float32; gradients leave as the logits came. Refuses nothing. Called by `policy`.
"""

from typing import Any

import torch
from torch import Tensor


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
        if logits_SV.device.type == "cpu" and bool((temperature_S == 1.0).all()):
            scaled_SV = logits_SV.float()
        else:
            scaled_SV = torch.div(logits_SV, temperature_S[:, None])
        logprobs_SV = torch.log_softmax(scaled_SV, dim=-1)
        entropy_S = _entropy(logprobs_SV) if with_entropy else logprobs_SV.new_zeros(logprobs_SV.shape[0])
        ctx.save_for_backward(logprobs_SV, temperature_S, slot_E, token_E, entropy_S)
        ctx.dtype = logits_SV.dtype
        ctx.set_materialize_grads(False)
        return logprobs_SV[slot_E, token_E], entropy_S[slot_E]

    @staticmethod
    def backward(ctx: Any, d_logprobs_E: Tensor | None, d_entropy_E: Tensor | None) -> tuple[Tensor, None, None, None]:
        logprobs_SV, temperature_S, slot_E, token_E, entropy_S = ctx.saved_tensors
        zero_S = torch.zeros_like(entropy_S)
        grad_SV = logprobs_SV.exp()
        if d_entropy_E is None:
            d_logprobs_E = torch.zeros_like(token_E, dtype=zero_S.dtype) if d_logprobs_E is None else d_logprobs_E
            grad_SV *= (-zero_S.index_add(0, slot_E, d_logprobs_E) / temperature_S)[:, None]
        else:  # dH/dz = -p (log p + H)
            both_S = -zero_S.index_add(0, slot_E, d_entropy_E)
            weight_SV = (logprobs_SV + entropy_S[:, None]).mul_(both_S[:, None])
            if d_logprobs_E is None:
                d_logprobs_E = torch.zeros_like(d_entropy_E)
            weight_SV -= zero_S.index_add(0, slot_E, d_logprobs_E)[:, None]
            grad_SV *= weight_SV.div_(temperature_S[:, None])
        own_E = d_logprobs_E / temperature_S[slot_E]
        grad_SV.index_put_((slot_E, token_E), own_E, accumulate=True)
        return grad_SV.to(ctx.dtype), None, None, None


def _entropy(logprobs_SV: Tensor) -> Tensor:
    """Return ``-sum p log p`` of each row, as a product of a row with a column: one pass, nothing of its size held."""
    return -torch.bmm(logprobs_SV.exp()[:, None, :], logprobs_SV[:, :, None])[:, 0, 0]
