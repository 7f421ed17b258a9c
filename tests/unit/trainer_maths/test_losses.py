"""The objective: golden numbers, a naive twin of every combination, finite differences in float64, and denominators."""

import itertools
import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tracegrad.tracestore.algorithm import AlgorithmConfig, CorrectionConfig, LossConfig, Rejection
from tracegrad.trainer.errors import BatchError
from tracegrad.trainer.losses import LossInputs, aggregation_weights, kl_estimate, objective, value_loss

OFF = CorrectionConfig(weights="off")


def algorithm(correction=OFF, **loss):
    return AlgorithmConfig(loss=LossConfig(**loss), correction=correction)


def inputs(size, *, seed=0, choices=4, policy_spread=0.4, proximal_spread=0.3):
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=1.0, shift=0.0):
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale + shift

    behaviour = draw(0.5, -2.0)
    proximal = behaviour + draw(proximal_spread)
    return LossInputs(
        policy_logprobs_E=proximal + draw(policy_spread),
        proximal_logprobs_E=proximal,
        behaviour_logprobs_E=behaviour,
        advantages_E=draw(),
        choice_E=torch.arange(size) * choices // max(size, 1) + 10,
        weight_E=draw(0.1, 1.0).abs() / max(size, 1),
        reference_logprobs_E=behaviour + draw(0.3),
        values_E=draw(),
        old_values_E=draw(),
        targets_E=draw(),
        entropy_E=draw(0.1, 2.0),
    )


def fields_of(given):
    return {name: getattr(given, name) for name in LossInputs.__slots__}


# -- the naive twin: one edge after another, in plain Python


def naive(given, config):
    return sum(float(given.weight_E[e]) * naive_edge(given, config, e) for e in range(given.policy_logprobs_E.numel()))


def naive_edge(given, config, e):
    loss, correction = config.loss, config.correction
    policy, proximal, behaviour, reference, a, v, old, target, entropy = (
        float(getattr(given, name)[e])
        for name in (
            *("policy_logprobs_E", "proximal_logprobs_E", "behaviour_logprobs_E", "reference_logprobs_E"),
            *("advantages_E", "values_E", "old_values_E", "targets_E", "entropy_E"),
        )
    )
    mates = [i for i, choice in enumerate(given.choice_E.tolist()) if choice == int(given.choice_E[e])]
    anchor = behaviour if correction.anchor == "behaviour" else proximal
    anchors = given.behaviour_logprobs_E if correction.anchor == "behaviour" else given.proximal_logprobs_E
    low, high = loss.bounds
    if loss.objective == "cispo":
        term = -min(max(math.exp(policy - anchor), 1 - low), 1 + high) * a * policy
    else:
        ratio = math.exp(policy - anchor)
        if loss.objective.startswith("gspo"):
            ratio = math.exp(sum(float(given.policy_logprobs_E[i] - anchors[i]) for i in mates) / len(mates))
        gain = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        term = -(max(gain, loss.dual_clip * a) if a < 0 and loss.dual_clip is not None else gain)

    def ratio_at(level):
        own = {i: float(given.proximal_logprobs_E[i] - given.behaviour_logprobs_E[i]) for i in mates}
        total = sum(own.values())
        return math.exp({"token": own[e], "sequence": total, "geometric": total / len(mates)}[level])

    weight = 1.0 if correction.weights == "off" else ratio_at(correction.weights)
    weight = weight if correction.cap is None or correction.weights == "off" else min(weight, correction.cap)
    kept = all(
        (rule.low is None or ratio_at(rule.level) >= rule.low)
        and (rule.high is None or ratio_at(rule.level) <= rule.high)
        for rule in correction.reject
    )
    d = reference - policy
    kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[loss.kl_estimator]
    squared = (v - target) ** 2
    if loss.value_clip is not None:
        squared = max(squared, (old + min(max(v - old, -loss.value_clip), loss.value_clip) - target) ** 2)
    under_policy = weight * term - loss.entropy_coef * entropy + (loss.kl_coef * kl if loss.kl_in == "loss" else 0.0)
    return (under_policy if kept else 0.0) + loss.value_coef * 0.5 * squared


