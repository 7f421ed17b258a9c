"""Sampling-mask replay: logprobs, entropies and gradients over kept sets equal a naive softmax over them, in fp32."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tracegrad.trainer.batches import packed_row
from tracegrad.trainer.errors import PackingError
from tracegrad.trainer.kept_sets import KeptSets, renormalised
from tracegrad.trainer.packing import pack
from tracegrad.trainer.policy import Policy

VOCABULARY = 61


def build(slot_chunk=256):
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return Policy(LlamaForCausalLM(config), slot_chunk=slot_chunk)


@pytest.fixture(scope="module")
def choices(make_choice):
    """Whole vocabularies and kept sets of one to thirty tokens; one slot that two choices truncated differently."""
    rng = random.Random(3)
    shapes = [((1, 2, 3), (5, 6, 7)), ((1, 2, 3), (5, 9)), ((1, 2, 3), (5, 6, 8, 4)), ((20, 21), (22,)), ((1, 2), (3,))]
    made = []
    for number, (prompt, tokens) in enumerate(shapes):
        kept = tuple(tuple({token, *rng.sample(range(VOCABULARY), rng.choice([0, 3, 30]))}) for token in tokens)
        made.append(
            make_choice(prompt, tokens, temperature=0.7 + 0.3 * (number % 2), kept_ids=None if number == 2 else kept)
        )
    return made


def naive(policy, choices):
    """One plain row per choice; the logits of what was cut off are -inf before the softmax."""
    logprobs, entropies = [], []
    for choice in choices:
        ids = torch.tensor([choice.prompt_ids + choice.token_ids])
        logits = (
            policy.lm(input_ids=ids, use_cache=False).logits[0, len(choice.prompt_ids) - 1 : -1] / choice.temperature
        )
        for place, token in enumerate(choice.token_ids):
            kept = list(range(VOCABULARY)) if choice.kept_ids is None else list(choice.kept_ids[place])
            log_softmax = torch.log_softmax(logits[place][kept], -1)
            logprobs.append(log_softmax[kept.index(token)])
            entropies.append(-(log_softmax.exp() * log_softmax).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def replayed(policy, choices, row_tokens):
    size = sum(len(choice.token_ids) for choice in choices)
    logprobs, entropies = torch.zeros(size), torch.zeros(size)
    for row in map(packed_row, pack(choices, row_tokens=row_tokens).rows):
        out = policy.edge_outputs(row, with_values=False, with_entropy=True)
        logprobs = logprobs.index_copy(0, row.edge_index_E, out.logprobs_E)
        entropies = entropies.index_copy(0, row.edge_index_E, out.entropy_E)
    return logprobs, entropies


@pytest.mark.parametrize(("slot_chunk", "row_tokens"), [(256, 1000), (3, 1000), (1, 6)])
def test_logprobs_entropies_and_gradients_equal_the_naive_softmax(choices, slot_chunk, row_tokens):
    policy = build(slot_chunk)
    results = []
    for compute in (lambda: naive(policy, choices), lambda: replayed(policy, choices, row_tokens)):
        policy.zero_grads()
        logprobs, entropies = compute()
        weights = torch.linspace(-1.0, 1.0, len(logprobs))
        (weights * (logprobs + 0.3 * entropies)).sum().backward()
        grads = {name: parameter.grad.clone() for name, parameter in policy.lm_masters().items()}
        results.append((logprobs.detach(), entropies.detach(), grads))
    (naive_logprobs, naive_entropies, naive_grads), (logprobs, entropies, grads) = results
    torch.testing.assert_close(logprobs, naive_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, naive_entropies, rtol=0, atol=1e-5)
    for name, found in grads.items():
        size = max(1.0, float(naive_grads[name].abs().max()))  # against float64 both are 2e-6 of it away
        torch.testing.assert_close(found, naive_grads[name], rtol=1e-5, atol=1e-5 * size)


def test_a_token_that_was_alone_had_no_choice(make_choice):
    policy = build()
    alone = make_choice((1, 2), (3, 4), kept_ids=((3,), (4, 5)))
    logprobs, entropies = replayed(policy, [alone], 100)
    assert (logprobs[0].item(), entropies[0].item()) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert logprobs[1] < 0


def test_keeping_everything_is_keeping_nothing_apart(make_choice):
    policy = build()
    free = make_choice((1, 2), (3, 4))
    whole = make_choice((1, 2), (3, 4), kept_ids=(tuple(range(VOCABULARY)),) * 2)
    for left, right in zip(replayed(policy, [free], 100), replayed(policy, [whole], 100), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_ragged_sets_over_any_logits(data):
    """Also where the kept tokens are almost impossible: nothing underflows."""
    n_edges = data.draw(st.integers(1, 6))
    logits = torch.tensor(data.draw(st.lists(st.floats(-300, 300), min_size=8, max_size=8)), dtype=torch.float32)
    logprobs_SV = torch.log_softmax(logits, 0)[None]
    sets = [data.draw(st.sets(st.integers(0, 7))) for _ in range(n_edges)]
    tokens = [data.draw(st.sampled_from(sorted(kept) or list(range(8)))) for kept in sets]
    kept = KeptSets(
        token_K=torch.tensor([t for each in sets for t in sorted(each)], dtype=torch.int64),
        edge_K=torch.tensor([e for e, each in enumerate(sets) for _ in each], dtype=torch.int64),
    )
    slots = torch.zeros(n_edges, dtype=torch.int64)
    own = logprobs_SV[0, torch.tensor(tokens)]
    found, _ = renormalised(logprobs_SV, slots, own, None, kept)
    for edge, (token, each) in enumerate(zip(tokens, sets, strict=True)):
        cut = logits.double()[sorted(each)] if each else logits.double()
        expected = logits[token].double() - torch.logsumexp(cut, 0)
        assert found[edge].item() == pytest.approx(expected.item(), abs=2e-3)


def test_wrong_kept_sets_are_refused(make_choice):
    with pytest.raises(PackingError, match=r"call call_1: token 1 \(4\) is not in its own kept set"):
        pack([make_choice((1, 2), (3, 4), kept_ids=((3,), (5,)))], row_tokens=100)
    with pytest.raises(PackingError, match="2 tokens, but kept sets of 1"):
        pack([make_choice((1, 2), (3, 4), kept_ids=((3,),))], row_tokens=100)


def test_each_token_knows_its_version(make_choice):
    assert make_choice(tokens=(4, 5, 6)).token_versions == (1, 1, 1)
    assert make_choice(tokens=(4, 5, 6), version_spans=((0, 7), (2, 8))).token_versions == (7, 7, 8)
