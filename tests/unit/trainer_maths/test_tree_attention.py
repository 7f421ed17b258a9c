"""Attention by blocks = torch's attention with the whole mask, outputs and gradients, on trees of every form."""

import pytest
import torch

from tracegrad.trainer.errors import UnsupportedModel
from tracegrad.trainer.tree_attention import TreePlan, _attention, mask_of

CHAIN = [12] * 12
GROUP = [14] * 5 + [8] * 3 + [11] * 3 + [14] * 3
FOREST = [3] * 3 + [7, 7, 6, 7] + [8] + [12, 11, 11, 12]
TREES = pytest.mark.parametrize("ends", [CHAIN, GROUP, FOREST, [1]], ids=["chain", "group", "forest", "one"])


def inputs(n_nodes: int, dtype: torch.dtype = torch.float32, n_heads: int = 6, n_kv: int = 2, size: int = 8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n_heads, n_nodes, size), (1, n_kv, n_nodes, size), (1, n_kv, n_nodes, size)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def dense(q, k, v, ends, scaling):
    end = torch.tensor(ends)
    node = torch.arange(len(end))
    mask = (node[None, :] <= node[:, None]) & (node[:, None] < end[None, :])
    shared = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(shared, 1).transpose(2, 3)) * scaling
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    return (weights @ v.repeat_interleave(shared, 1)).transpose(1, 2)


def gradients(out, tensors):
    weights = torch.linspace(-1.0, 1.0, out.numel()).view(out.shape)
    return torch.autograd.grad((out.float() * weights).sum(), tensors)


@TREES
@pytest.mark.parametrize("block", [1, 4, 5, 256])
@pytest.mark.parametrize("n_kv", [1, 2, 6])
def test_outputs_and_gradients_equal_those_of_the_whole_mask(ends, block, n_kv):
    tensors = inputs(len(ends), n_kv=n_kv)
    expected = dense(*tensors, ends, scaling=0.3)
    found, _ = _attention(torch.nn.Identity(), *tensors, mask_of(torch.tensor(ends), block), scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@TREES
def test_bfloat16_is_near(ends):
    tensors = inputs(len(ends), torch.bfloat16)
    whole = [tensor.detach().float().requires_grad_() for tensor in tensors]
    found, _ = _attention(torch.nn.Identity(), *tensors, mask_of(torch.tensor(ends), 4), scaling=1.0)
    expected = dense(*whole, ends, scaling=1.0)
    for a, b in zip([found, *gradients(found, tensors)], [expected, *gradients(expected, whole)], strict=True):
        assert float((a.detach().float() - b.detach()).norm()) < 0.02 * max(float(b.detach().norm()), 0.01)


def test_scores_far_from_zero_keep_their_gradients():
    """The subtraction before the exponential is made in float32: large scores are not rounded to bfloat16 first."""
    q, k, v = inputs(12, torch.bfloat16)
    with torch.no_grad():
        k += 40.0  # every score of a query grows alike: the weights stay what they were
        q[:] = q.abs()
    whole = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    found, _ = _attention(torch.nn.Identity(), q, k, v, mask_of(torch.tensor(CHAIN), 4), scaling=1.0)
    got = gradients(found, [v])[0].float()
    exact = gradients(dense(*whole, CHAIN, scaling=1.0), [whole[2]])[0]
    assert float((got - exact).norm() / exact.norm()) < 0.02


def test_only_keys_on_the_path_are_gathered():
    plan = TreePlan.of(torch.tensor(GROUP), block=3)
    prompt = list(range(5))
    seen = [prompt[:3], [*prompt, 5], [*prompt, 5, 6, 7, 8], [*prompt, 8, 9, 10, 11], [*prompt, 11, 12, 13]]
    found = [list(range(b.last)) if b.keys_K is None else b.keys_K.tolist() for b in plan.blocks]
    assert found == seen
    assert [block.n_open for block in plan.blocks] == [0, 3, 5, 5, 6]


def test_a_mask_without_its_plan_and_attention_of_other_kinds_are_refused():
    tensors = inputs(4)
    lost = mask_of(torch.tensor([4] * 4)).view(1, 1, 4, 4)
    with pytest.raises(UnsupportedModel, match="hand its attention mask on"):
        _attention(torch.nn.Identity(), *tensors, lost)
    with pytest.raises(UnsupportedModel, match="softcap"):
        _attention(torch.nn.Identity(), *tensors, None, softcap=30.0)
