"""Sharding: a model's weights, gradients and optimizer state divided over the ranks of its group (FSDP2).

Each decoder layer is gathered when it computes and let go of afterwards; embeddings, head and norm, which a row uses
from its beginning to its end, are gathered for the row. Masters are the float32 shards; with bfloat16 each gathering
rounds them, and gradients are summed in float32, over ranks and rows alike. It refuses nothing. Called by the learner
and what it is made of.

What gloo needs, and NCCL takes: plain sums. FSDP2's default is an average, and with a divide factor of its own a scaled
sum; of both gloo knows none.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tracegrad.trainer.ranks import Ranks

T = TypeVar("T")
_ENTRY = "compute_together"


def shard_model(lm: Any, ranks: Ranks, computes_in: torch.dtype | None = None) -> None:
    """Divide a language model over the ranks, in place; its parameters are new ones afterwards. All ranks call it.

    `computes_in`: what gathered weights are rounded to; None: they stay as they are.
    """
    layers = [module for module in lm.modules() if type(module).__name__ in set(lm._no_split_modules or ())]
    for module in (*layers, lm):
        _shard(module, ranks, computes_in)
    setattr(lm, _ENTRY, _call)
    register_fsdp_forward_method(lm, _ENTRY)


def shard_head(head: nn.Module, ranks: Ranks) -> None:
    """Divide a small module that computes in float32."""
    _shard(head, ranks, None)


def computed(lm: Any, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that uses any part of the model, gathered around all of it. It returns tensors in a tuple."""
    return getattr(lm, _ENTRY)(function, *arguments) if isinstance(lm, FSDPModule) else function(*arguments)


def let_go(*modules: Any) -> None:
    """Drop what is gathered, if anything: the shards have new values, or are to be looked at."""
    for module in modules:
        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()


def is_sharded(module: Any) -> bool:
    """Whether the module is divided over ranks."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be divided; then all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be divided: a share, perhaps empty, or the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def place(target: Tensor, value: Tensor) -> None:
    """Overwrite a tensor that may be divided with a whole value, or with one that is divided alike."""
    target.copy_(like(target, value))


def like(model: Tensor, value: Tensor) -> Tensor:
    """Return the value on the device of `model` and divided as it is. No rank talks to another."""
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value.to(model.device)
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def _shard(module: nn.Module, ranks: Ranks, computes_in: torch.dtype | None) -> None:
    precision = MixedPrecisionPolicy(param_dtype=computes_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded = fully_shard(module, mesh=ranks.mesh, mp_policy=precision)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _call(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)
