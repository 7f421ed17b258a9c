"""Credit from end to end: rewards to advantages, isolated by role, normalised apart, counted; flat arrays."""

import numpy as np
import pytest

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.tracestore.records import Reward
from tracegrad.trainer.comparison import Statistics
from tracegrad.trainer.credit import assign, behaviour_logprobs, run_returns, spread, token_starts, whitened
from tracegrad.trainer.errors import BatchError, SampleError


def reward(run_id, value, name="f1", **target):
    return Reward(reward_id=f"{run_id}{name}{target}", run_id=run_id, name=name, value=value, source="t", **target)


def two_roles(make_choice, runs=("r1", "r2", "r3")):
    return [make_choice(run_id=run, call_id=f"{run}{role}", role=role) for run in runs for role in ("p", "w")]


@pytest.mark.parametrize("advantage", ["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"])
def test_changing_one_roles_reward_changes_no_other_role(make_choice, make_samples, advantage):
    choices = two_roles(make_choice)
    config = CreditConfig(advantage=advantage)
    values = np.linspace(-1, 1, 12) if advantage == "gae" else None

    def advantages(writer_rewards):
        rewards = []
        for run, own, extra in zip(("r1", "r2", "r3"), (0.0, 1.0, 0.5), writer_rewards, strict=True):
            rewards += [reward(run, own), reward(run, extra, "style", role="w")]
        return assign(make_samples(choices, rewards), config, values).advantages_N.reshape(6, 2)

    before, after = advantages((0.0, 0.0, 0.0)), advantages((5.0, -3.0, 1.0))
    assert before[::2].tolist() == after[::2].tolist()
    assert before[1::2].tolist() != after[1::2].tolist()


def test_a_choice_that_no_reward_reaches_has_no_credit(make_choice, make_samples):
    samples = make_samples([make_choice(role="writer")], [reward("run_a", 1.0, role="planner")])
    with pytest.raises(SampleError, match="call_1"):
        assign(samples, CreditConfig(advantage="grpo"))
    assert run_returns({"run_a": (reward("run_a", 1.0, role="planner"),)}) == {}
    given = {"run_a": (reward("run_a", 1.0), reward("run_a", 3.0, "seen"))}
    assert run_returns(given, {"f1": 2.0}) == {"run_a": 2.0}


@pytest.mark.parametrize(
    ("normalise", "planner", "writer"),
    [
        # Advantages (lambda 1, values 0, one token a choice) are the returns: planner 0, 2; writer 100, 300.
        # A role: mean 1 and std sqrt(2); mean 200 and std sqrt(20000): the same two numbers for both.
        ("role", [-(2**-0.5), 2**-0.5], [-(2**-0.5), 2**-0.5]),
        (None, [-(2**-0.5), 2**-0.5], [-(2**-0.5), 2**-0.5]),
        # The batch: mean 100.5, squares 10100.25 + 9702.25 + 0.25 + 39800.25 = 59603, std sqrt(59603 / 3) = 140.95:
        # both of the planner's answers are pushed down, the good one as well.
        ("batch", [-0.7130, -0.6988], [-0.0035, 1.4154]),
        ("model", [-0.7130, -0.6988], [-0.0035, 1.4154]),
        ("off", [0, 2], [100, 300]),
    ],
)
def test_normalising_a_role_by_itself_favours_none(make_choice, make_samples, normalise, planner, writer):
    choices = [
        make_choice(run_id=run, call_id=f"{run}{role}", role=role, tokens=(1,)) for run in ("r1", "r2") for role in "pw"
    ]
    rewards = [
        reward(run, value, role=role)
        for run, values in (("r1", (0.0, 100.0)), ("r2", (2.0, 300.0)))
        for role, value in zip("pw", values, strict=True)
    ]
    config = CreditConfig(gae_lambda=1.0, normalise=normalise)
    advantages_N = assign(make_samples(choices, rewards), config, np.zeros(4)).advantages_N
    np.testing.assert_allclose(advantages_N[::2], planner, atol=2e-4)
    np.testing.assert_allclose(advantages_N[1::2], writer, atol=2e-4)
    if normalise == "model":
        for own in (choices[::2], choices[1::2]):
            apart = assign(make_samples(own, rewards), config, np.zeros(2)).advantages_N
            np.testing.assert_allclose(apart, [-(2**-0.5), 2**-0.5], atol=1e-5)


