"""Losses: golden numbers, naive twins, finite differences in float64, and sums that do not care how rows are cut."""

import math

import pytest
import torch

from tracegrad.tracestore.algorithm import LossConfig
from tracegrad.trainer.errors import BatchError
from tracegrad.trainer.losses import LossInputs, LossSettings, k3, policy_loss, ppo_loss, value_loss

PLAIN = LossSettings(clip_low=0.2, clip_high=0.2, dual_clip=None)


def logs(*ratios):
    return torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)


def surrogate(ratios, advantages, settings):
    behaviour = torch.full((len(ratios),), -1.5, dtype=torch.float64)
    return policy_loss(
        behaviour + logs(*ratios), behaviour, torch.tensor(advantages, dtype=torch.float64), settings=settings
    )


def test_ppo_clip_golden_numbers():
    # A = 1: r 0.5 -> min(0.5, 0.8) = 0.5; r 1.5 -> min(1.5, 1.2) = 1.2 (clipped).
    # A = -1: r 0.5 -> min(-0.5, -0.8) = -0.8 (clipped); r 1.5 -> min(-1.5, -1.2) = -1.5.
    # loss = -(0.5 + 1.2 - 0.8 - 1.5) = 0.6
    result = surrogate([0.5, 1.5, 0.5, 1.5], [1.0, 1.0, -1.0, -1.0], PLAIN)
    assert float(result.loss_sum) == pytest.approx(0.6, abs=1e-12)
    assert (int(result.n_clipped), int(result.n_dual_clipped), result.n_tokens) == (2, 0, 4)
    assert float(result.ratio_sum) == pytest.approx(4.0)
    assert (float(result.ratio_min), float(result.ratio_max)) == pytest.approx((0.5, 1.5))
    # k3 of KL(behaviour || policy) = r - 1 - ln r: 2 * (0.5 - 1 + ln 2) + 2 * (1.5 - 1 - ln 1.5)
    expected = 2 * (-0.5 + math.log(2)) + 2 * (0.5 - math.log(1.5))
    assert float(result.approx_kl_sum) == pytest.approx(expected)
    assert float(result.abs_logratio_sum) == pytest.approx(2 * math.log(2) + 2 * math.log(1.5))


def test_the_clip_may_be_asymmetric():
    # high 0.5: min(1.4, 1.4) is not clipped; low 0.1: A = -1, r 0.5 -> -0.9.
    result = surrogate([1.4, 0.5], [1.0, -1.0], LossSettings(clip_low=0.1, clip_high=0.5, dual_clip=None))
    assert float(result.loss_sum) == pytest.approx(-(1.4 - 0.9))
    assert int(result.n_clipped) == 1


def test_dual_clip_golden_numbers():
    # A = -1, c = 3: r 5 -> max(min(-5, -1.2), -3) = -3 (bounded, no gradient); r 2 -> -2 (free). A = 1 is untouched.
    result = surrogate([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0], LossSettings(dual_clip=3.0))
    assert float(result.loss_sum) == pytest.approx(-(-3.0 - 2.0 + 1.2))
    assert (int(result.n_clipped), int(result.n_dual_clipped)) == (1, 1)


def test_gradients_vanish_exactly_where_a_clip_holds():
    policy = logs(0.5, 1.5, 0.5, 1.5, 5.0).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    policy_loss(policy, torch.zeros_like(policy), advantages, settings=LossSettings()).loss_sum.backward()
    # d/dlogp of -(r A) = -r A where free: -0.5, 0 (clipped), 0 (clipped), 1.5, 0 (dual clip)
    assert policy.grad.tolist() == pytest.approx([-0.5, 0.0, 0.0, 1.5, 0.0])


def test_a_proximal_policy_moves_the_anchor_and_weighs_by_the_capped_importance():
    behaviour, proximal, policy = logs(0.1, 0.1), logs(0.15, 0.4), logs(0.18, 0.2)
    result = policy_loss(
        policy,
        behaviour,
        torch.ones(2, dtype=torch.float64),
        settings=PLAIN,
        proximal_logprobs_E=proximal,
    )
    # r = 1.2, 0.5; w = 1.5, min(4, 2) = 2; loss = -(1.5 * 1.2 + 2 * 0.5) = -2.8
    assert float(result.loss_sum) == pytest.approx(-2.8)
    assert float(result.importance_sum) == pytest.approx(3.5)


def test_a_proximal_policy_equal_to_the_behaviour_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    policy, behaviour, advantages = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(3))
    plain = policy_loss(policy, behaviour, advantages, settings=PLAIN)
    decoupled = policy_loss(policy, behaviour, advantages, settings=PLAIN, proximal_logprobs_E=behaviour.clone())
    assert float(plain.loss_sum) == pytest.approx(float(decoupled.loss_sum), abs=1e-6)


def test_value_loss_golden_numbers():
    # old 0, clip 0.2. V 0.1, R 1: (0.9)^2 = 0.81, clipped V is V.            -> 0.81
    # V 0.5, R 1: (0.5)^2 = 0.25; clipped V 0.2: (0.8)^2 = 0.64 (the larger)  -> 0.64, counted
    # V 0.5, R 0: 0.25; clipped 0.04                                           -> 0.25
    values = torch.tensor([0.1, 0.5, 0.5], dtype=torch.float64)
    old, targets = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    result = value_loss(values, old, targets, value_clip=0.2)
    assert float(result.loss_sum) == pytest.approx(0.5 * (0.81 + 0.64 + 0.25))
    assert int(result.n_clipped) == 1
    assert float(result.squared_error_sum) == pytest.approx(0.81 + 0.25 + 0.25)
    assert float(value_loss(values, old, targets, value_clip=None).loss_sum) == pytest.approx(0.5 * 1.31)