ALL_TERMS = {"kl_coef": 0.3, "entropy_coef": 0.05, "value_coef": 0.7}
OBJECTIVES = [
    {"objective": "ppo", "dual_clip": 1.5},
    {"objective": "ppo", "dual_clip": None, "clip_low": 0.1, "clip_high": 0.28},
    {"objective": "cispo", "clip_high": 0.3},
    {"objective": "cispo", "clip_low": 0.3, "clip_high": 0.3},
    {"objective": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    {"objective": "gspo_token", "clip_low": 0.1, "clip_high": 0.1},
]
CORRECTIONS = [
    OFF,
    CorrectionConfig(),
    CorrectionConfig(anchor="behaviour", weights="off"),
    CorrectionConfig(weights="sequence", cap=1.3),
    CorrectionConfig(weights="geometric", cap=None),
    CorrectionConfig(cap=None, reject=(Rejection(low=0.8, high=1.2),)),
    CorrectionConfig(weights="off", reject=(Rejection(level="geometric", low=0.95, high=1.1), Rejection(low=0.7))),
    CorrectionConfig(reject=(Rejection(level="sequence", low=0.6, high=1.6),)),
]
COMBINATIONS = list(itertools.product(OBJECTIVES, CORRECTIONS))


@pytest.mark.parametrize(("loss", "correction"), COMBINATIONS)
def test_every_combination_equals_its_naive_twin(loss, correction):
    given = inputs(60, choices=7)
    config = algorithm(correction, **ALL_TERMS, **loss)
    out = objective(given, config)
    assert float(out.total) == pytest.approx(naive(given, config), rel=1e-11)
    assert bool(out.surrogate.clipped_E.any()), "an example in which no bound holds tests no bound"
    if correction.reject:
        assert 0 < int((out.correction.rejected_E > 0).sum()) < 60


@pytest.mark.parametrize(
    ("loss", "correction", "name"),
    [(loss, correction, "policy_logprobs_E") for loss, correction in COMBINATIONS]
    + [(OBJECTIVES[0], correction, name) for correction in CORRECTIONS for name in ("values_E", "entropy_E")],
)
def test_gradients_equal_finite_differences(loss, correction, name):
    """In float64. What stops the gradient (cispo's weight, gspo_token's ratio) is held fixed in the difference."""
    given = inputs(16, seed=3, choices=5)
    config = algorithm(correction, **ALL_TERMS, **loss)
    leaf = getattr(given, name).clone().requires_grad_()
    objective(LossInputs(**(fields_of(given) | {name: leaf})), config).total.backward()
    step = 1e-6
    for e in range(16):
        sides = [stopped_twin(given, config, name, e, sign * step) for sign in (1.0, -1.0)]
        assert float(leaf.grad[e]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-6)


def stopped_twin(given, config, name, e, move):
    """The twin with one entry moved; for objectives with a stop-gradient, its linear form at the unmoved point."""
    moved = getattr(given, name).clone()
    moved[e] += move
    there = LossInputs(**(fields_of(given) | {name: moved}))
    kind = config.loss.objective
    if name != "policy_logprobs_E" or kind in {"ppo", "gspo"}:
        return naive(there, config)
    rest = AlgorithmConfig(  # KL, entropy and value, which have no stop-gradient
        loss=LossConfig(**ALL_TERMS, objective="ppo"), correction=config.correction
    )
    no_policy = {"advantages_E": torch.zeros_like(given.advantages_E)}
    total = naive(LossInputs(**(fields_of(there) | no_policy)), rest)
    out = objective(given, config)
    moved_E = there.policy_logprobs_E - given.policy_logprobs_E
    low, high = config.loss.bounds
    weight_E = given.weight_E * out.correction.weight_E * given.advantages_E
    if kind == "cispo":
        return total - float((weight_E * out.surrogate.ratio_E.clamp(1 - low, 1 + high) * moved_E).sum())
    free_E = ~(out.surrogate.clipped_E | out.surrogate.dual_clipped_E)
    return total - float((weight_E * out.surrogate.ratio_E * free_E * moved_E.exp()).sum())


# -- golden numbers


def logs(*ratios):
    return torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)


def of_ratios(ratios, advantages, *, choice=None, correction=OFF, base=-1.5, **loss):
    anchor = torch.full((len(ratios),), base, dtype=torch.float64)
    given = LossInputs(
        policy_logprobs_E=anchor + logs(*ratios),
        proximal_logprobs_E=anchor,
        behaviour_logprobs_E=anchor,
        advantages_E=torch.tensor(advantages, dtype=torch.float64),
        choice_E=torch.arange(len(ratios)) if choice is None else torch.tensor(choice),
        weight_E=torch.ones(len(ratios), dtype=torch.float64),
    )
    return objective(given, algorithm(correction, **loss))


