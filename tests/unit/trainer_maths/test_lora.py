"""Adapters on one base: equal to merged weights and to what peft loads, and each apart from the others."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config

from tracegrad.tracestore.config import AdapterConfig
from tracegrad.trainer.batches import packed_row
from tracegrad.trainer.errors import UnsupportedModel
from tracegrad.trainer.lora import Trunk
from tracegrad.trainer.packing import pack
from tracegrad.trainer.policy import Policy
from tracegrad.trainer.weights import save_serving

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CONFIGS = pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SMALL, tie_word_embeddings=True), Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False)],
    ids=["llama-tied", "qwen3-untied"],
)
LLAMA = LlamaConfig(**SMALL)
ADAPTER = AdapterConfig(of="base", rank=4, alpha=8.0)


def language_model(config=LLAMA):
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def trained(policy, seed=0):
    """An adapter that no longer computes what its base does, and a critic that says something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*policy.lm_masters().values(), *policy.value_masters().values()]:
            parameter.normal_(std=0.2, generator=generator)
    return policy


@pytest.fixture(scope="module")
def row(make_choice):
    shapes = [((1, 2, 3, 4), (5, 6, 7)), ((1, 2, 3, 4), (8, 9)), ((1, 2, 3, 4, 8, 9, 12), (14, 15)), ((30, 31), (33,))]
    choices = [make_choice(p, t, temperature=0.7 + 0.3 * (i % 2)) for i, (p, t) in enumerate(shapes)]
    return packed_row(pack(choices, row_tokens=100).rows[0])


def merged(config, policy, adapter):
    """The second implementation: W + alpha / rank * B @ A in a plain model."""
    lm = language_model(config)
    state = policy.lm_state()
    for name in [n for n in state if ".lora_A." in n]:
        module = lm.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        down, up = state[name], state[name.replace(".lora_A.", ".lora_B.")]
        module.weight.data += adapter.alpha / adapter.rank * (up @ down)
    plain = Policy(lm)
    plain.load_value_state(policy.value_state())
    return plain


@CONFIGS
def test_an_adapter_equals_its_merged_weights(config, row):
    policy = trained(Trunk(language_model(config)).adapter("p", ADAPTER))
    assert len(policy.lm_masters()) == 2 * 7 * 2, "A and B of seven linear layers in two blocks"
    ours, theirs = policy.edge_outputs(row, with_entropy=True), merged(config, policy, ADAPTER).edge_outputs(row)
    torch.testing.assert_close(ours.logprobs_E, theirs.logprobs_E, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(ours.values_E, theirs.values_E, rtol=0.0, atol=1e-5)
    of_base = Policy(language_model(config)).edge_outputs(row).logprobs_E
    assert float((ours.logprobs_E - of_base).detach().abs().max()) > 0.1


@CONFIGS
def test_gradients_are_those_of_the_merged_weights(config, row):
    """dL/dB = scale * dL/dW @ A^T and dL/dA = scale * B^T @ dL/dW, with dL/dW of the merged model."""
    policy = trained(Trunk(language_model(config)).adapter("p", ADAPTER))
    plain = merged(config, policy, ADAPTER)
    for each in (policy, plain):
        outputs = each.edge_outputs(row)
        (outputs.logprobs_E.sum() + outputs.values_E.square().sum()).backward()
    of_weights = plain.lm_masters()
    masters, scale = policy.lm_masters(), ADAPTER.alpha / ADAPTER.rank
    for name in [n for n in masters if ".lora_A." in n]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = masters[name], masters[name.replace(".lora_A.", ".lora_B.")]
        gradient = of_weights[f"{module}.weight"].grad
        for found, expected in ((up.grad, scale * gradient @ down.T), (down.grad, scale * up.T @ gradient)):
            size = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * max(size, 1.0))


def test_a_new_adapter_is_the_base_whatever_the_seed(row):
    trunk = Trunk(language_model())
    expected = Policy(language_model()).edge_outputs(row).logprobs_E
    for seed in (0, 1):
        policy = trunk.adapter("p", ADAPTER, seed=seed)
        torch.testing.assert_close(policy.edge_outputs(row).logprobs_E, expected, rtol=0.0, atol=1e-6)
    assert set(Trunk(language_model()).adapter("p", ADAPTER).lm_state()) == set(policy.lm_state())


