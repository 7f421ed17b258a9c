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

    def first(self, count: int) -> "Evaluation":
        """Return that of the first tokens."""
        values_N, entropy_N = (None if array is None else array[:count] for array in (self.values_N, self.entropy_N))
        return Evaluation(logprobs_N=self.logprobs_N[:count], values_N=values_N, entropy_N=entropy_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """What is known of a step's choices before its first update.

    `proximal`: of the weights that the step starts with, where it needs that; `reference_N`: logprobs, nats, where
    there is a reference policy.
    """

    proximal: Evaluation | None = None
    reference_N: Floats | None = None


@torch.no_grad()
def evaluate(
    policy: Policy, rows: Sequence[PackedRow], n_tokens: int, *, with_values: bool, with_entropy: bool
) -> Evaluation:
    """Return what the policy says of every edge of `rows`; entries that no edge reaches stay NaN.

    Ranks divide the rows and each returns all: every rank is given the same rows.
    """
    logprobs_N, values_N, entropy_N = arrays = [np.full(n_tokens, np.nan) for _ in range(3)]
    mine_N = np.zeros(n_tokens, dtype=np.bool_)
    for row in policy.ranks.share(rows, lambda row: row.n_nodes):
        if row is None:
            policy.idle(with_values=with_values)
            continue
        outputs = policy.edge_outputs(row, with_values=with_values, with_entropy=with_entropy)
        index_E = row.edge_index_E.numpy()
        mine_N[index_E] = True
        for array_N, tensor in zip(arrays, (outputs.logprobs_E, outputs.values_E, outputs.entropy_E), strict=True):
            if tensor is not None:
                array_N[index_E] = tensor.double().cpu().numpy()
    (logprobs_N, values_N, entropy_N), _ = policy.ranks.merged(arrays, mine_N)
    return Evaluation(
        logprobs_N=logprobs_N,
        values_N=values_N if with_values else None,
        entropy_N=entropy_N if with_entropy else None,
    )


def choose_probe(choices: Sequence[ChoiceSample], n_tokens: int, max_tokens: int) -> list[ChoiceSample]:
    """Return the step's probe: chains of sampled answers, at least `n_tokens` sampled tokens in all if there are.

    A chain is a prompt followed by the distinct answers that were sampled to it, one after another, as far as
    `max_tokens` (prompt and answers; the first answer always). The engine scores prompts without its prefix cache, so
    chains cost it a fraction of what one sequence per answer would; what is compared is the same everywhere: what two
    sets of weights say of the same tokens after the same context. Prompts with most sampled tokens per token of the
    chain come first. Temperature is 1, as the engine's prompt logprobs know none.
    """
    answers: dict[tuple[int, ...], dict[tuple[int, ...], ChoiceSample]] = {}
    for choice in choices:
        answers.setdefault(choice.prompt_ids, {}).setdefault(choice.token_ids, choice)
    chains = [_chain(prompt_ids, list(sampled.values()), max_tokens) for prompt_ids, sampled in answers.items()]
    chains.sort(key=lambda chain: -len(chain.token_ids) / (len(chain.prompt_ids) + len(chain.token_ids)))
    chosen: list[ChoiceSample] = []
    tokens = 0
    for chain in chains:
        if tokens >= n_tokens:
            break
        chosen.append(chain)
        tokens += len(chain.token_ids)
    return chosen


def _chain(prompt_ids: tuple[int, ...], sampled: Sequence[ChoiceSample], max_tokens: int) -> ChoiceSample:
    token_ids = sampled[0].token_ids
    for choice in sampled[1:]:
        if len(prompt_ids) + len(token_ids) + len(choice.token_ids) <= max_tokens:
            token_ids += choice.token_ids
    return replace(
        sampled[0],
        token_ids=token_ids,
        behaviour_logprobs=(0.0,) * len(token_ids),
        temperature=1.0,
        kept_ids=None,
        version_spans=(),
    )


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
