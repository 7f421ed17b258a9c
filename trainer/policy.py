"""The policy: a stock Hugging Face causal LM with a value head, evaluated on the edges of packed rows.

The trunk runs once per row with the row's ancestry mask and depths as positions; logits are made only where a token
was sampled, a chunk of `slot_chunk` slots at a time. What waits of them for the backward pass are those of the last two
chunks, once, as the head gave them: (2 slot_chunk, V) at most, however long the row, and nothing where it has kept
sets. Those of the chunks before are made again there, one chunk after another; a pass without gradients holds one
chunk. Log-softmax, values and master weights are float32. It refuses checkpoints whose attention or head it would
evaluate wrongly: `verify` compares it with the model's own forward pass. Called by the learner, one process per model.

Precision `bf16`: the trunk's weights are a bfloat16 shadow of float32 masters. Gradients are added to the masters as
backward makes them, the optimizer steps the masters, and `refresh` rounds them into the shadow again. Precision
`fp32`: masters and weights are the same tensors. Over several ranks both are divided (`tracegrad.trainer.sharding`),
and every pass is one that all ranks make.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from tracegrad.trainer import rms_norm, swiglu
from tracegrad.trainer.batches import PackedRow, probe_row
from tracegrad.trainer.edge_logprobs import edge_logprobs
from tracegrad.trainer.errors import UnsupportedModel
from tracegrad.trainer.kept_sets import KeptSets, renormalised
from tracegrad.trainer.ranks import ALONE, Ranks
from tracegrad.trainer.sharding import computed, let_go, own_part, place, shard_head, shard_model
from tracegrad.trainer.tree_attention import NAME as TREE
from tracegrad.trainer.tree_attention import adopt, mask_of

Precision = Literal["fp32", "bf16"]

_LOADING = Lock()
"""transformers patches itself while it loads; two threads at once leave it patched (tied heads come apart)."""
_HELD_CHUNKS = 2
"""Chunks of logits that wait for the backward pass; those before them are made again."""
_UNUSUAL_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeOutputs:
    """One entry per edge of a row, float32. `values_E`: V at the parent. None: not asked for."""

    logprobs_E: Tensor
    values_E: Tensor | None
    entropy_E: Tensor | None


class ValueHead(nn.Module):
    """A linear state value on the trunk's last hidden states; its output starts at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.output = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_SD: Tensor) -> Tensor:
        """Return (S,) float32 values of (S, D) hidden states."""
        return self.output(hidden_SD.float())[:, 0].clone()  # no view: FSDP2 warns of those


