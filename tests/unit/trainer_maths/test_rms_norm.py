"""The lean RMSNorm computes what the stock one does, forward and backward, and replaces no norm of another kind."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tracegrad.trainer.rms_norm import adopt


def norm_and_states(dtype: torch.dtype, scale: float):
    generator = torch.Generator().manual_seed(0)
    stock = LlamaRMSNorm(16, eps=1e-5)
    with torch.no_grad():
        stock.weight.normal_(generator=generator)
    return stock, (scale * torch.randn(2, 5, 16, generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_the_stock_ones(dtype, scale):
    stock, states = norm_and_states(dtype, scale)
    stock.to(dtype)
    weights = torch.linspace(-1.0, 1.0, states.numel()).view(states.shape).to(dtype)
    expected = stock(states)
    expected_grads = torch.autograd.grad((weights * expected).sum(), [states, stock.weight])
    stock.float()
    assert adopt(stock) == 1
    stock.to(dtype)
    found = stock(states)
    grads = torch.autograd.grad((weights * found).sum(), [states, stock.weight])
    exact = dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6 if exact else 1e-2, atol=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < (1e-5 if exact else 2e-2)


def test_bfloat16_outputs_round_where_the_stock_norm_rounds():
    stock, states = norm_and_states(torch.bfloat16, 1.0)
    stock.to(torch.bfloat16)
    expected = stock(states)
    stock.float()
    adopt(stock)
    assert float((stock.to(torch.bfloat16)(states) == expected).float().mean()) > 0.98


def test_a_norm_of_another_kind_stays_as_it_is():
    other = GemmaRMSNorm(16)
    before = other.forward
    assert adopt(other) == 0
    assert other.forward == before
