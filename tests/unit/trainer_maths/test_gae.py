"""GAE inside a call and along the run graph: golden numbers, chains, joins, masks, critics of other models."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.tracestore.records import Reward
from tracegrad.trainer.credit import assign, choice_returns, critic_values, gae_advantages
from tracegrad.trainer.errors import BatchError
from tracegrad.trainer.exchange import Told
from tracegrad.trainer.gae import Tail, adaptive_lambda, gae
from tracegrad.trainer.run_graph import CallNode


def reward(value, name="f1", **target):
    return Reward(reward_id=f"{name}{target}", run_id="run_a", name=name, value=value, source="t", **target)


def settings_of(scope="graph", **changes):
    return CreditConfig(scope=scope, normalise="off", **changes)


def advantages(samples, config, values):
    return gae_advantages(samples, config, critic_values(samples, values))


# -- one sequence


def test_golden_numbers():
    # Three tokens, reward 1 at the end, V = (0.5, 0.25, 0.5), gamma 0.5, lambda 0.5 (all exact in binary).
    # delta_2 = 1 - 0.5 = 0.5;              A_2 = 0.5
    # delta_1 = 0.5 * 0.5 - 0.25 = 0;       A_1 = 0 + 0.25 * 0.5 = 0.125
    # delta_0 = 0.5 * 0.25 - 0.5 = -0.375;  A_0 = -0.375 + 0.25 * 0.125 = -0.34375
    values = np.array([0.5, 0.25, 0.5])
    assert gae(np.array([0.0, 0.0, 1.0]), values, gamma=0.5, gae_lambda=0.5).tolist() == [-0.34375, 0.125, 0.5]
    # With a tail of value 1 and advantage 0.25 behind it: delta_2 = 1.5 - 0.5 = 1; A_2 = 1.25; A_1 = 0.3125;
    # A_0 = -0.375 + 0.25 * 0.3125 = -0.296875
    after = gae(np.array([0.0, 0.0, 0.5]), values, gamma=0.5, gae_lambda=0.5, tail=Tail(1.0, 0.25))
    assert after.tolist() == [-0.296875, 0.3125, 1.25]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 8),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_it_is_the_sum_of_discounted_deltas(length, gamma, lam, seed):
    """Twin: A_t = sum over l of (gamma lambda)^l delta_{t+l}, written out."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=length), rng.normal(size=length)
    result = gae(rewards, values, gamma=gamma, gae_lambda=lam)
    v = [*values, 0.0]
    for t in range(length):
        expected = sum(
            (gamma * lam) ** k * (rewards[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(length - t)
        )
        assert result[t] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    sampled=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 999),
)
def test_inserting_a_tools_tokens_changes_nothing(sampled, gamma, lam, seed):
    """`sampled`: before each sampled token, so many tokens of a tool with values of any kind."""
    rng = np.random.default_rng(seed)
    mask = np.concatenate([[False] * tools + [True] for tools in sampled]).astype(bool)
    rewards, values = np.where(mask, rng.normal(size=len(mask)), 0.0), rng.normal(size=len(mask))
    alone = gae(rewards[mask], values[mask], gamma=gamma, gae_lambda=lam)
    inserted = gae(rewards, values, gamma=gamma, gae_lambda=lam, mask_T=mask)
    assert inserted[mask].tolist() == alone.tolist(), "bitwise"
    assert not inserted[~mask].any()


