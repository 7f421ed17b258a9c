"""What a step knows of its trained tokens before the updates (`Fixed`) and what the updates saw of them (`Seen`).

Flat `_N` arrays in the order of the choices, gathered into rows and scattered back. Refuses nothing. Called by `ppo`.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tracegrad.tracestore.algorithm import LossConfig
from tracegrad.trainer.batches import PackedRow
from tracegrad.trainer.evaluation import Floats
from tracegrad.trainer.losses import LossInputs, LossOutputs, aggregation_weights
from tracegrad.trainer.policy import EdgeOutputs
from tracegrad.trainer.ranks import Ranks


def float32(values_N: Floats | None) -> Tensor | None:
    """Return a tensor of the array, float32; None of None."""
    return None if values_N is None else torch.from_numpy(values_N).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """The rows of one update, and the denominators of all of them: trained tokens and choices."""

    rows: tuple[PackedRow, ...]
    n_tokens: int
    n_choices: int

    @staticmethod
    def of(rows: list[PackedRow]) -> "Minibatch":
        """Count the rows' tokens and choices. A choice lies in one row."""
        return Minibatch(
            rows=tuple(rows),
            n_tokens=sum(row.n_edges for row in rows),
            n_choices=sum(len(torch.unique(row.edge_choice_E)) for row in rows),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """What stays the same through all updates of a step, (N,) float32; `lengths` (B,): sampled tokens of each choice.

    Critic and reference may be absent. `proximal` is None where the policy that is being differentiated is the one
    that the step starts with.
    """

    lengths: Tensor
    behaviour: Tensor
    advantages: Tensor
    proximal: Tensor | None = None
    targets: Tensor | None = None
    old_values: Tensor | None = None
    reference: Tensor | None = None

    def to(self, device: torch.device) -> "Fixed":
        """Return it on another device."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in held.items() if tensor is not None})

    def inputs(self, row: PackedRow, outputs: EdgeOutputs, batch: Minibatch, config: LossConfig) -> LossInputs:
        """Gather one row's share."""
        index_E = row.edge_index_E

        def at(tensor_N: Tensor | None) -> Tensor | None:
            return None if tensor_N is None else tensor_N[index_E]

        proximal_E = at(self.proximal)
        return LossInputs(
            policy_logprobs_E=outputs.logprobs_E,
            proximal_logprobs_E=outputs.logprobs_E.detach() if proximal_E is None else proximal_E,
            behaviour_logprobs_E=self.behaviour[index_E],
            advantages_E=self.advantages[index_E],
            choice_E=row.edge_choice_E,
            weight_E=aggregation_weights(
                row.edge_choice_E, self.lengths, n_tokens=batch.n_tokens, n_choices=batch.n_choices, config=config
            ),
            reference_logprobs_E=at(self.reference),
            values_E=outputs.values_E,
            old_values_E=at(self.old_values),
            targets_E=at(self.targets),
            entropy_E=outputs.entropy_E,
        )


class Seen:
    """What the training passes computed, (N,), of each token's last one; NaN where nothing did."""

    def __init__(self, n_tokens: int) -> None:
        self.policy_N, self.values_N, self.entropy_N = (np.full(n_tokens, np.nan) for _ in range(3))
        self.ratio_N, self.clipped_N, self.dual_clipped_N = (np.full(n_tokens, np.nan) for _ in range(3))
        self.weight_N, self.rejected_N = (np.full(n_tokens, np.nan) for _ in range(2))
        self._mine_N = np.zeros(n_tokens, dtype=np.bool_)

    def exchange(self, ranks: Ranks) -> None:
        """Give the other ranks what was noted since the last exchange, and take what they noted. All ranks call it."""
        own = {name: array_N for name, array_N in vars(self).items() if not name.startswith("_")}
        found, known_N = ranks.merged(list(own.values()), self._mine_N)
        for array_N, found_N in zip(own.values(), found, strict=True):
            array_N[known_N] = found_N[known_N]
        self._mine_N[:] = False

    def note(self, row: PackedRow, outputs: EdgeOutputs, loss: LossOutputs) -> None:
        """Keep one row's outputs, detached."""
        index_E = row.edge_index_E.cpu().numpy()
        self._mine_N[index_E] = True
        for array_N, tensor_E in (
            (self.policy_N, outputs.logprobs_E),
            (self.values_N, outputs.values_E),
            (self.entropy_N, outputs.entropy_E),
            (self.ratio_N, loss.surrogate.ratio_E),
            (self.clipped_N, loss.surrogate.clipped_E),
            (self.dual_clipped_N, loss.surrogate.dual_clipped_E),
            (self.weight_N, loss.correction.weight_E),
            (self.rejected_N, loss.correction.rejected_E),
        ):
            if tensor_E is not None:
                array_N[index_E] = tensor_E.detach().double().cpu().numpy()
