"""Batches: packed rows as tensors, and the split of a step into minibatches of whole groups.

A `PackedRow` is one sequence (batch dimension 1) without padding; its mask is made on demand from subtree ends, so
that a batch never holds T x T values per row. It refuses nothing that `packing` let through. Called by the learner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tracegrad.trainer.packing import Row, pack
from tracegrad.trainer.samples import ChoiceSample, Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """The tensors of one row. int64 but for temperatures (float32). See `packing.Row` for the meaning.

    `slot_parent_S`, `slot_temperature_S`: the distinct (parent, temperature) pairs at which logits are needed, and
    `edge_slot_E`: the slot of each edge. `edge_index_E` gathers from the batch's flat `_N` arrays.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    end_T: Tensor
    edge_parent_E: Tensor
    edge_token_E: Tensor
    edge_temperature_E: Tensor
    edge_choice_E: Tensor
    edge_offset_E: Tensor
    edge_index_E: Tensor
    edge_slot_E: Tensor
    edge_kept_E: Tensor
    kept_token_K: Tensor
    slot_parent_S: Tensor
    slot_temperature_S: Tensor

    @property
    def n_nodes(self) -> int:
        """Tokens the model computes for this row."""
        return self.token_ids_T.shape[0]

    @property
    def n_edges(self) -> int:
        """Tokens this row trains."""
        return self.edge_token_E.shape[0]

    def mask(self) -> Tensor:
        """Return (1, 1, T, T) bool: query i attends key j iff j is i or an ancestor of i."""
        node = torch.arange(self.n_nodes, device=self.token_ids_T.device)
        return ((node[None, :] <= node[:, None]) & (node[:, None] < self.end_T[None, :]))[None, None]

    def to(self, device: torch.device | str) -> "PackedRow":
        """Return the row on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def packed_row(row: Row) -> PackedRow:
    """Turn a row into tensors."""
    pairs = np.stack([row.edge_parent_E.astype(np.float64), row.edge_temperature_E])
    slots, slot_E = np.unique(pairs, axis=1, return_inverse=True)
    return PackedRow(
        token_ids_T=torch.from_numpy(row.token_ids_T),
        position_ids_T=torch.from_numpy(row.depth_T),
        end_T=torch.from_numpy(row.end_T),
        edge_parent_E=torch.from_numpy(row.edge_parent_E),
        edge_token_E=torch.from_numpy(row.edge_token_E),
        edge_temperature_E=torch.from_numpy(row.edge_temperature_E).float(),
        edge_choice_E=torch.from_numpy(row.edge_choice_E),
        edge_offset_E=torch.from_numpy(row.edge_offset_E),
        edge_index_E=torch.from_numpy(row.edge_index_E),
        edge_slot_E=torch.from_numpy(slot_E.reshape(-1).astype(np.int64)),
        edge_kept_E=torch.from_numpy(row.edge_kept_E),
        kept_token_K=torch.from_numpy(row.kept_token_K),
        slot_parent_S=torch.from_numpy(slots[0].astype(np.int64)),
        slot_temperature_S=torch.from_numpy(slots[1]).float(),
    )


def probe_row(contexts: Sequence[Sequence[int]]) -> PackedRow:
    """Pack raw sequences; edge e predicts the last token of ``contexts[e]`` from those before it, at temperature 1."""
    choices = [
        ChoiceSample(
            run_id="probe",
            group_id=None,
            task_id=None,
            call_id=f"probe {index}",
            choice_index=0,
            role=None,
            turn=Turn(),
            prompt_ids=tuple(context[:-1]),
            token_ids=(context[-1],),
            behaviour_logprobs=(0.0,),
            temperature=1.0,
            finish_reason="stop",
            version_id=0,
        )
        for index, context in enumerate(contexts)
    ]
    row = pack(choices, row_tokens=sum(len(context) for context in contexts)).rows[0]
    order = np.argsort(row.edge_choice_E, kind="stable")
    edges = {f.name: getattr(row, f.name)[order] for f in fields(row) if f.name.endswith("_E")}
    return packed_row(replace(row, **edges))


def split_groups(choices: Sequence[ChoiceSample], parts: int, *, seed: int | None = None) -> list[list[int]]:
    """Split choice indices into at most `parts` minibatches of whole groups, near equal in trained tokens.

    Groups are taken in order of appearance, or in an order drawn from `seed`; each goes to the part that has the
    fewest tokens. Parts that would be empty are left out. Indices inside a part are ascending. Deterministic.
    """
    groups: dict[str, list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(choice.group_key, []).append(index)
    order = list(groups)
    if seed is not None:
        order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    members: list[list[int]] = [[] for _ in range(max(parts, 1))]
    tokens = [0] * len(members)
    for group in order:
        lightest = tokens.index(min(tokens))
        members[lightest].extend(groups[group])
        tokens[lightest] += sum(len(choices[index].token_ids) for index in groups[group])
    return [sorted(part) for part in members if part]
