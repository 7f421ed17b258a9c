"""Attention over a packed row on a CPU, by blocks of queries: no (T, T) mask and no work on pairs that do not see.

Nodes lie in depth-first order, so what the queries of a block ``a..b-1`` see lies on the path to a, or in the block:
those keys are gathered, and only the columns that not every query of the block sees are masked. The forward pass of a
block is torch's flash kernel; the backward pass is five matrix products per block, because torch's own (for masks, on
CPUs) takes several times as long as the forward pass. Its two subtractions (of the logsumexp, before the exponential;
of sum(gradient * output)) lie inside the products as two more columns, high and low part: so what is rounded to
bfloat16 is near 0 where it matters. Query heads that share keys are rows of one product: keys are never repeated.

The plan of a row travels as an attribute of the 4-D mask that the language model passes through as it is. Without one
(a plain forward pass) it is transformers' `sdpa`. It refuses a mask that has lost its plan, and what a softmax of
scaled products does not express (soft caps, sinks). Called by `policy`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tracegrad.trainer.errors import UnsupportedModel

NAME = "tracegrad_tree"
_BEYOND = ("softcap", "s_aux", "position_bias")
BLOCK = 256
"""Queries of a block. Larger ones see more keys that only some of them may see; smaller ones are more calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Queries ``first:last`` and their keys, ascending: `keys_K`, or 0..last-1 where it is None.

    The first `n_open` keys are seen by every query of the block; `visible_QK` (bool) says of the others which are.
    """

    first: int
    last: int
    keys_K: Tensor | None
    n_open: int
    visible_QK: Tensor

    @property
    def n_keys(self) -> int:
        """Keys of the block."""
        return self.n_open + self.visible_QK.shape[1]

    def of(self, tensor_HTD: Tensor) -> Tensor:
        """Return the block's keys of (H, T, D)."""
        return tensor_HTD[:, : self.last] if self.keys_K is None else tensor_HTD.index_select(1, self.keys_K)

    def add(self, total_HTD: Tensor, part_HKD: Tensor) -> None:
        """Add what belongs to the block's keys."""
        if self.keys_K is None:
            total_HTD[:, : self.last] += part_HKD
        else:
            total_HTD.index_add_(1, self.keys_K, part_HKD.to(total_HTD.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class TreePlan:
    """The blocks of one row, and for each the additive mask (Q, K) of the forward pass, by dtype made once."""

    blocks: tuple[Block, ...]
    biases: dict[torch.dtype, tuple[Tensor, ...]]

    @staticmethod
    def of(end_T: Tensor, block: int = BLOCK) -> "TreePlan":
        """Lay a row's queries into blocks. ``j`` is `i` or an ancestor of `i` iff ``j <= i < end_T[j]``."""
        n_nodes = end_T.shape[0]
        starts = range(0, n_nodes, block)
        return TreePlan(blocks=tuple(_block(end_T, a, min(a + block, n_nodes)) for a in starts), biases={})

    def bias(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask of a block."""
        if dtype not in self.biases:
            self.biases[dtype] = tuple(_bias(block, dtype) for block in self.blocks)
        return self.biases[dtype][number]


def mask_of(end_T: Tensor, block: int = BLOCK) -> Tensor:
    """Return a 4-D mask that takes no memory and carries the plan of the row."""
    n_nodes = end_T.shape[0]
    mask = torch.ones((), dtype=torch.bool).expand(1, 1, n_nodes, n_nodes)
    mask.tree_plan = TreePlan.of(end_T, block)  # type: ignore[attr-defined]
    return mask


def adopt(lm: Any) -> bool:
    """Have a language model compute by blocks where it can: on a CPU, its attention taken from transformers' table."""
    if not getattr(lm, "_supports_attention_backend", False) or next(lm.parameters()).device.type != "cpu":
        return False
    lm.set_attn_implementation(NAME)
    return bool(lm.config._attn_implementation == NAME)


class _TreeAttention(torch.autograd.Function):
    """(Hk, G, T, D) queries, (Hk, T, D) keys and values -> (T, Hk, G, D)."""

    @staticmethod
    def forward(ctx: Any, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, how: tuple[TreePlan, float]) -> Tensor:
        plan, scale = how
        n_kv, n_shared, n_nodes, _ = q_HGTD.shape
        out_THGD = q_HGTD.new_empty(n_nodes, n_kv, n_shared, v_HTD.shape[-1])
        lse_HGT = torch.empty(n_kv, n_shared, n_nodes, dtype=torch.float32)
        for number, block in enumerate(plan.blocks):
            q = q_HGTD[:, :, block.first : block.last].reshape(1, n_kv, -1, q_HGTD.shape[-1])
            bias = plan.bias(number, q.dtype).repeat(n_shared, 1)[None, None]
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, block.of(k_HTD)[None], block.of(v_HTD)[None], 0.0, False, attn_mask=bias, scale=scale
            )
            shape = (n_kv, n_shared, block.last - block.first)
            out_THGD[block.first : block.last] = out[0].view(*shape, -1).permute(2, 0, 1, 3)
            lse_HGT[:, :, block.first : block.last] = lse.view(shape)
        ctx.save_for_backward(q_HGTD, k_HTD, v_HTD, out_THGD, lse_HGT)
        ctx.plan, ctx.scale = plan, scale
        return out_THGD

    @staticmethod
    def backward(ctx: Any, d_out_THGD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_HGTD, k_HTD, v_HTD, out_THGD, lse_HGT = ctx.saved_tensors
        scale: float = ctx.scale
        d_out = d_out_THGD.permute(1, 2, 0, 3).contiguous()
        delta = (d_out.float() * out_THGD.permute(1, 2, 0, 3)).sum(-1)
        q_less, k_one = _less(q_HGTD * scale, lse_HGT), _with_ones(k_HTD)
        d_less, v_one = _less(d_out, delta), _with_ones(v_HTD)
        dq = torch.empty_like(q_HGTD, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(t.shape, dtype=torch.float32) for t in (k_HTD, v_HTD))
        for number, block in enumerate(ctx.plan.blocks):
            rows = slice(block.first, block.last)
            p = torch.bmm(_flat(q_less, rows), block.of(k_one).transpose(1, 2))
            _hide(p, block, ctx.plan.bias(number, p.dtype))
            p.exp_()
            d = _flat(d_out, rows)
            block.add(dv, torch.bmm(p.transpose(1, 2), d))
            ds = torch.bmm(_flat(d_less, rows), block.of(v_one).transpose(1, 2)).mul_(p)
            dq[:, :, rows] = torch.bmm(ds, block.of(k_HTD)).view(*dq.shape[:2], -1, dq.shape[-1])
            block.add(dk, torch.bmm(ds.transpose(1, 2), _flat(q_HGTD, rows)))
        return dq.mul_(scale), dk.mul_(scale).to(k_HTD.dtype), dv.to(v_HTD.dtype), None


def _block(end_T: Tensor, first: int, last: int) -> Block:
    path_K = torch.nonzero(end_T[:first] > first).squeeze(1)
    inside = torch.arange(first, last)
    closing = path_K[end_T[path_K] < last]  # of nested subtrees the inner ones end first: these are the last
    columns = torch.cat([closing, inside])
    visible = (columns[None, :] <= inside[:, None]) & (inside[:, None] < end_T[columns][None, :])
    return Block(
        first=first,
        last=last,
        keys_K=None if len(path_K) == first else torch.cat([path_K, inside]),
        n_open=len(path_K) - len(closing),
        visible_QK=visible,
    )


def _bias(block: Block, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(block.last - block.first, block.n_keys, dtype=dtype)
    bias[:, block.n_open :].masked_fill_(~block.visible_QK, -torch.inf)
    return bias


def _hide(scores_HQK: Tensor, block: Block, bias_QK: Tensor) -> None:
    """Add the mask to the columns that need one. (H, G * Q, K): the rows of each query head one after another."""
    n_heads, n_queries = scores_HQK.shape[0], block.last - block.first
    scores_HQK.view(n_heads, -1, n_queries, block.n_keys)[..., block.n_open :] += bias_QK[:, block.n_open :]


def _less(x_HGTD: Tensor, minus_HGT: Tensor) -> Tensor:
    """Append -minus as two columns, its value in x's precision and what that lacks."""
    high = minus_HGT.to(x_HGTD.dtype)
    low = (minus_HGT - high.float()).to(x_HGTD.dtype)
    return torch.cat([x_HGTD, -high[..., None], -low[..., None]], dim=-1)


def _with_ones(x_HTD: Tensor) -> Tensor:
    return torch.cat([x_HTD, x_HTD.new_ones(*x_HTD.shape[:2], 2)], dim=-1)


def _flat(x_HGTD: Tensor, rows: slice) -> Tensor:
    return x_HGTD[:, :, rows].reshape(x_HGTD.shape[0], -1, x_HGTD.shape[-1])


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (1, H, T, D) each; returns (1, T, H, D)."""
    beyond = [name for name in _BEYOND if kwargs.get(name) is not None]
    if beyond:
        raise UnsupportedModel(f"{type(module).__name__} computes attention with {beyond[0]}: it cannot be packed")
    plan = getattr(attention_mask, "tree_plan", None)
    if plan is None:
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.stride()[-2:] == (0, 0):
            raise UnsupportedModel("the model does not hand its attention mask on as it is: its rows cannot be packed")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n_kv, n_nodes, size = key.shape[1:]
    scale = size**-0.5 if scaling is None else float(scaling)
    grouped = query[0].reshape(n_kv, -1, n_nodes, size)
    out: Tensor = _TreeAttention.apply(grouped, key[0], value[0], (plan, scale))
    return out.view(1, n_nodes, -1, value.shape[-1]), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