class Policy(nn.Module):
    """Causal LM + value head.

    `lm` is any decoder-only Hugging Face model with full attention. `detach_value` keeps the value loss out of the
    trunk. `slot_chunk`: slots whose logits are made at once. `peft_config`: of an adapter; None, of a full model.
    """

    peft_config: Any = None

    def __init__(
        self,
        lm: Any,
        *,
        precision: Precision = "fp32",
        gradient_checkpointing: bool = False,
        detach_value: bool = False,
        slot_chunk: int = 256,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.ranks, self.precision, self.detach_value, self.slot_chunk = ranks, precision, detach_value, slot_chunk
        prepare(lm, gradient_checkpointing={"use_reentrant": False} if gradient_checkpointing else None)
        self._set_up(lm, _take_masters(lm, precision, ranks))

    def _set_up(self, lm: Any, masters: dict[str, nn.Parameter]) -> None:
        self._lm: Any = lm
        self._masters = masters
        self.value_head = ValueHead(lm.config.hidden_size).to(self.ranks.device)
        if self.ranks.size > 1:
            shard_head(self.value_head, self.ranks)

    @property
    def lm(self) -> Any:
        """The language model, ready to compute what this policy says."""
        return self._lm

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        precision: Precision,
        *,
        gradient_checkpointing: bool = False,
        detach_value: bool = False,
        slot_chunk: int = 256,
        verify: bool = True,
        ranks: Ranks = ALONE,
    ) -> "Policy":
        """Load a folder in Hugging Face format; the value head is new (see `load_value_state`).

        Raises:
            UnsupportedModel: see `verify`.
        """
        lm = load_language_model(path)
        policy = cls(
            lm,
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            detach_value=detach_value,
            slot_chunk=slot_chunk,
            ranks=ranks,
        )
        if verify:
            policy.verify()
        return policy

    def edge_outputs(self, row: PackedRow, *, with_values: bool = True, with_entropy: bool = False) -> EdgeOutputs:
        """Return logprobs at each edge's temperature, and if asked values and entropies (nats), all (E,) float32.

        Where an edge has a kept set, its logprob and entropy are over that set.
        """
        row = row if self.device.type == "cpu" else row.to(self.device)
        logprobs_E, values_E, entropy_E = computed(self.lm, self._edges, row, with_values, with_entropy)
        return EdgeOutputs(logprobs_E=logprobs_E, values_E=values_E, entropy_E=entropy_E)

    def idle(self, *, with_values: bool) -> Tensor:
        """Pass through the model with the ranks that have a row left; return a 0 whose gradients are all 0."""
        outputs = self.edge_outputs(probe_row([[0, 0]]), with_values=with_values)
        said = outputs.logprobs_E.sum()
        return 0.0 * (said if outputs.values_E is None else said + outputs.values_E.sum())

    @property
    def device(self) -> torch.device:
        """Where the weights lie and outputs come from. Rows may lie anywhere."""
        return self.ranks.device

    # -- weights

    def lm_masters(self) -> dict[str, nn.Parameter]:
        """Name -> float32 master parameter of the LM (a tied head appears once): what the optimizer steps."""
        return dict(self._masters)

    def value_masters(self) -> dict[str, nn.Parameter]:
        """Name -> float32 parameter of the value head."""
        let_go(self.value_head)
        return dict(self.value_head.named_parameters())

    def zero_grads(self) -> None:
        """Forget the gradients of every master."""
        for parameter in [*self._masters.values(), *self.value_masters().values()]:
            parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the weights that compute. Call after every optimizer step or master load."""
        let_go(self._lm, self.value_head)
        for name, weight in self._lm.named_parameters():
            master = self._masters.get(name, weight)
            if master is not weight:
                weight.copy_(master)

    def lm_state(self) -> dict[str, Tensor]:
        """Return name -> detached float32 master tensor (not copied): Hugging Face names, a tied head once."""
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def load_lm_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the masters and refresh.

        Raises:
            UnsupportedModel: names or shapes are not those of `lm_state`.
        """
        _same_names(state, self._masters)
        for name, master in self._masters.items():
            place(master, state[name])
        self.refresh()

    def value_state(self) -> dict[str, Tensor]:
        """Return name -> detached float32 tensor of the value head (not copied)."""
        return {name: tensor.detach() for name, tensor in self.value_masters().items()}

    def load_value_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the value head.

        Raises:
            UnsupportedModel: names are not those of `value_state`.
        """
        own = self.value_masters()
        _same_names(state, own)
        for name, parameter in own.items():
            place(parameter, state[name])

    @torch.no_grad()
    def not_finite(self) -> list[str]:
        """Return the names of masters and of the value head's parameters that hold a NaN or an infinity.

        All ranks call it, and each is told of what any of them holds.
        """
        held = {**self.lm_state(), **{f"value_head.{name}": value for name, value in self.value_state().items()}}
        parts = [own_part(tensor) for tensor in held.values()]
        # The extremes are NaN where one number is: one pass over the weights, and no copy of them.
        ends = [torch.stack(torch.aminmax(part)) if part.numel() else part.new_zeros(2) for part in parts]
        wrong = (~torch.isfinite(torch.stack(ends)).all(-1)).tolist() if ends else []
        return [name for name, count in zip(held, self.ranks.sums(*map(float, wrong)), strict=True) if count]

    @property
    def attention_cost(self) -> float:
        """Multiply-adds of dense attention per token^2 over those of the weights per token: see `packing.pack`.

        0 by blocks (`tree_attention`): pairs that do not see one another cost nothing, whatever row they lie in.
        """
        if self._by_blocks:
            return 0.0
        config = self.lm.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim
        outside = ("embed", "lm_head", "lora_")
        weights = sum(p.numel() for name, p in self._lm.named_parameters() if not any(part in name for part in outside))
        return float(per_pair) / weights

    @property
    def row_cost(self) -> float:
        """What one more row costs beyond its tokens, in tokens: see `packing.pack`.

        A pass over all weights and gradients; both grow with the model as a token does. Measured on SmolLM2-135M.
        """
        return 48.0

    # -- evaluation

    def _edges(
        self, row: PackedRow, with_values: bool, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden_TD = self._hidden(row)
        hidden_SD = hidden_TD[row.slot_parent_S]
        logprobs_E, entropy_E = self._logprobs(hidden_SD, row, with_entropy)
        if not with_values:
            return logprobs_E, None, entropy_E
        values_S = self.value_head(hidden_SD.detach() if self.detach_value else hidden_SD)
        return logprobs_E, values_S[row.edge_slot_E], entropy_E

    @property
    def _by_blocks(self) -> bool:
        """Whether attention is computed by `tree_attention`, which needs no mask of all pairs."""
        return bool(self.device.type == "cpu" and self.lm.config._attn_implementation == TREE)

    def _hidden(self, row: PackedRow) -> Tensor:
        outputs = self.lm.base_model(
            input_ids=row.token_ids_T[None],
            attention_mask=mask_of(row.end_T) if self._by_blocks else row.mask(),
            position_ids=row.position_ids_T[None],
            use_cache=False,
        )
        return outputs.last_hidden_state[0]

    def _logprobs(self, hidden_SD: Tensor, row: PackedRow, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Chunk by slots; edges follow their slots, then return to the row's order."""
        order_E = torch.argsort(row.edge_slot_E, stable=True)
        slot_E, token_E = row.edge_slot_E[order_E], row.edge_token_E[order_E]
        kept = KeptSets.of_row(row.edge_kept_E, row.kept_token_K, order_E)
        bounds = range(0, hidden_SD.shape[0], self.slot_chunk)
        firsts = torch.searchsorted(slot_E, torch.tensor([*bounds, hidden_SD.shape[0]], device=slot_E.device)).tolist()
        logprobs, entropies = [], []
        for number, first in enumerate(bounds):
            edges = slice(firsts[number], firsts[number + 1])
            chunk = slice(first, first + self.slot_chunk)
            arguments = (
                hidden_SD[chunk],
                row.slot_temperature_S[chunk],
                slot_E[edges] - first,
                token_E[edges],
                None if kept is None else kept.between(edges.start, edges.stop),
            )
            held = kept is None and first + _HELD_CHUNKS * self.slot_chunk >= hidden_SD.shape[0]
            if torch.is_grad_enabled() and not held:
                logprob_e, entropy_e = checkpoint(
                    self._chunk, *arguments, with_entropy=with_entropy, use_reentrant=False
                )
            else:
                logprob_e, entropy_e = self._chunk(*arguments, with_entropy=with_entropy)
            logprobs.append(logprob_e)
            entropies.append(entropy_e)

        def in_row_order(parts: list[Tensor]) -> Tensor:
            sorted_E = torch.cat(parts) if parts else hidden_SD.new_zeros(0, dtype=torch.float32)
            return torch.empty_like(sorted_E).index_copy(0, order_E, sorted_E)

        return in_row_order(logprobs), in_row_order(entropies) if with_entropy else None

    def _chunk(
        self,
        hidden_SD: Tensor,
        temperature_S: Tensor,
        slot_E: Tensor,
        token_E: Tensor,
        kept: KeptSets | None,
        *,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logits_SV = self.lm.get_output_embeddings()(hidden_SD)
        if kept is None or not kept.token_K.numel():
            return edge_logprobs(logits_SV, temperature_S, slot_E, token_E, with_entropy=with_entropy)
        logprobs_SV = torch.log_softmax(logits_SV.float() / temperature_S[:, None], dim=-1)
        logprobs_E = logprobs_SV[slot_E, token_E]
        entropy_E = -(logprobs_SV.exp() * logprobs_SV).sum(-1)[slot_E] if with_entropy else None
        return renormalised(logprobs_SV, slot_E, logprobs_E, entropy_E, kept)

    @torch.no_grad()
    def computes_numbers(self) -> bool:
        """Whether what the weights compute on the contexts of `verify` is finite, entropies and values included.

        Finite weights may be so large that it is not. All ranks call it.
        """
        outputs = self.edge_outputs(probe_row(_forked_contexts(self.lm)), with_entropy=True)
        said = (outputs.logprobs_E, outputs.values_E, outputs.entropy_E)
        return all(bool(torch.isfinite(part_E).all()) for part_E in said if part_E is not None)

    @torch.no_grad()
    def verify(self) -> None:
        """Compare packed edges with the model's own forward pass on two forked contexts.

        Raises:
            UnsupportedModel: a log-probability is off by more than rounding (1e-3 nats in fp32, 0.25 in bf16), or the
                model's own are not finite.
        """
        contexts = _forked_contexts(self.lm)
        packed_E = self.edge_outputs(probe_row(contexts), with_values=False).logprobs_E
        own = []
        for context in contexts:
            ids_BT = torch.tensor([context], device=self.device)
            logits_TV = self.lm(input_ids=ids_BT, use_cache=False).logits[0].float()
            own.append(torch.log_softmax(logits_TV[-2], dim=-1)[context[-1]])
        own_E = torch.stack(own)
        if not bool(torch.isfinite(own_E).all()):
            raise UnsupportedModel(
                f"{self.lm.config.model_type}: the model's own log-probabilities are not finite: its weights are "
                f"damaged, or too large for {self.precision}; name another checkpoint, or go back to a version before "
                "it with `tracegrad rollback`"
            )
        worst = float((packed_E - own_E).abs().max())
        if not worst <= (1e-3 if self.precision == "fp32" else 0.25):
            raise UnsupportedModel(
                f"{self.lm.config.model_type}: packed and plain log-probabilities differ by {worst:.3g} nats; "
                "its attention ignores the ancestry mask, or its head does more than a linear map"
            )


def load_language_model(path: str | Path) -> Any:
    """Load a folder in Hugging Face format, in float32 with `sdpa` attention."""
    with _LOADING:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")


def prepare(lm: Any, *, gradient_checkpointing: Mapping[str, Any] | None) -> None:
    """Take dropout out of a language model, and have it recompute its layers' activations where asked to.

    Raises:
        UnsupportedModel: its attention or head is not what packed rows are evaluated with.
    """
    _check_supported(lm)
    adopt(lm)
    rms_norm.adopt(lm)
    swiglu.adopt(lm)
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if gradient_checkpointing is not None:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(gradient_checkpointing))
    lm.train(gradient_checkpointing is not None)