def test_ppo_clip_golden_numbers():
    # A = 1: r 0.5 -> min(0.5, 0.8) = 0.5; r 1.5 -> min(1.5, 1.2) = 1.2 (clipped).
    # A = -1: r 0.5 -> min(-0.5, -0.8) = -0.8 (clipped); r 1.5 -> min(-1.5, -1.2) = -1.5.
    # loss = -(0.5 + 1.2 - 0.8 - 1.5) = 0.6
    out = of_ratios([0.5, 1.5, 0.5, 1.5], [1.0, 1.0, -1.0, -1.0], dual_clip=None)
    assert float(out.total) == pytest.approx(0.6, abs=1e-12)
    assert out.surrogate.clipped_E.tolist() == [False, True, True, False]
    assert out.surrogate.ratio_E.tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5])


def test_the_clip_may_be_asymmetric():
    # high 0.5: min(1.4, 1.4) is not clipped; low 0.1: A = -1, r 0.5 -> -0.9.
    out = of_ratios([1.4, 0.5], [1.0, -1.0], clip_low=0.1, clip_high=0.5, dual_clip=None)
    assert float(out.total) == pytest.approx(-(1.4 - 0.9))
    assert out.surrogate.clipped_E.tolist() == [False, True]


def test_dual_clip_golden_numbers():
    # A = -1, c = 3: r 5 -> max(min(-5, -1.2), -3) = -3 (bounded, no gradient); r 2 -> -2 (free). A = 1 is untouched.
    out = of_ratios([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0])
    assert float(out.total) == pytest.approx(-(-3.0 - 2.0 + 1.2))
    assert out.surrogate.clipped_E.tolist() == [False, False, True]
    assert out.surrogate.dual_clipped_E.tolist() == [True, False, False]


def test_cispo_golden_numbers():
    # sg(clip(r, 0, 1.5)) A log pi. r 2 -> 1.5 * 1 * (-1.5 + ln 2); r 0.5 -> 0.5 * -2 * (-1.5 - ln 2)
    out = of_ratios([2.0, 0.5], [1.0, -2.0], objective="cispo", clip_high=0.5)
    assert float(out.total) == pytest.approx(-(1.5 * (-1.5 + math.log(2)) + 0.5 * -2.0 * (-1.5 - math.log(2))))
    assert out.surrogate.clipped_E.tolist() == [True, False]


def test_gspo_golden_numbers():
    # Choice 0: r 2 and 0.5, s = sqrt(2 * 0.5) = 1. Choice 1: r 4 and 1, s = 2, clipped to 1.5 where A > 0.
    for kind in ("gspo", "gspo_token"):
        out = of_ratios([2.0, 0.5, 4.0, 1.0], [1.0, 1.0, 1.0, -1.0], choice=[0, 0, 1, 1], objective=kind, clip_high=0.5)
        assert out.surrogate.ratio_E.tolist() == pytest.approx([1.0, 1.0, 2.0, 2.0])
        assert float(out.total) == pytest.approx(-(1.0 + 1.0 + 1.5 - 2.0))
        assert out.surrogate.clipped_E.tolist() == [False, False, True, False]


def test_gspo_and_its_token_variant_have_one_gradient_where_a_choice_has_one_advantage():
    given = inputs(30, choices=6, seed=8)
    advantages = torch.randn(40, dtype=torch.float64)[given.choice_E]
    grads = []
    for kind in ("gspo", "gspo_token"):
        leaf = given.policy_logprobs_E.clone().requires_grad_()
        changed = {"policy_logprobs_E": leaf, "advantages_E": advantages, "weight_E": torch.ones_like(advantages)}
        config = algorithm(objective=kind, clip_low=0.2, clip_high=0.2, value_coef=0.0)
        objective(LossInputs(**(fields_of(given) | changed)), config).total.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_cispo_keeps_the_gradient_that_ppo_drops():
    advantages, grads = [1.0, 1.0], {}
    for kind in ("ppo", "cispo"):
        anchor = torch.zeros(2, dtype=torch.float64)
        leaf = logs(3.0, 1.0).requires_grad_()
        given = LossInputs(
            policy_logprobs_E=leaf,
            proximal_logprobs_E=anchor,
            behaviour_logprobs_E=anchor,
            advantages_E=torch.tensor(advantages, dtype=torch.float64),
            choice_E=torch.arange(2),
            weight_E=torch.ones(2, dtype=torch.float64),
        )
        objective(given, algorithm(objective=kind, clip_high=0.5)).total.backward()
        grads[kind] = leaf.grad.tolist()
    assert grads["ppo"] == pytest.approx([0.0, -1.0])
    assert grads["cispo"] == pytest.approx([-1.5, -1.0])


