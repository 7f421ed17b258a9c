"""Evaluate a policy on packed rows without gradients: flat `_N` arrays in the order of the choices.

Called by the learner for proximal and reference logprobs, values, and the scores of the publish probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from tracegrad.trainer.batches import PackedRow
from tracegrad.trainer.credit import token_starts
from tracegrad.trainer.packing import pack
from tracegrad.trainer.policy import Policy
from tracegrad.trainer.results import Scored
from tracegrad.trainer.samples import ChoiceSample

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One entry per sampled token. `values_N`, `entropy_N`: None where not asked for."""

    logprobs_N: Floats
    values_N: Floats | None
    entropy_N: Floats | None


@torch.no_grad()
def evaluate(
    policy: Policy, rows: Sequence[PackedRow], n_tokens: int, *, with_values: bool, with_entropy: bool
) -> Evaluation:
    """Return what the policy says of every edge of `rows`; entries that no edge reaches stay NaN."""
    arrays = {name: np.full(n_tokens, np.nan) for name in ("logprobs", "values", "entropy")}
    for row in rows:
        outputs = policy.edge_outputs(row, with_values=with_values, with_entropy=with_entropy)
        index_E = row.edge_index_E.numpy()
        for name, tensor in (
            ("logprobs", outputs.logprobs_E),
            ("values", outputs.values_E),
            ("entropy", outputs.entropy_E),
        ):
            if tensor is not None:
                arrays[name][index_E] = tensor.double().numpy()
    return Evaluation(
        logprobs_N=arrays["logprobs"],
        values_N=arrays["values"] if with_values else None,
        entropy_N=arrays["entropy"] if with_entropy else None,
    )


def at_temperature_one(choices: Sequence[ChoiceSample]) -> list[ChoiceSample]:
    """Return the same choices as the engine scores them: its prompt logprobs know no temperature."""
    return [replace(choice, temperature=1.0) for choice in choices]


def choose_probe(choices: Sequence[ChoiceSample], n_tokens: int, row_tokens: int) -> list[int]:
    """Return indices of whole groups with at least `n_tokens` sampled tokens in all (or everything there is).

    Groups that show the most sampled tokens per computed token come first: the probe is scored twice a step.
    """
    groups: dict[str, list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(choice.group_key, []).append(index)
    stats = {key: pack(choices, row_tokens=row_tokens, select=group).stats for key, group in groups.items()}
    chosen: list[int] = []
    tokens = 0
    for key in sorted(groups, key=lambda key: -stats[key].n_edges / stats[key].n_nodes):
        if tokens >= n_tokens:
            break
        chosen += groups[key]
        tokens += stats[key].n_edges
    return sorted(chosen)


def scored(choices: Sequence[ChoiceSample], logprobs_N: Floats) -> tuple[Scored, ...]:
    """Cut flat logprobs at the choices' bounds."""
    starts = token_starts(choices)
    return tuple(
        Scored(
            ids=choice.prompt_ids + choice.token_ids,
            n_prompt=len(choice.prompt_ids),
            logprobs=tuple(logprobs_N[starts[index] : starts[index + 1]].tolist()),
        )
        for index, choice in enumerate(choices)
    )