def test_k3_is_an_unbiased_estimate_that_is_never_negative():
    p, q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    estimate = k3(p.log(), q.log())
    assert (estimate >= 0).all()
    assert float((p * estimate).sum()) == pytest.approx(float((p * (p / q).log()).sum()))


def inputs(size, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=1.0, shift=0.0):
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    behaviour = draw(0.5, -2.0)
    return LossInputs(
        policy_logprobs_E=behaviour + draw(0.4),
        behaviour_logprobs_E=behaviour,
        advantages_E=draw(),
        reference_logprobs_E=behaviour + draw(0.3),
        values_E=draw(),
        old_values_E=draw(),
        targets_E=draw(),
        entropy_E=draw(0.1, 2.0),
    )


ALL_TERMS = LossSettings(dual_clip=2.0, kl_coef=0.3, entropy_coef=0.05, value_coef=0.7)


def naive(given, settings):
    """The objective edge by edge, in plain Python."""
    total = 0.0
    for e in range(given.policy_logprobs_E.numel()):
        log_p, log_b, log_ref, a, v, old, target, entropy = (
            float(getattr(given, name)[e])
            for name in (
                *("policy_logprobs_E", "behaviour_logprobs_E", "reference_logprobs_E", "advantages_E"),
                *("values_E", "old_values_E", "targets_E", "entropy_E"),
            )
        )
        r = math.exp(log_p - log_b)
        s = min(r * a, min(max(r, 1 - settings.clip_low), 1 + settings.clip_high) * a)
        if a < 0:
            s = max(s, settings.dual_clip * a)
        near = old + min(max(v - old, -settings.value_clip), settings.value_clip)
        squared = max((v - target) ** 2, (near - target) ** 2)
        kl = math.exp(log_ref - log_p) - 1 - (log_ref - log_p)
        total += -s + settings.value_coef * 0.5 * squared + settings.kl_coef * kl - settings.entropy_coef * entropy
    return total


def test_the_whole_objective_equals_its_naive_twin():
    given = inputs(200)
    out = ppo_loss(given, ALL_TERMS)
    assert float(out.total_sum) == pytest.approx(naive(given, ALL_TERMS), rel=1e-12)
    assert int(out.policy.n_dual_clipped) > 0
    assert int(out.policy.n_clipped) > 0


@pytest.mark.parametrize("name", ["policy_logprobs_E", "values_E", "entropy_E"])
def test_gradients_equal_finite_differences(name):
    given = inputs(40, seed=3)
    leaf = getattr(given, name).clone().requires_grad_()
    fields = {f: getattr(given, f) for f in LossInputs.__slots__}
    ppo_loss(LossInputs(**(fields | {name: leaf})), ALL_TERMS).total_sum.backward()
    step = 1e-6
    for e in range(40):
        sides = []
        for sign in (1.0, -1.0):
            moved = getattr(given, name).clone()
            moved[e] += sign * step
            sides.append(naive(LossInputs(**(fields | {name: moved})), ALL_TERMS))
        assert float(leaf.grad[e]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-6)


def test_sums_do_not_care_how_edges_are_cut_into_rows():
    given = inputs(64, seed=5)
    whole = ppo_loss(given, ALL_TERMS)
    for rows in (2, 4):
        parts = []
        for piece in torch.arange(64).chunk(rows):
            cut = LossInputs(
                **{f: None if (t := getattr(given, f)) is None else t[piece] for f in LossInputs.__slots__}
            )
            parts.append(ppo_loss(cut, ALL_TERMS))
        assert float(sum(p.total_sum for p in parts)) == pytest.approx(float(whole.total_sum), abs=1e-9)
        assert sum(int(p.policy.n_clipped) for p in parts) == int(whole.policy.n_clipped)


def test_a_row_without_edges_is_zero_and_finite():
    out = ppo_loss(inputs(0), ALL_TERMS)
    assert float(out.total_sum) == 0.0
    assert float(out.policy.ratio_max) == 1.0


def test_tensors_that_do_not_fit_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(BatchError, match="advantages_E"):
        ppo_loss(LossInputs(policy_logprobs_E=two, behaviour_logprobs_E=two, advantages_E=one), PLAIN)
    base = {"policy_logprobs_E": two, "behaviour_logprobs_E": two, "advantages_E": two}
    with pytest.raises(BatchError, match="all or none"):
        ppo_loss(LossInputs(**base, values_E=two), PLAIN)
    with pytest.raises(BatchError, match="reference"):
        ppo_loss(LossInputs(**base), LossSettings(kl_coef=0.1))
    with pytest.raises(BatchError, match="entropy"):
        ppo_loss(LossInputs(**base), LossSettings(entropy_coef=0.1))


def test_settings_come_from_the_configuration():
    config = LossConfig(clip_low=0.1, clip_high=0.3, dual_clip=None, value_clip=None, value_coef=2.0, kl_coef=0.5)
    settings = LossSettings.from_config(config)
    assert (settings.clip_low, settings.clip_high, settings.dual_clip) == (0.1, 0.3, None)
    assert (settings.value_clip, settings.value_coef, settings.kl_coef) == (None, 2.0, 0.5)
