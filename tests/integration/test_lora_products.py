"""Our products of adapters are vLLM's, but for tokens without an adapter: there vLLM's give them the last one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tracegrad.trainer import lora_products

pytestmark = pytest.mark.engine
TOKENS, IN, RANK, OUT = 9, 12, 4, 10
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("bgmv_shrink", (0.5,)),
    ("bgmv_expand", (True,)),
    ("bgmv_expand", (False,)),
    ("bgmv_expand_slice", (3, OUT, True)),
    ("bgmv_expand_slice", (3, OUT, False)),
]


def computed(function: Callable[..., None], name: str, indices: list[int], rest: tuple[Any, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size_in, size_out = (IN, RANK) if name == "bgmv_shrink" else (RANK, OUT)
    inputs = torch.randn(TOKENS, size_in, generator=generator)
    weights = torch.randn(2, 1, size_out, size_in, generator=generator)
    output = torch.randn(TOKENS, OUT + 5, generator=generator)
    function(inputs, weights, output, torch.tensor(indices), *rest)
    return output


@pytest.mark.parametrize(("name", "rest"), CALLS)
def test_they_are_vllms_and_leave_the_base_alone(name: str, rest: tuple[Any, ...]) -> None:
    from vllm.lora.ops.torch_ops import lora_ops

    stock, ours = getattr(lora_ops, name), getattr(lora_products, name)
    for indices in ([0] * TOKENS, [0, 1, 1, 0, 0, 1, 0, 1, 1]):
        torch.testing.assert_close(computed(ours, name, indices, rest), computed(stock, name, indices, rest))
    mixed = [0, -1, 1, -1, 0, 1, 1, -1, 0]
    base = [row for row, index in enumerate(mixed) if index < 0]
    last = [1 if index < 0 else index for index in mixed]
    torch.testing.assert_close(computed(stock, name, mixed, rest), computed(stock, name, last, rest))
    got, untouched = computed(ours, name, mixed, rest), computed(lambda *_: None, name, mixed, rest)
    wanted = computed(stock, name, mixed, rest)
    adds = rest[-1] is True
    for row in base:
        wanted[row] = untouched[row]
        if not adds:
            offset, columns = (rest[0], OUT) if len(rest) == 3 else (0, RANK if name == "bgmv_shrink" else OUT)
            wanted[row, offset : offset + columns] = 0.0
    torch.testing.assert_close(got, wanted)


def test_the_plugin_puts_them_in_place() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from tracegrad.trainer.worker_extension import tracegrad_register

    before = {name: getattr(lora_ops, name) for name, _ in CALLS}
    try:
        for _ in range(2):
            tracegrad_register()
        assert all(
            getattr(module, name) is getattr(lora_products, name)
            for name in before
            for module in (lora_ops, punica_cpu)
        )
    finally:
        for name, function in before.items():
            setattr(lora_ops, name, function)
            setattr(punica_cpu, name, function)
