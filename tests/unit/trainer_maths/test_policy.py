"""Packed = unpacked: log-probabilities, values and every gradient, on random small models of two architectures."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tracegrad.tracestore.algorithm import AlgorithmConfig
from tracegrad.trainer.batches import packed_row, split_groups
from tracegrad.trainer.errors import UnsupportedModel
from tracegrad.trainer.losses import LossInputs, objective
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
TIED_LLAMA = LlamaConfig(**SMALL, tie_word_embeddings=True)
UNTIED_QWEN = Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False)
CONFIGS = pytest.mark.parametrize("config", [TIED_LLAMA, UNTIED_QWEN], ids=["llama-tied", "qwen3-untied"])


def build(config, **options):
    torch.manual_seed(7)
    policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), **options)
    with torch.no_grad():
        policy.value_head.output.weight.normal_(generator=torch.Generator().manual_seed(1))
    return policy


@pytest.fixture(scope="module")
def choices(make_choice):
    """Shared prompts, forks, identical answers, answers that are prefixes of others, a later turn, several trees."""
    shapes = [
        ((1, 2, 3, 4), (5, 6, 7)),
        ((1, 2, 3, 4), (5, 6, 7)),
        ((1, 2, 3, 4), (5, 6)),
        ((1, 2, 3, 4), (8, 9, 10, 11)),
        ((1, 2, 3, 4, 5, 6, 7, 12, 13), (14, 15)),
        ((20, 21), (22, 23, 24)),
        ((20, 21), (23,)),
        ((30, 31, 32), (33, 34)),
    ]
    return [
        make_choice(p, t, group_id=f"g{p[0]}", run_id=f"r{i}", temperature=0.7 if i % 3 == 1 else 1.0)
        for i, (p, t) in enumerate(shapes)
    ]


def unpacked(policy, choices):
    """The second implementation: one plain causal row per choice, whole logits, no mask given."""
    logprobs, values, entropies = [], [], []
    for choice in choices:
        ids = torch.tensor([choice.prompt_ids + choice.token_ids])
        hidden = policy.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        first = len(choice.prompt_ids) - 1
        states = hidden[first : first + len(choice.token_ids)]
        log_softmax = torch.log_softmax(policy.lm.lm_head(states) / choice.temperature, -1)
        logprobs.append(log_softmax.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0])
        entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
        values.append(policy.value_head(states))
    return torch.cat(logprobs), torch.cat(values), torch.cat(entropies)


def packed(policy, choices, row_tokens, select=None):
    """All rows, scattered into the flat order of the choices."""
    size = sum(len(choice.token_ids) for choice in choices)
    flat = [torch.zeros(size) for _ in range(3)]
    for row in map(packed_row, pack(choices, row_tokens=row_tokens, select=select).rows):
        out = policy.edge_outputs(row, with_entropy=True)
        for i, part in enumerate((out.logprobs_E, out.values_E, out.entropy_E)):
            flat[i] = flat[i].index_copy(0, row.edge_index_E, part)
    return flat


def weighed(logprobs, values, entropies):
    """Something that gives every edge another weight in all three outputs."""
    weights = torch.linspace(-1.0, 1.0, len(logprobs))
    return (weights * logprobs).sum() + (weights.flip(0) * values.square()).sum() + (weights * entropies).sum()


def gradients(policy):
    named = {**policy.lm_masters(), **policy.value_masters()}
    return {name: parameter.grad.clone() for name, parameter in named.items()}


@CONFIGS
@pytest.mark.parametrize("row_tokens", [1000, 14, 1])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_packed_outputs_and_gradients_equal_unpacked_ones(choices, config, row_tokens, gradient_checkpointing):
    policy = build(config, slot_chunk=3, gradient_checkpointing=gradient_checkpointing)
    plain = unpacked(policy, choices)
    weighed(*plain).backward()
    expected = gradients(policy)
    policy.zero_grads()
    ours = packed(policy, choices, row_tokens)
    weighed(*ours).backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    found = gradients(policy)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0.0, name
        torch.testing.assert_close(found[name], gradient, rtol=0.0, atol=1e-5 * max(scale, 1.0), msg=name)


@CONFIGS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_logits_of_two_chunks_wait_for_the_backward_pass(make_choice, config, *, precision, with_entropy, kept):
    """20 slots in chunks of 3: the last two chunks are slots 15 to 19. All would be 20; with kept sets none waits."""
    ids = tuple(range(20))
    choice = make_choice((1, 2, 3), ids, kept_ids=tuple((token, 60) for token in ids) if kept else None)
    row = packed_row(pack([choice], row_tokens=1000).rows[0])
    assert len(row.slot_parent_S) == 20
    policy = build(config, precision=precision, slot_chunk=3)
    head, vocabulary = policy.lm.get_output_embeddings().weight, SMALL["vocab_size"]
    waiting = []

    def note(tensor):
        if tensor.shape[-1:] == (vocabulary,) and tensor.data_ptr() != head.data_ptr():
            waiting.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = policy.edge_outputs(row, with_entropy=with_entropy)
    assert sum(tensor.numel() for tensor in waiting) == (0 if kept else 5 * vocabulary)
    assert {tensor.dtype for tensor in waiting} <= {torch.float32 if precision == "fp32" else torch.bfloat16}
    out.logprobs_E.sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in policy.lm_masters().values())


def test_a_dense_mask_gives_what_blocks_give(choices):
    """As on a GPU, or with a model whose attention is its own."""
    policy = build(TIED_LLAMA)
    blocks = packed(policy, choices, 1000)
    policy.lm.set_attn_implementation("sdpa")
    for a, b in zip(blocks, packed(policy, choices, 1000), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@CONFIGS
def test_the_mask_matters(choices, config):
    """The control: with a merely causal mask the same comparison must fail, so it does see the mask."""
    policy = build(config)
    row = packed_row(pack(choices, row_tokens=1000).rows[0])
    right = policy.edge_outputs(row).logprobs_E.detach()
    causal = row.to("cpu")
    object.__setattr__(causal, "end_T", torch.full_like(row.end_T, row.n_nodes))
    assert float((policy.edge_outputs(causal).logprobs_E.detach() - right).abs().max()) > 0.1
    straight = row.to("cpu")
    object.__setattr__(straight, "position_ids_T", torch.arange(row.n_nodes))
    assert float((policy.edge_outputs(straight).logprobs_E.detach() - right).abs().max()) > 0.01


def test_gradients_do_not_depend_on_the_number_of_micro_batches(choices, make_choice):
    policy = build(LlamaConfig(**(SMALL | {"initializer_range": 0.05}), tie_word_embeddings=True))
    with torch.no_grad():
        policy.value_head.output.weight.mul_(0.1)
    n_tokens = sum(len(choice.token_ids) for choice in choices)
    generator = torch.Generator().manual_seed(2)
    noise, advantages, targets = (torch.randn(n_tokens, generator=generator) for _ in range(3))
    with torch.no_grad():
        behaviour = packed(policy, choices, 1000)[0] + 0.2 * noise

    def gradient(parts):
        policy.zero_grads()
        for part in split_groups(choices, parts):
            for row in map(packed_row, pack(choices, row_tokens=1000, select=part).rows):
                out = policy.edge_outputs(row)
                index = row.edge_index_E
                given = LossInputs(
                    policy_logprobs_E=out.logprobs_E,
                    proximal_logprobs_E=behaviour[index],
                    behaviour_logprobs_E=behaviour[index],
                    advantages_E=advantages[index],
                    choice_E=row.edge_choice_E,
                    weight_E=torch.full(index.shape, 1.0 / n_tokens),
                    values_E=out.values_E,
                    old_values_E=targets[index] * 0.5,
                    targets_E=targets[index],
                )
                objective(given, AlgorithmConfig()).total.backward()
        return gradients(policy)

    whole = gradient(1)
    assert len(split_groups(choices, 2)) == 2
    for parts in (2, 4):
        for name, found in gradient(parts).items():
            torch.testing.assert_close(found, whole[name], rtol=0.0, atol=1e-6)


def test_detached_values_leave_the_trunk_alone(choices):
    policy = build(TIED_LLAMA, detach_value=True)
    out = policy.edge_outputs(packed_row(pack(choices, row_tokens=1000).rows[0]))
    out.values_E.square().sum().backward()
    assert all(parameter.grad is None for parameter in policy.lm_masters().values())
    assert all(parameter.grad is not None for parameter in policy.value_masters().values())


def test_a_new_value_head_says_zero_and_can_learn(choices):
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(TIED_LLAMA))
    out = policy.edge_outputs(packed_row(pack(choices, row_tokens=1000).rows[0]))
    assert out.values_E.tolist() == [0.0] * len(out.values_E)
    (out.values_E - 1.0).square().sum().backward()
    assert float(policy.value_head.output.weight.grad.abs().max()) > 0.0


# -- bf16 with float32 masters


@CONFIGS
def test_bf16_computes_near_fp32_and_keeps_float32_masters(choices, config):
    exact, rounded = build(config), build(config, precision="bf16")
    row = packed_row(pack(choices, row_tokens=1000).rows[0])
    a, b = exact.edge_outputs(row), rounded.edge_outputs(row)
    assert b.logprobs_E.dtype == b.values_E.dtype == torch.float32
    assert 0.0 < float((a.logprobs_E - b.logprobs_E).detach().abs().mean()) < 0.1
    a.logprobs_E.sum().backward()
    b.logprobs_E.sum().backward()
    for name, master in rounded.lm_masters().items():
        assert master.dtype == master.grad.dtype == torch.float32
        torch.testing.assert_close(master, exact.lm_masters()[name], rtol=0.0, atol=0.0)
        reference = exact.lm_masters()[name].grad
        cosine = torch.nn.functional.cosine_similarity(master.grad.flatten(), reference.flatten(), dim=0)
        assert float(cosine) > 0.98, name


def test_bf16_masters_collect_updates_too_small_for_bf16(choices):
    policy = build(TIED_LLAMA, precision="bf16")
    master = policy.lm_masters()["model.norm.weight"]
    weight = dict(policy.lm.named_parameters())["model.norm.weight"]
    for _ in range(10):
        with torch.no_grad():
            master.add_(1e-3)  # from 1.0 bf16 steps by 0.0078: a single addition of 0.001 would be lost
        policy.refresh()
    torch.testing.assert_close(master.detach(), torch.full_like(master, 1.01), rtol=0.0, atol=1e-6)
    assert weight.dtype == torch.bfloat16
    assert weight.tolist() == [1.0078125] * len(weight)


def test_gradients_of_several_rows_add_up_in_the_masters(choices):
    policy = build(UNTIED_QWEN, precision="bf16")
    row = packed_row(pack(choices, row_tokens=1000).rows[0])
    policy.edge_outputs(row).logprobs_E.sum().backward()
    once = gradients_of_lm(policy)
    policy.edge_outputs(row).logprobs_E.sum().backward()
    for name, gradient in gradients_of_lm(policy).items():
        torch.testing.assert_close(gradient, 2 * once[name])
    policy.zero_grads()
    assert all(master.grad is None for master in policy.lm_masters().values())


def gradients_of_lm(policy):
    return {name: master.grad.clone() for name, master in policy.lm_masters().items()}


# -- states and refusals


@CONFIGS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_policy_loads_again(tmp_path, choices, config, precision):
    policy = build(config, precision=precision)
    save_serving(tmp_path, policy, torch.float32, tmp_path)
    again = Policy.from_checkpoint(tmp_path, precision)
    again.load_value_state(policy.value_state())
    row = packed_row(pack(choices, row_tokens=1000).rows[0])
    with torch.no_grad():
        a, b = policy.edge_outputs(row), again.edge_outputs(row)
    assert torch.equal(a.logprobs_E, b.logprobs_E)
    assert torch.equal(a.values_E, b.values_E)
    assert again.lm.config.tie_word_embeddings == config.tie_word_embeddings


def test_a_state_is_restored_bit_for_bit_and_a_foreign_one_refused(choices):
    policy = build(TIED_LLAMA, precision="bf16")
    state = {name: tensor.clone() for name, tensor in policy.lm_state().items()}
    with torch.no_grad():
        for master in policy.lm_masters().values():
            master.add_(1.0)
    policy.refresh()
    policy.load_lm_state(state)
    assert all(torch.equal(master, state[name]) for name, master in policy.lm_masters().items())
    assert all(torch.equal(w, state[n].bfloat16()) for n, w in policy.lm.named_parameters())
    with pytest.raises(UnsupportedModel, match="other parameters"):
        policy.load_lm_state({"x": torch.zeros(1)})


def test_models_that_would_be_evaluated_wrongly_are_refused():
    sliding = MistralConfig(**SMALL, sliding_window=8)
    with pytest.raises(UnsupportedModel, match="full attention"):
        Policy(MistralForCausalLM(sliding))
    eager = LlamaForCausalLM(TIED_LLAMA)
    eager.get_output_embeddings = lambda: torch.nn.Linear(32, 61, bias=False)
    with pytest.raises(UnsupportedModel, match="packed and plain"):
        Policy(eager).verify()


def test_weights_that_compute_no_numbers_are_named_as_such():
    policy = build(TIED_LLAMA, precision="fp32")
    assert policy.not_finite() == []
    with torch.no_grad():
        policy.lm_masters()["model.norm.weight"][5] = -torch.inf
        policy.value_masters()["output.bias"][0] = torch.nan
    assert policy.not_finite() == ["model.norm.weight", "value_head.output.bias"]
    with pytest.raises(UnsupportedModel, match="own log-probabilities are not finite: its weights are damaged"):
        policy.verify()


@pytest.mark.parametrize(
    "lm",
    [
        lambda: LlamaForCausalLM(TIED_LLAMA),
        lambda: Qwen3ForCausalLM(UNTIED_QWEN),
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, attention_dropout=0.1)
        ),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_verify_accepts_full_attention_of_any_family(lm, precision):
    torch.manual_seed(0)
    Policy(lm(), precision=precision).verify()


def test_the_cost_of_attention_is_that_of_the_shapes():
    # per pair 2 * 2 layers * 32 = 128 multiply-adds; weights without embedding and head, per layer: q, o 32*32 each,
    # k, v 16*32 each, MLP 3*32*48, two norms of 32 -> 3072 + 4608 + 64 = 7744; twice that plus the last norm 32.
    policy = build(TIED_LLAMA)
    assert policy.attention_cost == 0.0  # by blocks
    policy.lm.set_attn_implementation("sdpa")
    assert policy.attention_cost == pytest.approx(128 / (2 * 7744 + 32))