def test_lengths_that_disagree_and_paid_tools_are_refused():
    with pytest.raises(BatchError, match="do not fit"):
        gae(np.zeros(2), np.zeros(3), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(BatchError, match="not sampled"):
        gae(np.array([1.0, 0.0]), np.zeros(2), gamma=1.0, gae_lambda=1.0, mask_T=np.array([False, True]))


@pytest.mark.parametrize(
    ("length", "alpha", "expected"),
    [(1000, 0.05, 0.98), (100, 0.05, 0.8), (20, 0.05, 0.0), (5, 0.05, 0.0), (40, 0.5, 0.95), (1, 2.0, 0.5)],
)
def test_vapos_lambda_grows_with_the_length(length, alpha, expected):
    """1 - 1 / (alpha l): 1 - 1/50, 1 - 1/5, 1 - 1/1, below 0 -> 0, 1 - 1/20, 1 - 1/2."""
    assert adaptive_lambda(length, alpha) == pytest.approx(expected)


# -- the run graph


def chain(make_choice, lengths, roles=None):
    roles = roles or ["planner"] * len(lengths)
    choices = [
        make_choice(call_id=f"c{n}", role=role, tokens=tuple(range(length)))
        for n, (length, role) in enumerate(zip(lengths, roles, strict=True))
    ]
    return choices, [(f"c{n}", f"c{n + 1}") for n in range(len(lengths) - 1)]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.5, 1.0]),
    scope=st.sampled_from(["role", "graph"]),
    failed_after=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 999),
)
def test_on_a_chain_it_is_gae_over_the_concatenated_tokens(
    make_choice, make_samples, *, lengths, gamma, lam, scope, failed_after, seed
):
    """`failed_after`: calls of the chain after which an attempt failed, the last call included."""
    rng = np.random.default_rng(seed)
    choices, links = chain(make_choice, lengths)
    failed = [CallNode(call_id=f"f{n}", role="planner", model="main", mute=True) for n, _ in enumerate(failed_after)]
    links += [(f"c{before}", f"f{n}") for n, after in enumerate(failed_after) for before in range(after + 1)]
    per_call = rng.normal(size=len(lengths))
    rewards = [reward(value, call_id=f"c{n}") for n, value in enumerate(per_call)] + [reward(0.5, "run")]
    values = rng.normal(size=sum(lengths))
    config = settings_of(scope, gamma=gamma, gae_lambda=lam, turn_gamma=gamma, turn_lambda=lam)
    mixed = random.Random(seed).sample(choices, len(choices))
    order = [choices.index(choice) for choice in mixed]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    blocks = [values[starts[n] : starts[n + 1]] for n in order]
    result = advantages(make_samples(mixed, rewards, links=links, context=failed), config, np.concatenate(blocks))
    paid = np.zeros(sum(lengths))
    paid[starts[1:] - 1] = per_call
    paid[-1] += 0.5
    flat = gae(paid, values, gamma=gamma, gae_lambda=lam)
    np.testing.assert_allclose(result, np.concatenate([flat[starts[n] : starts[n + 1]] for n in order]), atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
    roles=st.lists(st.sampled_from("xy"), min_size=6, max_size=6),
    scope=st.sampled_from(["call", "role", "graph"]),
    untrained=st.sets(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 999),
)
def test_with_lambda_one_it_is_the_return_less_the_value(
    make_choice, make_samples, *, pairs, roles, scope, untrained, seed
):
    """On any graph, with any calls as context only: every distinct reward once, whatever the critic says elsewhere."""
    rng = np.random.default_rng(seed)
    links = [(f"c{a}", f"c{b}") for a, b in pairs if a < b]
    trained = [n for n in range(6) if n not in untrained]
    choices = [make_choice(call_id=f"c{n}", role=roles[n], tokens=(1,) * int(rng.integers(1, 4))) for n in trained]
    context = [CallNode(call_id=f"c{n}", role=roles[n], model="other") for n in untrained]
    rewards = [reward(float(rng.normal()), call_id=f"c{n}") for n in range(6)]
    rewards += [reward(0.25, "run"), reward(-1.0, "style", role="x")]
    samples = make_samples(choices, rewards, links=links, context=context)
    config = settings_of(scope, gae_lambda=1.0)
    values = rng.normal(size=sum(len(choice.token_ids) for choice in choices))
    expected = np.repeat(choice_returns(samples, config, scope), [len(c.token_ids) for c in choices]) - values
    np.testing.assert_allclose(advantages(samples, config, values), expected, atol=1e-12)


