"""The gated MLP of Llama, Mistral and Qwen, keeping less for the backward pass and making weight gradients faster.

The stock module leaves autograd the gate before and after its activation and the product with the other half, at the
largest width of the model. Here only the two halves stay: what follows from them is made again, which costs less
than the fresh memory would. Gradients of weights are products with a transposed matrix; on CPUs, in bfloat16, these
run at half the rate of plain ones, so the matrix is transposed first. All is rounded where the stock module rounds.
Only modules that are found to compute this are replaced; where an adapter lies on a layer, the layer computes and only
the activation is ours. Refuses nothing. Called by `policy`.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

_LAYERS = ("gate_proj", "up_proj", "down_proj")


def adopt(lm: nn.Module) -> int:
    """Have every gated MLP that this computes compute by it; return how many. The model is in float32."""
    found = [module for module in lm.modules() if _looks_like_this(module) and _computes_this(module)]
    for module in found:
        module.forward = MethodType(_forward, module)
    return len(found)


class _Activation(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_out * up, gate), silu(gate).mul_(d_out)


class _GatedMlp(torch.autograd.Function):
    """(T, D) states, (F, D), (F, D) and (D, F) weights -> (T, D)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        gate_TF, up_TF = linear(x_TD, gate_FD), linear(x_TD, up_FD)
        ctx.save_for_backward(x_TD, gate_FD, up_FD, down_DF, gate_TF, up_TF)
        return linear(silu(gate_TF).mul_(up_TF), down_DF)

    @staticmethod
    def backward(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_FD, up_FD, down_DF, gate_TF, up_TF = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        inner_TF = silu(gate_TF)
        d_inner_TF = torch.mm(d_out_TD, down_DF)
        d_down_DF = weight_gradient(d_out_TD, inner_TF * up_TF) if trained else None
        d_up_TF = inner_TF.mul_(d_inner_TF)
        d_up_FD = weight_gradient(d_up_TF, x_TD) if trained else None
        d_gate_TF = torch.ops.aten.silu_backward(d_inner_TF.mul_(up_TF), gate_TF)
        d_gate_FD = weight_gradient(d_gate_TF, x_TD) if trained else None
        d_x_TD = torch.mm(d_up_TF, up_FD) + torch.mm(d_gate_TF, gate_FD) if ctx.needs_input_grad[0] else None
        return d_x_TD, d_gate_FD, d_up_FD, d_down_DF


def weight_gradient(d_out_TO: Tensor, x_TI: Tensor) -> Tensor:
    """Return ``d_out^T x``: (O, I)."""
    transposed_OT = d_out_TO.t()
    if transposed_OT.dtype == torch.bfloat16 and transposed_OT.device.type == "cpu":
        transposed_OT = transposed_OT.contiguous()
    return torch.mm(transposed_OT, x_TI)


def _forward(self: Any, x: Tensor) -> Tensor:
    layers = [getattr(self, name) for name in _LAYERS]
    if any(type(layer) is not nn.Linear for layer in layers):
        out: Tensor = self.down_proj(_Activation.apply(self.gate_proj(x), self.up_proj(x)))
        return out
    out = _GatedMlp.apply(x.reshape(-1, x.shape[-1]), *(layer.weight for layer in layers))
    return out.view(x.shape)


def _looks_like_this(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in _LAYERS]
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers)


@torch.no_grad()
def _computes_this(module: Any) -> bool:
    weight = module.gate_proj.weight
    states = torch.linspace(-2.0, 3.0, 2 * weight.shape[1], device=weight.device).view(1, 2, -1)
    return torch.allclose(_forward(module, states), module(states), rtol=1e-5, atol=1e-6)
