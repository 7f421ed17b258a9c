"""bf16: the weights are rounded, the rotary frequencies are not (vLLM and transformers keep them in float32)."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tracegrad.trainer.policy import Policy


def test_bf16_rounds_weights_but_not_rotary_frequencies() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, rope_theta=1e4
    )
    lm = LlamaForCausalLM(config)
    exact = lm.model.rotary_emb.inv_freq.clone()
    policy = Policy(lm, precision="bf16")
    assert {p.dtype for p in policy.lm.parameters()} == {torch.bfloat16}
    assert torch.equal(policy.lm.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(exact, exact.bfloat16().float()), (
        "the frequencies must not be representable for this to bite"
    )
