"""Sums over choices inside a row, spread back over their tokens. Tensors in, tensors out.

A row holds all sampled tokens of a choice, or none (`packing`), so that a row knows the whole of each of its choices.
Refuses nothing. Called by `surrogates` and `corrections`.
"""

import torch
from torch import Tensor


def choice_sums(values_E: Tensor, choice_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return (E,) the sum of `values_E` over each edge's choice, and (E,) the number of its edges (int64)."""
    _, place_E, count_C = torch.unique(choice_E, return_inverse=True, return_counts=True)
    sum_C = values_E.new_zeros(len(count_C)).index_add(0, place_E, values_E)
    return sum_C[place_E], count_C[place_E]


def choice_means(values_E: Tensor, choice_E: Tensor) -> Tensor:
    """Return (E,) the mean of `values_E` over each edge's choice."""
    sum_E, count_E = choice_sums(values_E, choice_E)
    return sum_E / count_E
