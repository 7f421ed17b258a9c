"""What the models of a step tell one another before any of them trains. Flat float64 arrays; no I/O, no torch.

Critics' values go from model to model by call: never ids, so tokenizers may differ, and never weights. Who has no
critic (frozen models, outside APIs, group-relative rules) has none to give. Made and read by `ppo`, carried by
`worker_groups`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tracegrad.trainer.comparison import Statistics

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticValues:
    """A critic's values of the choices that one model trains on in a step.

    `calls`: (run, call) of each choice; the tokens of choice b are ``starts[b]:starts[b + 1]``. `values_N`: of the
    state each token was sampled in. `token_rewards_N`: what is added to the rewards token by token, None if nothing is.
    """

    calls: tuple[tuple[str, str], ...]
    starts: Ints
    values_N: Floats
    token_rewards_N: Floats | None = None

    @staticmethod
    def joined(parts: Sequence["CriticValues"]) -> "CriticValues":
        """Return those of all parts, one after another; of one part itself. All have token rewards, or none has."""
        if len(parts) == 1:
            return parts[0]
        before = np.cumsum([0] + [int(part.starts[-1]) for part in parts])
        token_rewards = [part.token_rewards_N for part in parts if part.token_rewards_N is not None]
        return CriticValues(
            calls=tuple(call for part in parts for call in part.calls),
            starts=np.concatenate(
                [np.zeros(1, dtype=np.int64), *(p.starts[1:] + at for p, at in zip(parts, before[:-1], strict=True))]
            ),
            values_N=np.concatenate([part.values_N for part in parts]),
            token_rewards_N=np.concatenate(token_rewards) if token_rewards else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What every model of a step is told. `values`: model -> its critic's; `batch`: of the advantages of all models."""

    values: Mapping[str, CriticValues] = field(default_factory=dict)
    batch: Statistics | None = None

    def foreign(self, model: str) -> tuple[CriticValues, ...]:
        """Return the values of all critics but the model's own."""
        return tuple(values for other, values in self.values.items() if other != model)
