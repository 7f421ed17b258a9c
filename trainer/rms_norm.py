"""RMSNorm that keeps nothing but its input and one number per token for the backward pass.

The stock module leaves autograd three float32 copies of its input; at a norm before each of two parts of every layer
these are a third of what a pass of a small model holds. The result is rounded where the stock module rounds, so that
the engine, which computes as that one does, is met as nearly as before. Only modules that are found to compute this
are replaced: others (Gemma's adds 1 to its weights) stay as they are. Refuses nothing. Called by `policy`.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


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
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(epsilon))
        ctx.save_for_backward(x, weight, inverse)
        return weight * (x * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        product = normed * d_out
        d_weight = product.view(-1, x.shape[-1]).sum(0)
        mean = (product @ weight.to(product.dtype)).div_(x.shape[-1])[..., None]
        d_x = (d_out * weight.float()).addcmul_(normed, mean, value=-1.0).mul_(inverse)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


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