def test_value_loss_golden_numbers():
    # old 0, clip 0.2. V 0.1, R 1: (0.9)^2 = 0.81, clipped V is V.            -> 0.81
    # V 0.5, R 1: (0.5)^2 = 0.25; clipped V 0.2: (0.8)^2 = 0.64 (the larger)  -> 0.64
    # V 0.5, R 0: 0.25; clipped 0.04                                           -> 0.25
    values = torch.tensor([0.1, 0.5, 0.5], dtype=torch.float64)
    old, targets = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert value_loss(values, old, targets, value_clip=0.2).tolist() == pytest.approx([0.405, 0.32, 0.125])
    assert value_loss(values, old, targets, value_clip=None).tolist() == pytest.approx([0.405, 0.125, 0.125])


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_that_the_engine_all_but_excluded_does_not_make_the_gradient_nan(loss, advantage):
    """In float32 exp(100) is infinite: recorded at e^-100, now likely; and the other way round."""
    leaf = torch.tensor([-0.1, -100.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-100.0, -0.1, -1.0])
    given = LossInputs(
        policy_logprobs_E=leaf,
        proximal_logprobs_E=leaf.detach(),
        behaviour_logprobs_E=behaviour,
        advantages_E=torch.full((3,), advantage),
        choice_E=torch.arange(3),
        weight_E=torch.ones(3),
    )
    for correction in CORRECTIONS:
        out = objective(given, algorithm(correction, **loss))
        (gradient,) = torch.autograd.grad(out.total, leaf)
        unbounded = correction.cap is None and correction.weights != "off" and not correction.reject
        assert bool(torch.isfinite(gradient).all()) or unbounded


ESTIMATORS = ("k1", "k2", "k3")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_rejected_token_gives_no_gradient_however_far_it_is(level, loss, estimator):
    """In float32. Token 0 is all but impossible, 1 all but certain, for policy and reference in turn; both rejected."""
    for advantage in (1.0, -1.0):
        leaf = torch.tensor([-100.0, -0.1, -1.2], requires_grad=True)
        given = LossInputs(
            policy_logprobs_E=leaf,
            proximal_logprobs_E=leaf.detach(),
            behaviour_logprobs_E=torch.tensor([-1.0, -100.0, -1.0]),
            advantages_E=torch.full((3,), advantage),
            choice_E=torch.arange(3),
            weight_E=torch.ones(3),
            reference_logprobs_E=torch.tensor([-1.0, -100.0, -1.0]),
            entropy_E=torch.tensor([0.5, 0.5, 0.5]),
        )
        rejecting = CorrectionConfig(weights=level, reject=(Rejection(level=level, low=0.5, high=5.0),))
        config = algorithm(rejecting, kl_coef=0.01, kl_estimator=estimator, entropy_coef=0.01, **loss)
        out = objective(given, config)
        (gradient,) = torch.autograd.grad(out.total, leaf)
        assert (out.correction.rejected_E > 0).tolist() == [True, True, False]
        assert gradient.tolist()[:2] == [0.0, 0.0]
        assert math.isfinite(float(out.total.detach())) and float(gradient[2]) != 0.0


# -- KL estimators