def test_an_attempt_that_failed_moves_nobodys_credit(make_choice, make_samples):
    # a -> b, one token each, V = (0.2, 0.6), reward 1 on the run, gamma 1, lambda 0.5 everywhere.
    # b: 1 - 0.6 = 0.4; a: 0.6 - 0.2 + 0.5 * 0.4 = 0.6. The same with an attempt f beside b that failed, and with one
    # after b (it would be a fork, 1 - 0.2 = 0.8, or take the run's reward away from b).
    # A reward of -1 on f itself is what came of a: a fork, so the sum of the rewards behind it: 1 - 1 - 0.2 = -0.2.
    # Returns with turn_gamma 0.5: 0.5 * 1 and 1; with the reward on f 0.5 * (1 - 1) and 1.
    choices = [make_choice(call_id=call, tokens=(1,)) for call in "ab"]
    failed = [CallNode(call_id="f", role="planner", model="main", mute=True)]
    config, values = settings_of(turn_lambda=0.5, gae_lambda=0.5), np.array([0.2, 0.6])

    def found(*links, paid=(0.0, {"role": "planner"})):
        rewards = [reward(1.0), reward(paid[0], "style", **paid[1])]
        samples = make_samples(choices, rewards, links=[("a", "b"), *links], context=failed)
        returns = choice_returns(samples, settings_of(turn_gamma=0.5), "graph")
        return [*advantages(samples, config, values).tolist(), *returns.tolist()]

    clean = pytest.approx([0.6, 0.4, 0.5, 1.0])
    assert found() == clean
    assert found(("a", "f")) == clean
    assert found(("a", "f"), ("b", "f")) == clean
    assert found(("a", "f"), paid=(-1.0, {"call_id": "f"})) == pytest.approx([-0.2, 0.4, 0.0, 1.0])


def test_a_fork_sums_what_follows_and_bootstraps_nothing(make_choice, make_samples):
    # p feeds l and r, both feed z; one token each, lambda 0 everywhere. Values: p 1, l 2, r 3, z 4; on r 10, on z 100.
    # z: 100 - 4 = 96. l: one call follows, so its value: 0 + 4 - 2 = 2. r: 10 + 4 - 3 = 11.
    # p: two follow; their values 2 + 3 would hold z twice. The rewards themselves, each once: 110 - 1 = 109.
    choices = [make_choice(call_id=c, tokens=(1,)) for c in "plrz"]
    rewards = [reward(10.0, call_id="r"), reward(100.0, call_id="z")]
    links = [("p", "l"), ("p", "r"), ("l", "z"), ("r", "z")]
    samples = make_samples(choices, rewards, links=links)
    config = settings_of(gae_lambda=0.0, turn_lambda=0.0)
    assert advantages(samples, config, np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [109.0, 2.0, 11.0, 96.0]


def test_credit_of_a_call_or_role_stays_there_and_that_of_the_graph_reaches_ancestors_only(make_choice, make_samples):
    """Change the reward of one call of a fork and see whose advantages move."""
    choices = [
        make_choice(call_id=c, role=role) for c, role in zip("plrz", ("boss", "worker", "worker", "boss"), strict=True)
    ]
    links = [("p", "l"), ("p", "r"), ("l", "z")]
    values = np.linspace(-1, 1, 8)

    def moved(scope, call):
        def found(value):
            rewards = [reward(value, call_id=call), reward(1.0, "run")]
            return advantages(make_samples(choices, rewards, links=links), settings_of(scope), values)

        changed = (found(0.0) != found(5.0)).reshape(4, 2).all(axis=1)
        return {c for c, one in zip("plrz", changed, strict=True) if one}

    assert {call: moved("call", call) for call in "plrz"} == {call: {call} for call in "plrz"}
    assert {call: moved("role", call) for call in "plrz"} == {"p": {"p"}, "l": {"l"}, "r": {"r"}, "z": {"p", "z"}}
    assert {call: moved("graph", call) for call in "plrz"} == {
        "p": {"p"},
        "l": {"p", "l"},
        "r": {"p", "r"},
        "z": {"p", "l", "z"},
    }


# -- several models


def apart(make_samples, choices, rewards, *, links, models, context=()):
    """Return model -> (the numbers of its choices, its samples): all other calls are context to it."""
    everyone = {c.call_id: CallNode(call_id=c.call_id, role=c.role, model=models[c.call_id]) for c in choices}
    found = {}
    for model in sorted(set(models.values())):
        numbers = [number for number, choice in enumerate(choices) if models[choice.call_id] == model]
        others = [*context, *(node for node in everyone.values() if node.model != model)]
        if numbers:
            own = [choices[number] for number in numbers]
            found[model] = numbers, make_samples(own, rewards, links=links, context=others)
    return found


def tokens_of(choices, numbers):
    starts = np.concatenate([[0], np.cumsum([len(choice.token_ids) for choice in choices])])
    return np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers])


