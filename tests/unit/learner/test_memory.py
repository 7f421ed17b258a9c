"""Freed heap is kept up to a bound, and given back beyond it."""

import torch

from tracegrad.trainer.memory import return_freed_memory


def test_freed_memory_is_returned_beyond_the_bound_alone() -> None:
    blocks = [torch.ones(25_000) for _ in range(400)]  # 40 MB in pieces that malloc takes from its heap
    kept = blocks[::2]
    del blocks
    assert not return_freed_memory(kept_bytes=1 << 50)
    assert return_freed_memory(kept_bytes=0)
    assert float(sum(block.sum() for block in kept)) == 200 * 25_000
