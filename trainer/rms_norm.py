"""RMSNorm that keeps nothing but its input and one number per token for the backward pass.

The stock module leaves autograd three float32 copies of its input; at a norm before each of two parts of every layer
these are a third of what a pass of a small model holds. What is float32 in between is a few rows. The result is rounded
where the stock module rounds, so that the engine, which computes as that one does, is met as nearly as before. Only
modules that are found to compute this are replaced: others (Gemma's adds 1 to its weights) stay as they are. Refuses
nothing. Called by `policy`.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK_VALUES = 1 << 16


def adopt(lm: nn.Module) -> int:
    """Have every RMSNorm that this computes compute by it; return how many. The model is in float32."""
    found = [module for module in lm.modules() if type(module).__name__.endswith("RMSNorm") and _computes_this(module)]
    for module in found:
        module.forward = MethodType(_forward, module)
    return len(found)


class _RmsNorm(torch.autograd.Function):
    """(..., D) states, (D,) weights -> ``weight * round(x / rms(x))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = x.shape[-1]
        x_TD, out = x.reshape(-1, size), torch.empty_like(x, memory_format=torch.contiguous_format)
        inverse_T1 = torch.empty(x_TD.shape[0], 1, dtype=torch.float32, device=x.device)
        for rows, (x_RD,) in _blocks(x_TD, 1):
            norm_R1 = torch.linalg.vector_norm(x_RD.copy_(x_TD[rows]), dim=-1, keepdim=True)
            inverse_T1[rows] = norm_R1.square_().div_(size).add_(epsilon).rsqrt_()
            out.view(-1, size)[rows] = x_RD.mul_(inverse_T1[rows])
        ctx.save_for_backward(x, weight, inverse_T1)
        return out.mul_(weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_T1 = ctx.saved_tensors
        size, weight_D = x.shape[-1], weight.float()
        x_TD, d_out_TD, d_x_TD = x.reshape(-1, size), d_out.reshape(-1, size), x.new_empty(inverse_T1.shape[0], size)
        d_weight_D = torch.zeros_like(weight_D)
        for rows, (normed_RD, d_RD, product_RD) in _blocks(x_TD, 3):
            normed_RD.copy_(x_TD[rows]).mul_(inverse_T1[rows])
            torch.mul(normed_RD, d_RD.copy_(d_out_TD[rows]), out=product_RD)
            d_weight_D += product_RD.sum(0)
            mean_R1 = torch.mv(product_RD, weight_D).div_(size)[:, None]
            d_x_TD[rows] = d_RD.mul_(weight_D).sub_(normed_RD.mul_(mean_R1)).mul_(inverse_T1[rows])
        return d_x_TD.view(x.shape), d_weight_D.to(weight.dtype), None


def _blocks(x_TD: Tensor, count: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield some rows at a time, with float32 space for `count` copies of them that stays in a CPU's cache."""
    n_rows, size = x_TD.shape
    at_once = n_rows if x_TD.is_cuda else max(1, min(n_rows, _BLOCK_VALUES // size))
    space = torch.empty(count, at_once, size, dtype=torch.float32, device=x_TD.device)
    for first in range(0, n_rows, max(at_once, 1)):
        rows = slice(first, min(first + at_once, n_rows))
        yield rows, list(space[:, : rows.stop - first])


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    out: Tensor = _RmsNorm.apply(hidden_states, self.weight, _epsilon(self))
    return out


def _epsilon(module: Any) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(epsilon) if isinstance(epsilon, (int, float)) else None


@torch.no_grad()
def _computes_this(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if _epsilon(module) is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    states = torch.linspace(-2.0, 3.0, 2 * len(weight), device=weight.device).view(1, 2, -1)
    own = _RmsNorm.apply(states, weight, _epsilon(module))
    return torch.allclose(own, module(states), rtol=1e-5, atol=1e-6)