def _take_masters(lm: Any, precision: Precision, ranks: Ranks) -> dict[str, nn.Parameter]:
    """Return the float32 parameters to train, by the LM's names; its weights are then what the precision says."""
    lm.float()
    if ranks.size > 1:  # which takes the shards to the device, not the whole
        shard_model(lm, ranks, computes_in=torch.bfloat16 if precision == "bf16" else None)
        return dict(lm.named_parameters())
    lm.to(ranks.device)
    if precision == "fp32":
        return dict(lm.named_parameters())
    masters = {
        name: nn.Parameter(parameter.detach().clone(), requires_grad=True) for name, parameter in lm.named_parameters()
    }
    round_weights(lm)
    embedding = lm.get_input_embeddings()
    if (
        type(embedding) is nn.Embedding
    ):  # else a gradient of the vocabulary's size, zeros nearly all of it, for each row
        embedding.sparse = True
    for name, weight in lm.named_parameters():
        weight.register_post_accumulate_grad_hook(_into_master(masters[name]))
    return masters


def _forked_contexts(lm: Any) -> list[list[int]]:
    """Two contexts with a common beginning, and one apart."""
    vocabulary = lm.get_output_embeddings().weight.shape[0]
    ids = [(7 * place * place + 3 * place + 1) % vocabulary for place in range(24)]
    return [ids[:16], ids[:8] + ids[16:24], ids[4:12]]