def test_what_compares_cells_is_not_normalised_again(make_choice, make_samples):
    # Mean 2, sample variance (4 + 1 + 9) / 2 = 7. dr_grpo leaves the deviations; reinforce++ whitens the batch.
    choices = [make_choice(run_id=run, call_id=run, tokens=(1,)) for run in "abc"]
    rewards = [reward(run, value) for run, value in zip("abc", (0.0, 1.0, 5.0), strict=True)]
    samples = make_samples(choices, rewards)
    assert assign(samples, CreditConfig(advantage="dr_grpo")).advantages_N.tolist() == [-2.0, -1.0, 3.0]
    whitened_N = assign(samples, CreditConfig(advantage="reinforce++")).advantages_N
    np.testing.assert_allclose(whitened_N, np.array([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-6))


def test_the_scope_carries_a_later_roles_reward_back(make_choice, make_samples):
    """Rewards stand on the writer's calls only: the planner has no reward of its own, and a return in the graph."""
    choices = two_roles(make_choice, ("r1", "r2"))
    rewards = [reward("r1", 1.0, call_id="r1w"), reward("r2", 3.0, call_id="r2w")]
    samples = make_samples(choices, rewards, links=[("r1p", "r1w"), ("r2p", "r2w")])
    credit = assign(samples, CreditConfig(advantage="dr_grpo", scope="graph"))
    assert credit.returns_B.tolist() == [1.0, 1.0, 3.0, 3.0]
    assert np.isnan(credit.rewards_B).tolist() == [True, False, True, False]
    assert credit.advantages_N.tolist() == [-1.0] * 4 + [1.0] * 4
    assert credit.counts["n_unlinked_choices"] == 0
    with pytest.raises(SampleError, match="no reward reaches"):
        assign(samples, CreditConfig(advantage="dr_grpo"))


def test_choices_whose_place_nobody_knows_are_counted(make_choice, make_samples):
    choices = two_roles(make_choice, ("r1", "r2"))
    samples = make_samples(choices, [reward("r1", 1.0), reward("r2", 2.0)], links=[("r1p", "r1w")])
    assert assign(samples, CreditConfig(advantage="grpo", scope="graph")).counts["n_unlinked_choices"] == 2


def test_what_does_not_fit_is_refused(make_choice, make_samples):
    samples = make_samples([make_choice()], [reward("run_a", 1.0)])
    with pytest.raises(BatchError, match="needs the values"):
        assign(samples, CreditConfig())
    with pytest.raises(BatchError, match="do not fit"):
        assign(samples, CreditConfig(), np.zeros(3))


# -- flat arrays


def test_whitened_values_have_mean_zero_and_deviation_one():
    # mean 2, sample variance (1 + 0 + 1) / 2 = 1
    np.testing.assert_allclose(whitened(np.array([1.0, 2.0, 3.0])), np.array([-1.0, 0.0, 1.0]) / (1 + 1e-6))
    assert whitened(np.array([0.1, 0.1])).tolist() == [0.0, 0.0]


def test_flat_arrays_lay_choices_one_after_another(make_choice):
    choices = [make_choice(tokens=(1, 2)), make_choice(tokens=(3,)), make_choice(tokens=(4, 5, 6))]
    starts = token_starts(choices)
    assert starts.tolist() == [0, 2, 3, 6]
    assert spread(np.array([1.0, 2.0, 3.0]), starts).tolist() == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    np.testing.assert_allclose(behaviour_logprobs(choices), [-0.5, -0.6, -0.5, -0.5, -0.6, -0.7])


def test_statistics_of_parts_are_those_of_all():
    rng = np.random.default_rng(5)
    for sizes in ([1], [4], [1, 1], [2, 5, 1], [30, 3]):
        parts = [rng.normal(size=size) for size in sizes]
        joined, together = Statistics.joined([Statistics.of(list(part)) for part in parts]), np.concatenate(parts)
        of_all = Statistics.of(list(together))
        assert joined.count == len(together)
        np.testing.assert_allclose([joined.mean, joined.std], [of_all.mean, of_all.std], rtol=1e-12)
    equal = [Statistics.of([0.1] * 3), Statistics.of([0.1])]
    assert Statistics.joined(equal).std == 0.0


def test_a_batch_of_several_models_is_normalised_as_one(make_choice, make_samples):
    """2, 4 of one model and 9 of another: their mean is 5, their deviation sqrt((9 + 1 + 16) / 2)."""
    choices = [make_choice(run_id=run, call_id=run, tokens=(1,)) for run in "ab"]
    ours = make_samples(choices, [reward("a", 2.0), reward("b", 4.0)])
    batch = Statistics.joined([Statistics.of([2.0, 4.0]), Statistics.of([9.0])])
    config = CreditConfig(advantage="reinforce++", normalise="batch")
    np.testing.assert_allclose(
        assign(ours, config, batch=batch).advantages_N, np.array([-3.0, -1.0]) / (13**0.5 + 1e-6)
    )
    np.testing.assert_allclose(assign(ours, config).advantages_N, np.array([-1.0, 1.0]) / (2**0.5 + 1e-6))
