"""One fixed set of stored runs under each way to map roles to models: which tokens reach which model, one account."""

import random
from dataclasses import replace

import pytest

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import Attribution, Choice, Reward, RunTrace
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.errors import SampleError
from tracegrad.trainer.samples import build_batch
from tracegrad.trainer.shares import Shares, share

BASE = {"checkpoint": "w", "trained": False}
JUDGE = {"trained": False, "api": {"url": "https://x/v1", "key_env": "K", "model": "m"}}
FULL, SECOND, THIRD = ({"checkpoint": "w", "engine": {"url": f"http://127.0.0.1:800{n}"}} for n in range(3))


def adapter(**settings):
    return {"adapter": {"of": "base", **settings}}


MODES = {
    "full sharing": ({"all": FULL}, {"planner": "all", "writer": "all", "critic": "all"}),
    "partial sharing": ({"a": FULL, "b": SECOND}, {"planner": "a", "critic": "a", "writer": "b"}),
    "full separation": ({"p": FULL, "w": SECOND, "c": THIRD}, {"planner": "p", "writer": "w", "critic": "c"}),
    "adapter per role": (
        {"base": BASE, "p": adapter(), "w": adapter(rank=4)},
        {"planner": "p", "writer": "w", "critic": "base"},
    ),
}
EXPECTED = {
    "full sharing": {"all": [(10, 11), (20, 21, 22), (30,), (12,), (23, 24)]},
    "partial sharing": {"a": [(10, 11), (30,), (12,)], "b": [(20, 21, 22), (23, 24)]},
    "full separation": {"p": [(10, 11), (12,)], "w": [(20, 21, 22), (23, 24)], "c": [(30,)]},
    "adapter per role": {"p": [(10, 11), (12,)], "w": [(20, 21, 22), (23, 24)]},
}
"""Mode -> model -> the ids of its choices. Tens are the planner's, twenties the writer's, thirty the critic's."""

ANSWERS = [("planner", (10, 11)), ("writer", (20, 21, 22)), ("critic", (30,)), ("grader", (40, 41)), (None, (50,))]


def configured(mode: str) -> Config:
    """The mode's models and roles; in each, the grader is somebody else's API."""
    models, roles = MODES[mode]
    return parse_config({"models": {**models, "judge": JUDGE}, "roles": {**roles, "grader": "judge"}})


def shares(config: Config, traces: list[RunTrace]) -> Shares:
    return share(traces, config.trained_models(), lambda t, model: build_batch(t, lease_rule(config, model=model)))


@pytest.fixture(scope="module")
def runs(make_call, make_trace):
    """Two runs as an app made them: roles and tokens. The second has a greedy call, and a failed one."""

    def call(call_id, role, token_ids, **changes):
        choice = Choice(index=0, token_ids=token_ids, logprobs=(-0.5,) * len(token_ids), finish_reason="stop")
        return make_call(call_id, choices=(choice,), attribution=Attribution(role=role), **changes)

    first = [call(f"a{i}", role, ids) for i, (role, ids) in enumerate(ANSWERS)]
    second = [
        call("b0", "planner", (12,)),
        call("b1", "planner", (13, 14, 15), effective={"temperature": 0}),
        call("b2", "writer", (23, 24)),
        call("b3", "writer", (25,), status="failed"),
    ]
    rewards = [Reward(reward_id="x", run_id="r", name="f1", value=1.0, source="t")]
    return [make_trace(f"run-{n}", calls=calls, rewards=rewards) for n, calls in enumerate((first, second))]


def recorded(config: Config, runs: list[RunTrace]) -> list[RunTrace]:
    """The runs as the proxy records them under a configuration: the model of each call is its role's."""

    def model_of(call):
        return config.model_of(call.attribution.role) or "judge"

    return [replace(trace, calls=tuple(replace(call, model=model_of(call)) for call in trace.calls)) for trace in runs]


@pytest.mark.parametrize("mode", MODES)
def test_exactly_these_tokens_reach_each_model(mode, runs):
    config = configured(mode)
    made = shares(config, recorded(config, runs))
    assert {model: [c.token_ids for c in samples.choices] for model, samples in made.by_model.items()} == EXPECTED[mode]
    assert set(made.by_model) == set(config.trained_models())
    frozen = {"other model": 3 + (mode == "adapter per role")}
    assert excluded(made) == {**frozen, "greedy": 3, "failed call": 1}