def round_weights(lm: Any) -> None:
    """Round the weights, and only these: `lm.to(bfloat16)` would also round the rotary frequencies.

    vLLM keeps those in float32.
    """
    for weight in lm.parameters():
        weight.data = weight.data.to(torch.bfloat16)


def _into_master(master: nn.Parameter) -> Any:
    """Make the hook that adds a weight's gradient to its master's, in float32, and lets go of the weight's own.

    The float32 buffer outlives `zero_grads`: fresh memory for every step would cost a page fault per 4 KB.
    """
    buffer = torch.empty_like(master, requires_grad=False)

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        if weight.grad.is_sparse:
            if master.grad is None:
                master.grad = buffer.zero_()
            tokens_T, grad_TD = weight.grad._indices()[0], weight.grad._values()
            master.grad.index_add_(0, tokens_T, grad_TD.to(master.dtype))
        elif master.grad is None:
            master.grad = buffer.copy_(weight.grad)
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return add


def _check_supported(lm: Any) -> None:
    config = lm.config
    for name in _UNUSUAL_HEADS:
        if getattr(config, name, None) not in {None, 1}:
            raise UnsupportedModel(f"{config.model_type}: `{name}` is set; this head is not implemented")
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if types != {"full_attention"} or sliding is not None:
        raise UnsupportedModel(f"{config.model_type}: only full attention can be packed; it has {sorted(types)}")


def _same_names(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if set(given) != set(own):
        odd = sorted(set(given) ^ set(own))[:5]
        raise UnsupportedModel(f"the state has other parameters than the model, first of them {odd}")
