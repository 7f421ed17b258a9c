"""Ranks: the workers of one group, each of which holds a share of the weights and computes a share of the rows.

Every rank is given the same plan and the same samples, and decides the same; only the rows that it computes are its
own. What rows say of their tokens is summed back (each token is one rank's, so the sum is exact): credit, denominators,
refusals and metrics are those of the whole batch on every rank. Rows are never cut: a rank computes whole trees. It
refuses nothing; a rank that dies ends the collectives of the others with an error. A worker without company is `ALONE`,
and nothing of torch.distributed is touched. Called by the learner and what it is made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Row = TypeVar("Row")
Floats = NDArray[np.float64]
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
_CPU = torch.device("cpu")
_PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others. Whoever holds the processes ends them all when one dies, long before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This worker among those of its group. `mesh`: all of them, in one dimension; None of a worker alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    mesh: Any = None

    @property
    def leads(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def share(self, rows: Sequence[Row], tokens: Callable[[Row], int]) -> list[Row | None]:
        """Return the rows that this rank computes, in turn; None where others still have one and it has not.

        Each row goes to the rank with the fewest tokens so far, the longest first, so that ranks pass through rows of
        about one length at a time. Alone: all rows as they are. Deterministic.
        """
        if self.size == 1:
            return list(rows)
        return [
            None if index is None else rows[index] for index in divided([tokens(r) for r in rows], self.size)[self.rank]
        ]

    def sums(self, *values: float) -> tuple[float, ...]:
        """Return the sum of each value over the ranks, in float64."""
        if self.size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return tuple(summed.tolist())

    def largest(self, value: float) -> float:
        """Return the greatest of the ranks' values."""
        if self.size == 1:
            return value
        greatest = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return float(greatest)

    def merged(self, arrays: Sequence[Floats], mine_N: NDArray[np.bool_]) -> tuple[list[Floats], NDArray[np.bool_]]:
        """Put together what each rank knows of its own tokens; return the arrays and whose entries anybody knew.

        No two ranks may know the same entry. Entries that nobody knows are NaN.
        """
        if self.size == 1:
            return list(arrays), mine_N
        own = np.stack([*(np.where(mine_N, array_N, 0.0) for array_N in arrays), mine_N.astype(np.float64)])
        summed = torch.from_numpy(own)
        dist.all_reduce(summed)
        *known, count_N = summed.numpy()
        return [np.where(count_N > 0.0, array_N, np.nan) for array_N in known], count_N > 0.0


ALONE = Ranks()


def join(rank: int, size: int, device: str, store: Any) -> Ranks:
    """Meet the other ranks at a store of torch.distributed. On CUDA each process must see one GPU, its own."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group(_BACKENDS[device], store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    return Ranks(rank=rank, size=size, device=device_of(device), mesh=init_device_mesh(device, (size,)))


def meeting_place(host: str, size: int, *, port: int = 0) -> Any:
    """Return the store at a port; without one, open it here, at a port that is free."""
    return dist.TCPStore(host, port, size, is_master=port == 0, wait_for_workers=False)  # type: ignore[attr-defined]


def device_of(name: str) -> torch.device:
    """Return the device that `trainer.workers.device` names to a worker: of GPUs the first that it sees."""
    return _CPU if name == "cpu" else torch.device(name, 0)


def divided(tokens: Sequence[int], size: int) -> list[list[int | None]]:
    """Divide rows of so many tokens: for each rank the rows it computes, longest first, filled up with None."""
    shares: list[list[int | None]] = [[] for _ in range(size)]
    loads = [0] * size
    for index in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += tokens[index]
    turns = max(map(len, shares), default=0)
    return [[*share, *[None] * (turns - len(share))] for share in shares]


def slowest(tokens: Sequence[int], size: int, cost: Callable[[int], float]) -> float:
    """Return what the rows cost when divided: in each turn all ranks wait for the one with the longest row."""
    turns = zip(*divided(tokens, size), strict=True)
    return sum(max(cost(tokens[index]) for index in turn if index is not None) for turn in turns)