@pytest.mark.parametrize("mode", MODES)
def test_one_account_conserves_every_sampled_token_over_all_models(mode, runs):
    config = configured(mode)
    check_conserved(config, recorded(config, runs))


def test_conservation_holds_for_any_runs_and_any_map(make_call, make_trace):
    """Random runs of random roles, recorded under one mode and trained under another: 80 of them."""
    rng = random.Random(0)
    for _ in range(80):
        before, now = (configured(rng.choice(list(MODES))) for _ in range(2))
        traces = []
        for number in range(rng.randrange(1, 4)):
            calls = []
            for turn in range(rng.randrange(6)):
                sizes = [rng.randrange(4) for _ in range(rng.randrange(1, 3))]
                choices = tuple(
                    Choice(index=i, token_ids=(7,) * n, logprobs=(-0.1,) * n, finish_reason=rng.choice(["stop", None]))
                    for i, n in enumerate(sizes)
                )
                role = rng.choice(["planner", "writer", "critic", "grader", "stranger", None])
                given = {"effective": {"temperature": rng.choice([0, 1])}, "attribution": Attribution(role=role)}
                calls.append(make_call(f"{number}-{turn}", choices=choices, **given))
            reward = Reward(reward_id=f"w{number}", run_id="r", name="f1", value=0.5, source="t")
            traces.append(make_trace(f"run-{number}", calls=calls, rewards=[reward] * rng.randrange(2)))
        check_conserved(now, recorded(before, traces))


def check_conserved(config: Config, traces: list[RunTrace]) -> None:
    made = shares(config, traces)
    sampled = {
        (trace.run.run_id, call.call_id, choice.index): len(choice.token_ids)
        for trace in traces
        for call in trace.calls
        for choice in call.choices
    }
    assert {
        (e.run_id, e.call_id, e.choice_index): e.trained_tokens + e.excluded_tokens for e in made.consumption
    } == sampled
    assert len(made.consumption) == len(sampled)
    assert all(entry.reason is not None for entry in made.consumption if not entry.trained_tokens)
    trained = [(c.run_id, c.call_id, c.choice_index) for s in made.by_model.values() for c in s.choices]
    assert len(set(trained)) == len(trained)
    assert set(trained) == {(e.run_id, e.call_id, e.choice_index) for e in made.consumption if e.reason is None}
    tokens = sum(len(c.token_ids) for samples in made.by_model.values() for c in samples.choices)
    assert tokens == made.n_trained_tokens == sum(s.n_trained_tokens for s in made.by_model.values())
    strangers = len(made.consumption) - sum(len(samples.consumption) for samples in made.by_model.values())
    assert strangers == sum(call.model not in made.by_model for t in traces for call in t.calls for _ in call.choices)


def test_what_another_model_sampled_is_not_trained_when_the_map_changes(runs):
    """Recorded under full sharing, trained under separation: the ids and logprobs are not the new models'."""
    made = shares(configured("full separation"), recorded(configured("full sharing"), runs))
    assert [samples.choices for samples in made.by_model.values()] == [(), (), ()]
    assert set(excluded(made)) == {"other model"}
    assert {model: samples.consumption for model, samples in made.by_model.items()} == {"p": (), "w": (), "c": ()}


def test_rewards_and_groups_of_the_runs_go_to_every_model(runs):
    config = configured("full separation")
    made = shares(config, recorded(config, runs))
    for samples in made.by_model.values():
        assert set(samples.rewards) == {"run-0", "run-1"}
        assert samples.run_groups == {"run-0": "group_1", "run-1": "group_1"}


def test_accounts_that_disagree_are_refused(runs):
    config = configured("partial sharing")
    traces = recorded(config, runs)

    def greedy_for_all(t, _model):
        return build_batch(t, lease_rule(config, model="a"))

    with pytest.raises(SampleError, match="sampled by 'a' and would be trained by a, b: tokens never cross models"):
        share(traces, ["a", "b"], greedy_for_all)

    def forgetful(t, model):
        return build_batch(t[:1] if model == "b" else t, lease_rule(config, model=model))

    with pytest.raises(SampleError, match="call b0 is missing in a model's account"):
        share(traces, ["a", "b"], forgetful)


def excluded(made: Shares) -> dict[str, int]:
    totals: dict[str, int] = {}
    for entry in made.consumption:
        if entry.reason is not None:
            totals[entry.reason] = totals.get(entry.reason, 0) + entry.excluded_tokens
    return totals
