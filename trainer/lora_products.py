"""The products of LoRA adapters on a CPU: one matrix product for each adapter of a batch, none for tokens without one.

vLLM's own (0.32, `vllm/lora/ops/torch_ops/lora_ops.py`) gather the adapter's matrices once for every token. That takes
eight times as long as the model itself, and tokens of the base, which have the index -1, get the adapter that lies
last: served beside an adapter, the base answers as that adapter does. `worker_extension` puts these in their place in
every process of an engine on a CPU. Imports torch only, so that a copy of the file serves an engine installed
elsewhere.
"""

from typing import Any

import torch
from torch import Tensor


def put_in_place(ops: Any, wrapper: Any) -> None:
    """Replace the functions of the module `ops`, and those that `wrapper` imported from there by name."""
    for name, function in (
        ("bgmv_shrink", bgmv_shrink),
        ("bgmv_expand", bgmv_expand),
        ("bgmv_expand_slice", bgmv_expand_slice),
    ):
        for module in (ops, wrapper):
            if not hasattr(module, name):
                raise AttributeError(f"{module.__name__} has no {name}: this vLLM is another one than was measured")
            setattr(module, name, function)


def bgmv_shrink(
    inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
) -> None:
    """Write scaling * A x of each token's adapter; 0 where it has none."""
    outputs = products(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype)
    output_tensor[:, : outputs.shape[1]] = scaling * outputs


def bgmv_expand(
    inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, add_inputs: bool = True
) -> None:
    """Add B x of each token's adapter to the first columns, or write it there."""
    outputs = products(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype)
    limit = 1 if outputs.shape[0] == 1 else output_tensor.shape[0]
    columns = min(outputs.shape[1], output_tensor.shape[1])  # vLLM pads the two differently
    _write(output_tensor[:, :columns], outputs[:limit, :columns], add_inputs)


def bgmv_expand_slice(  # noqa: PLR0917  (the signature is vLLM's)
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Add B x of each token's adapter to some columns, or write it there."""
    outputs = products(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype)
    _write(output_tensor[:, slice_offset : slice_offset + slice_size], outputs, add_inputs)


def products(inputs: Tensor, weights: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W_i x for each row x of `inputs` (tokens, in) and its index i; rows with -1 are 0.

    `weights`: (adapters, out, in) or (adapters, 1, out, in). Shape of the result: (tokens, out).
    """
    matrices = weights.squeeze(1) if weights.ndim == 4 else weights
    rows, present = inputs.to(dtype), indices.unique().tolist()
    if len(present) == 1 and present[0] >= 0:
        return rows @ matrices[present[0]].to(dtype).T
    outputs = rows.new_zeros((rows.shape[0], matrices.shape[1]))
    for index in present:
        if index >= 0:
            chosen = (indices == index).nonzero()[:, 0]
            outputs[chosen] = rows[chosen] @ matrices[index].to(dtype).T
    return outputs


def _write(target: Tensor, values: Tensor, add: bool) -> None:
    if add:
        target += values
    else:
        target[:] = values