@pytest.mark.parametrize(
    ("estimator", "nats", "slopes"),
    [
        # Policy 1/2, reference 1/4: d = -ln 2. Policy 1/2, reference 1: d = ln 2. The slope is -dk/dd.
        ("k1", (math.log(2), -math.log(2)), (1.0, 1.0)),  # -d; slope 1
        ("k2", (0.5 * math.log(2) ** 2, 0.5 * math.log(2) ** 2), (math.log(2), -math.log(2))),  # d^2 / 2; slope -d
        ("k3", (0.5 - 1 + math.log(2), 2.0 - 1 - math.log(2)), (0.5, -1.0)),  # e^d - 1 - d; slope 1 - e^d
    ],
)
def test_the_kl_in_the_loss_is_the_estimator_that_was_asked_for(estimator, nats, slopes):
    """Golden numbers, weights 1 and 3, coefficient 0.1; the advantages are 0, so that nothing else is in the loss."""
    leaf = logs(0.5, 0.5).requires_grad_()
    given = LossInputs(
        policy_logprobs_E=leaf,
        proximal_logprobs_E=leaf.detach(),
        behaviour_logprobs_E=leaf.detach(),
        advantages_E=torch.zeros(2, dtype=torch.float64),
        choice_E=torch.arange(2),
        weight_E=torch.tensor([1.0, 3.0], dtype=torch.float64),
        reference_logprobs_E=logs(0.25, 1.0),
    )
    out = objective(given, algorithm(kl_coef=0.1, kl_estimator=estimator))
    (gradient,) = torch.autograd.grad(out.total, leaf)
    assert float(out.total.detach()) == pytest.approx(0.1 * (nats[0] + 3 * nats[1]), rel=1e-12)
    assert gradient.tolist() == pytest.approx([0.1 * slopes[0], 0.3 * slopes[1]], rel=1e-12)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_equals_its_twin_and_its_finite_differences(estimator, correction):
    given = inputs(16, seed=5, choices=5)
    config = algorithm(correction, **ALL_TERMS, kl_estimator=estimator)
    leaf = given.policy_logprobs_E.clone().requires_grad_()
    out = objective(LossInputs(**(fields_of(given) | {"policy_logprobs_E": leaf})), config)
    assert float(out.total.detach()) == pytest.approx(naive(given, config), rel=1e-11)
    out.total.backward()
    step = 1e-6
    for e in range(16):
        sides = [stopped_twin(given, config, "policy_logprobs_E", e, sign * step) for sign in (1.0, -1.0)]
        assert float(leaf.grad[e]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-6)


def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative():
    p, q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    for kind in ("k1", "k3"):
        assert float((p * kl_estimate(kind, p.log(), q.log())).sum()) == pytest.approx(exact)
    for kind in ("k2", "k3"):
        assert (kl_estimate(kind, p.log(), q.log()) >= 0).all()
    assert kl_estimate("k2", logs(0.5), logs(1.0)).item() == pytest.approx(0.5 * math.log(2) ** 2)


def test_gradients_of_the_estimators_as_losses_are_what_the_documentation_says():
    """Exact expectations over a small vocabulary: k1 nothing, k2 KL(p || q), k3 KL(q || p)."""
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    logp = torch.log_softmax(logits, 0)
    p = logp.exp().detach()
    forward, backward = (logp.exp() * (logp - q.log())).sum(), (q * (q.log() - logp)).sum()
    expected = {"k1": torch.zeros(3, dtype=torch.float64), "k2": gradient(forward), "k3": gradient(backward)}
    for kind, exact in expected.items():
        torch.testing.assert_close(gradient((p * kl_estimate(kind, logp, q.log())).sum()), exact)


def test_a_penalty_in_the_reward_is_not_in_the_loss_as_well():
    given = inputs(20)
    without, within = algorithm(), algorithm(kl_coef=0.5, kl_in="reward")
    assert float(objective(given, within).total) == float(objective(given, without).total)


# -- three policies


def test_with_behaviour_equal_to_proximal_the_decoupled_objective_is_plain_ppo():
    given = inputs(200, proximal_spread=0.0)
    plain = CorrectionConfig(anchor="behaviour", weights="off")
    for correction in (c for c in CORRECTIONS if c.anchor == "proximal"):
        for loss in OBJECTIVES:
            decoupled = objective(given, algorithm(correction, **ALL_TERMS, **loss)).total
            assert float(decoupled) == pytest.approx(
                float(objective(given, algorithm(plain, **ALL_TERMS, **loss)).total), abs=1e-6
            )


def test_a_proximal_policy_is_the_anchor_and_the_capped_ratio_to_the_behaviour_the_weight():
    behaviour, proximal, policy = logs(0.1, 0.1), logs(0.15, 0.4), logs(0.18, 0.2)
    ones = torch.ones(2, dtype=torch.float64)
    given = LossInputs(
        policy_logprobs_E=policy,
        proximal_logprobs_E=proximal,
        behaviour_logprobs_E=behaviour,
        advantages_E=ones,
        choice_E=torch.zeros(2, dtype=torch.int64),
        weight_E=ones,
    )
    # r = 1.2, 0.5; w = 1.5, min(4, 2) = 2; loss = -(1.5 * 1.2 + 2 * 0.5) = -2.8
    out = objective(given, AlgorithmConfig(loss=LossConfig(dual_clip=None)))
    assert float(out.total.detach()) == pytest.approx(-2.8)
    assert out.correction.weight_E.tolist() == pytest.approx([1.5, 2.0])