def test_another_models_critic_is_asked_only_if_configured(make_choice, make_samples):
    # a (main) -> b (other) -> c (main), one token each, lambda 0, reward 8 on c. V = (1, 100, 3).
    # Own values only: b is stepped over, and c's value stands for what follows: a: 3 - 1 = 2; c: 8 - 3 = 5.
    # b, for its own critic, steps over c: 8 - 100 = -92.
    # With those of all: a: 100 - 1 = 99, b: 3 - 100 = -97.
    choices = [make_choice(call_id=c, tokens=(1,)) for c in "abc"]
    links, models = [("a", "b"), ("b", "c")], {"a": "main", "b": "other", "c": "main"}
    split = apart(make_samples, choices, [reward(8.0, call_id="c")], links=links, models=models)
    config, main, other = settings_of(gae_lambda=0.0, turn_lambda=0.0), split["main"][1], split["other"][1]
    of_main, of_other = critic_values(main, np.array([1.0, 3.0])), critic_values(other, np.array([100.0]))
    assert gae_advantages(main, config, of_main).tolist() == [2.0, 5.0]
    assert gae_advantages(other, config, of_other).tolist() == [-92.0]
    assert gae_advantages(main, config, of_main, [of_other]).tolist() == [99.0, 5.0]
    assert gae_advantages(other, config, of_other, [of_main]).tolist() == [-97.0]


def test_on_a_chain_of_two_models_all_critics_give_the_golden_numbers_of_one(make_choice, make_samples):
    # The first golden numbers, V = (0.5, 0.25, 0.5), reward 1, all discounts 0.5: one token of main, two of other.
    # Own values only: main sees the reward one call away: 0.5 - 0.5 = 0.
    choices = [make_choice(call_id="a", tokens=(1,)), make_choice(call_id="b", tokens=(1, 2))]
    models = {"a": "main", "b": "other"}
    main, other = (
        s for _, s in apart(make_samples, choices, [reward(1.0)], links=[("a", "b")], models=models).values()
    )
    config = settings_of(gamma=0.5, gae_lambda=0.5, turn_gamma=0.5, turn_lambda=0.5)
    of_main, of_other = critic_values(main, np.array([0.5])), critic_values(other, np.array([0.25, 0.5]))
    assert assign(main, config, of_main.values_N, foreign=[of_other]).advantages_N.tolist() == [-0.34375]
    assert gae_advantages(other, config, of_other, [of_main]).tolist() == [0.125, 0.5]
    assert gae_advantages(main, config, of_main).tolist() == [0.0]


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
    models=st.lists(st.sampled_from(["m", "n", "o", None]), min_size=6, max_size=6),
    adaptive=st.sampled_from([None, 0.7]),
    critic=st.booleans(),
    penalised=st.booleans(),
    seed=st.integers(0, 999),
)
def test_critics_that_agree_give_several_models_the_credit_of_one_bitwise(
    make_choice, make_samples, *, pairs, models, adaptive, critic, penalised, seed
):
    """On any graph, with calls that nobody trains (None), several choices a call, and penalties of tokens."""
    rng = np.random.default_rng(seed)
    of_call = {f"c{n}": model for n, model in enumerate(models) if model is not None}
    choices = [
        make_choice(call_id=call_id, choice_index=index, role="x", tokens=(1,) * int(rng.integers(1, 4)))
        for call_id in of_call
        for index in range(int(rng.integers(1, 3)))
    ]
    context = [CallNode(call_id=f"c{n}", role="x", model="api") for n in range(6) if models[n] is None]
    links = [(f"c{a}", f"c{b}") for a, b in pairs if a < b]
    rewards = [reward(float(rng.normal()), call_id=f"c{n}") for n in range(6)] + [reward(0.25, "run")]
    count = sum(len(choice.token_ids) for choice in choices)
    values, penalties = rng.normal(size=count), -rng.random(count) if penalised else None
    config = settings_of(
        gamma=0.9, turn_gamma=0.8, gae_lambda=0.6, turn_lambda=0.7, length_adaptive=adaptive, critic_lambda=0.5
    )
    one = make_samples(choices, rewards, links=links, context=context)
    expected = gae_advantages(one, config, critic_values(one, values, penalties), critic=critic)
    split = apart(make_samples, choices, rewards, links=links, models=of_call, context=context)
    tokens = {model: tokens_of(choices, numbers) for model, (numbers, _) in split.items()}
    of = {
        model: critic_values(samples, values[tokens[model]], None if penalties is None else penalties[tokens[model]])
        for model, (_, samples) in split.items()
    }
    for model, (_, samples) in split.items():
        found = gae_advantages(samples, config, of[model], Told(values=of).foreign(model), critic=critic)
        assert found.tolist() == expected[tokens[model]].tolist()


