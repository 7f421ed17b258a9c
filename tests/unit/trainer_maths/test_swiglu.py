"""The lean gated MLP computes what the stock one does, forward and backward, also where an adapter lies on a layer."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from tracegrad.trainer.swiglu import adopt

SIZES = {"hidden_size": 64, "intermediate_size": 160}


@pytest.mark.parametrize("adapted", [(), ("down_proj",), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_the_stock_ones(dtype, adapted):
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(**SIZES))
    stock = mlp.forward
    assert adopt(mlp) == 1
    own = mlp.forward
    if adapted:
        inject_adapter_in_model(LoraConfig(target_modules=list(adapted), r=2, init_lora_weights=False), mlp)
    mlp.to(dtype)
    states = torch.randn(1, 12, 64).to(dtype).requires_grad_()
    wanted = [states, *(p for p in mlp.parameters() if p.requires_grad)]
    found, expected = own(states), stock(states)
    seeds = torch.randn(expected.shape).to(dtype)
    grads = zip(torch.autograd.grad(found, wanted, seeds), torch.autograd.grad(expected, wanted, seeds), strict=True)
    for a, b in [(found, expected), *grads]:
        assert float((a - b).float().norm() / b.float().norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_an_mlp_of_another_kind_stays_as_it_is():
    other = GemmaMLP(GemmaConfig(**SIZES))
    before = other.forward
    assert adopt(other) == 0
    assert other.forward == before