# -- denominators


LENGTHS = torch.tensor([2, 1, 5])
OF_CHOICE = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])


def aggregated(values, **loss):
    weights = aggregation_weights(OF_CHOICE, LENGTHS, n_tokens=8, n_choices=3, config=LossConfig(**loss))
    return float((weights * torch.tensor(values)).sum())


def test_aggregations_golden_numbers():
    values = [1.0, 3.0, 10.0, 5.0, 5.0, 5.0, 5.0, 5.0]
    assert aggregated(values) == pytest.approx(39 / 8)  # every token alike
    assert aggregated(values, aggregate="sequences") == pytest.approx((2 + 10 + 5) / 3)  # means 2, 10, 5
    assert aggregated(values, aggregate="constant", aggregate_tokens=10) == pytest.approx(39 / (3 * 10))


@pytest.mark.parametrize("aggregate", ["tokens", "sequences", "constant"])
def test_rejected_tokens_stay_in_the_denominator(aggregate):
    """Two tokens of ratio 1 and one that is rejected: the two count what they count beside a kept one."""
    weights = aggregation_weights(
        torch.tensor([0, 0, 1]),
        torch.tensor([2, 1]),
        n_tokens=3,
        n_choices=2,
        config=LossConfig(aggregate=aggregate, aggregate_tokens=4),
    )
    behaviour = torch.tensor([0.0, 0.0, -5.0])
    zeros = torch.zeros(3)
    given = LossInputs(
        policy_logprobs_E=zeros,
        proximal_logprobs_E=zeros,
        behaviour_logprobs_E=behaviour,
        advantages_E=torch.ones(3),
        choice_E=torch.tensor([0, 0, 1]),
        weight_E=weights,
    )
    out = objective(given, algorithm(CorrectionConfig(reject=(Rejection(high=2.0),))))
    assert out.correction.rejected_E.tolist() == [0, 0, 2]
    assert float(out.total.detach()) == pytest.approx(-float(weights[:2].sum()))


@hypothesis_settings(max_examples=60, deadline=None)
@drawn(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from(["tokens", "sequences"]), st.data())
def test_weights_add_up_to_one_however_choices_are_laid_into_rows(lengths, aggregate, data):
    rows = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    total = 0.0
    for row in set(rows):
        mine = [b for b, place in enumerate(rows) if place == row]
        choice_E = torch.tensor([b for b in mine for _ in range(lengths[b])])
        weights = aggregation_weights(
            choice_E,
            torch.tensor(lengths),
            n_tokens=sum(lengths),
            n_choices=len(lengths),
            config=LossConfig(aggregate=aggregate),
        )
        total += float(weights.sum())
    assert total == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_sums_do_not_care_how_choices_are_cut_into_rows(loss):
    given = inputs(64, seed=5, choices=8)
    config = algorithm(CorrectionConfig(weights="sequence", reject=(Rejection(low=0.6),)), **ALL_TERMS, **loss)
    whole = float(objective(given, config).total)
    for rows in (2, 4):
        parts = [
            objective(LossInputs(**{name: tensor[piece] for name, tensor in fields_of(given).items()}), config)
            for piece in torch.arange(64).chunk(rows)
        ]
        assert float(sum(part.total for part in parts)) == pytest.approx(whole, abs=1e-9)


def test_a_row_without_edges_is_zero_and_finite():
    for loss in OBJECTIVES:
        assert float(objective(inputs(0), algorithm(CorrectionConfig(), **ALL_TERMS, **loss)).total) == 0.0


# -- refusals


def test_tensors_that_do_not_fit_are_refused():
    given = fields_of(inputs(2))
    with pytest.raises(BatchError, match="advantages_E"):
        objective(LossInputs(**(given | {"advantages_E": torch.zeros(1)})), algorithm())
    with pytest.raises(BatchError, match="all or none"):
        objective(LossInputs(**(given | {"targets_E": None})), algorithm())
    with pytest.raises(BatchError, match="reference"):
        objective(LossInputs(**(given | {"reference_logprobs_E": None})), algorithm(kl_coef=0.1))
    with pytest.raises(BatchError, match="entropy"):
        objective(LossInputs(**(given | {"entropy_E": None})), algorithm(entropy_coef=0.1))