def test_choices_of_one_call_share_what_follows(make_choice, make_samples):
    # Call a sampled twice; b follows. V(a) = 1 for both (one prompt), V(b) = 4, reward 6 on b, lambda 1, one token.
    choices = [make_choice(call_id="a", choice_index=i, tokens=(i,)) for i in (0, 1)] + [
        make_choice(call_id="b", tokens=(1,))
    ]
    samples = make_samples(choices, [reward(6.0, call_id="b")], links=[("a", "b")])
    config = settings_of(gae_lambda=1.0)
    assert advantages(samples, config, np.array([1.0, 1.0, 4.0])).tolist() == [5.0, 5.0, 2.0]


def test_vapo_decouples_the_critics_lambda(make_choice, make_samples):
    # Two tokens, reward 1, V = (0.5, 0.25). alpha 1: lambda of the policy is 1 - 1/2 = 0.5.
    # delta_1 = 0.75, delta_0 = 0.25 - 0.5 = -0.25; A = (-0.25 + 0.5 * 0.75, 0.75) = (0.125, 0.75).
    # Targets with lambda 1: the return itself, (1, 1).
    samples = make_samples([make_choice()], [reward(1.0)])
    config = settings_of("call", length_adaptive=1.0, critic_lambda=1.0)
    credit = assign(samples, config, np.array([0.5, 0.25]))
    assert credit.advantages_N.tolist() == [0.125, 0.75]
    assert credit.targets_N is not None
    assert credit.targets_N.tolist() == [1.0, 1.0]
    coupled = assign(samples, settings_of("call", length_adaptive=1.0), np.array([0.5, 0.25]))
    assert coupled.targets_N is not None
    assert coupled.targets_N.tolist() == [0.625, 1.0]


def test_token_rewards_are_paid_where_they_stand(make_choice, make_samples):
    # lambda 1, V = 0: the return from each token on. Penalties -1 and -2 on the tokens, reward 10 at the end.
    samples = make_samples([make_choice()], [reward(10.0)])
    config = settings_of("call", gae_lambda=1.0)
    assert assign(samples, config, np.zeros(2), np.array([-1.0, -2.0])).advantages_N.tolist() == [7.0, 8.0]
    grouped = CreditConfig(advantage="reinforce++", normalise="off")
    assert assign(samples, grouped, None, np.array([-1.0, -2.0])).advantages_N.tolist() == [7.0, 7.0]
    # A run alone in its group has nothing to compare the 10 with; its penalties of 3 are felt all the same.
    compared = assign(samples, CreditConfig(advantage="dr_grpo"), None, np.array([-1.0, -2.0]))
    assert compared.advantages_N.tolist() == [-3.0, -3.0]
    assert compared.returns_B.tolist() == [7.0]