def test_adapters_do_not_touch_one_another_nor_their_base(row):
    """Two adapters of other ranks and targets: training one moves neither the other nor the base, bitwise."""
    trunk = Trunk(language_model())
    bare = trunk.bare()
    of_base = bare.edge_outputs(row, with_values=False).logprobs_E.detach()
    first = trained(trunk.adapter("p", ADAPTER), seed=1)
    second = trained(trunk.adapter("w", AdapterConfig(of="base", rank=2, targets=("q_proj", "v_proj"))), seed=2)
    before = {policy: policy.edge_outputs(row).logprobs_E.detach() for policy in (first, second)}
    assert float((before[first] - before[second]).abs().max()) > 0.1
    first.edge_outputs(row).logprobs_E.sum().backward()
    assert all(parameter.grad is None for parameter in second.lm_masters().values())
    with torch.no_grad():
        for parameter in first.lm_masters().values():
            parameter.sub_(0.1 * parameter.grad)
    assert torch.equal(second.edge_outputs(row).logprobs_E, before[second])
    assert not torch.equal(first.edge_outputs(row).logprobs_E, before[first])
    assert torch.equal(bare.edge_outputs(row, with_values=False).logprobs_E, of_base)
    assert bare.lm_masters() == {}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_backward_pass_belongs_to_the_adapter_of_its_forward_pass(row, gradient_checkpointing):
    """Forward p, forward w, backward p: recomputed activations must be p's, whoever computed in the meantime.

    Through the values: the head's own recomputation already asks for p's model, which would hide it.
    """
    found = []
    for interleave in (False, True):
        trunk = Trunk(language_model(), gradient_checkpointing=gradient_checkpointing)
        first, second = trained(trunk.adapter("p", ADAPTER), 1), trained(trunk.adapter("w", ADAPTER), 2)
        values = first.edge_outputs(row).values_E
        if interleave:
            second.edge_outputs(row)
        values.sum().backward()
        found.append([parameter.grad.clone() for parameter in first.lm_masters().values()])
    assert all(torch.equal(alone, between) for alone, between in zip(*found, strict=True))


def test_a_bf16_base_keeps_float32_adapters(row):
    trunk = Trunk(language_model(), precision="bf16")
    policy = trained(trunk.adapter("p", ADAPTER))
    frozen = [p for name, p in trunk.lm.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in frozen} == {torch.bfloat16} and not any(p.requires_grad for p in frozen)
    assert {p.dtype for p in policy.lm_masters().values()} == {torch.float32}
    assert trunk.lm.model.rotary_emb.inv_freq.dtype == torch.float32
    outputs = policy.edge_outputs(row)
    outputs.logprobs_E.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.lm_masters().values())
    assert all(p.grad is None for p in frozen)
    exact = trained(Trunk(language_model()).adapter("p", ADAPTER)).edge_outputs(row)
    torch.testing.assert_close(outputs.logprobs_E, exact.logprobs_E, rtol=0.0, atol=0.3)


def test_an_unknown_target_is_refused_with_the_near_misses():
    trunk = Trunk(language_model())
    with pytest.raises(UnsupportedModel, match=r"models\.p\.adapter\.targets names 'q_prj'.*did you mean .*q_proj"):
        trunk.adapter("p", AdapterConfig(of="base", targets=("q_prj",)))
    with pytest.raises(UnsupportedModel, match="no linear layer below the head"):
        trunk.adapter("p", AdapterConfig(of="base", targets=("lm_head",)))


def test_what_is_saved_is_what_peft_loads(row, tmp_path):
    """peft puts the folder on a plain copy of the base: the same logprobs, so the names and the scale are peft's."""
    language_model().save_pretrained(tmp_path / "base")
    trunk = Trunk.from_checkpoint(tmp_path / "base", "fp32")
    policy = trained(trunk.adapter("p", AdapterConfig(of="base", rank=4, alpha=12.0, targets=("o_proj", "up_proj"))))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_serving(folder, policy, torch.float32, tmp_path / "base")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), folder)
    ids = [1, 2, 3, 4, 8, 9]
    logits = theirs(input_ids=torch.tensor([ids])).logits[0, 3:5]
    expected = torch.log_softmax(logits, -1)[[0, 1], ids[4:]]
    own = policy.lm(input_ids=torch.tensor([ids])).logits[0, 3:5]
    torch.testing.assert_close(torch.log_softmax(own, -1)[[0, 1], ids[4:]], expected, rtol=0.0, atol=1e-5)
