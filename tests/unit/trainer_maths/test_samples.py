"""What trains, what does not, and why: every sampled token is accounted for once."""

from dataclasses import replace

import pytest

from tracegrad.tracestore.records import Attribution, Choice, Consumption, LeaseRule, ModelCalls, Reward
from tracegrad.trainer.errors import SampleError
from tracegrad.trainer.samples import Turn, build_batch, spanned_versions, turn_of

RULE = LeaseRule(
    trained=(ModelCalls(model="main", roles=("planner", "writer"), other_roles=("judge",)),),
    max_staleness=1,
    min_group=1,
)  # of the role map {planner: main, writer: main, judge: other}


def score(run_id="run_a", value=1.0, name="f1", **target):
    return Reward(reward_id=f"rw_{name}_{target}", run_id=run_id, name=name, value=value, source="t", **target)


def batch(traces, weights=None):
    models = {3: "main", 4: "main", 5: "other"}
    assert spanned_versions(traces) <= {*models, 6}
    return build_batch(traces, replace(RULE, reward_names=tuple(weights or ())), models=models)


def test_a_sound_call_becomes_a_sample_with_what_was_recorded(make_call, make_trace):
    samples = batch([make_trace(calls=[make_call()], rewards=[score()])])
    (choice,) = samples.choices
    assert (choice.prompt_ids, choice.token_ids, choice.behaviour_logprobs) == ((1, 2, 3), (4, 5), (-0.5, -0.25))
    assert (choice.temperature, choice.version_id, choice.role) == (0.8, 3, "planner")
    assert choice.turn == Turn(superstep=1, path="plan")
    assert choice.group_key == "group_1"
    assert samples.consumption == (
        Consumption(run_id="run_a", call_id="call_1", choice_index=0, trained_tokens=2, excluded_tokens=0, reason=None),
    )


def test_tokens_of_two_versions_are_of_two_versions(make_call, make_trace):
    """A choice that ended before the exchange is all of the first; without anybody's word none of them trains."""
    two = [*choice(version_spans=((0, 3), (1, 4))), *choice(index=1)]
    samples = batch([make_trace(calls=[make_call(choices=tuple(two), version_completed=4)], rewards=[score()])])
    assert [each.token_versions for each in samples.choices] == [(3, 4), (3, 3)]


def test_a_missing_temperature_is_the_engines_default_of_one(make_call, make_trace):
    samples = batch([make_trace(calls=[make_call(effective={})], rewards=[score()])])
    assert samples.choices[0].temperature == 1.0


def choice(**changes):
    fields = {"index": 0, "token_ids": (4, 5), "logprobs": (-0.5, -0.25), "finish_reason": "stop"}
    return (Choice(**(fields | changes)),)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("other model", {"model": "other"}),
        ("other model", {"attribution": Attribution(role="judge")}),
        ("no role", {"attribution": Attribution()}),
        ("other role", {"attribution": Attribution(role="stranger")}),
        ("failed call", {"status": "failed"}),
        ("aborted", {"status": "aborted"}),
        ("aborted", {"choices": choice(finish_reason="abort")}),
        ("aborted", {"choices": choice(finish_reason=None)}),
        ("quarantined: usage mismatch", {"quarantine": "usage mismatch"}),
        ("no version", {"version_dispatched": None}),
        ("version changed", {"version_completed": 4}),
        ("version changed", {"version_completed": None}),
        ("no prompt ids", {"prompt_ids": None}),
        ("no prompt ids", {"prompt_ids": ()}),
        ("no logprobs", {"choices": choice(logprobs=None)}),
        ("length mismatch", {"choices": choice(logprobs=(-0.5,))}),
        ("nan logprob", {"choices": choice(logprobs=(-0.5, float("nan")))}),
        ("nan logprob", {"choices": choice(logprobs=(-0.5, float("-inf")))}),
        ("version spans", {"choices": choice(version_spans=((1, 3),)), "version_completed": 3}),
        ("version spans", {"choices": choice(version_spans=((0, 3), (2, 4))), "version_completed": 4}),
        ("version spans", {"choices": choice(version_spans=((0, 3), (1, 5))), "version_completed": 5}),
        ("version spans", {"choices": choice(version_spans=((0, 3), (1, 6))), "version_completed": 6}),
        ("greedy", {"effective": {"temperature": 0}}),
        ("greedy", {"effective": {"temperature": 0.005}}),
        ("greedy", {"choices": choice(flags=("greedy",))}),
        ("constrained", {"choices": choice(flags=("constrained",))}),
        ("constrained", {"request": {"response_format": {"type": "json_schema"}}}),
        ("constrained", {"request": {"tool_choice": "required"}}),
        ("constrained", {"request": {"tool_choice": {"type": "function", "function": {"name": "f"}}}}),
        ("constrained", {"effective": {"guided_regex": "a+"}}),
        ("penalised", {"choices": choice(flags=("penalised",))}),
        ("penalised", {"effective": {"frequency_penalty": 0.1}}),
        ("penalised", {"effective": {"repetition_penalty": 1.1}}),
        ("penalised", {"effective": {"logit_bias": {"5": 1}}}),
        ("truncated sampling", {"effective": {"top_p": 0.9}}),
        ("truncated sampling", {"effective": {"top_k": 20}}),
        ("truncated sampling", {"effective": {"min_p": 0.05}}),
        ("truncated sampling", {"choices": choice(flags=("truncated_sampling",))}),
    ],
)
def test_what_must_not_train_is_excluded_with_its_reason(make_call, make_trace, reason, changes):
    samples = batch([make_trace(calls=[make_call(**changes)], rewards=[score()])])
    assert samples.choices == ()
    assert [(c.reason, c.trained_tokens, c.excluded_tokens) for c in samples.consumption] == [(reason, 0, 2)]


@pytest.mark.parametrize(
    "effective",
    [
        {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
        {"top_k": -1, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
        {"top_p": None, "response_format": {"type": "text"}, "tool_choice": "auto"},
        {"tool_choice": None, "response_format": None, "max_tokens": 16, "seed": 3},
    ],
)
def test_switched_off_parameters_do_not_exclude(make_call, make_trace, effective):
    assert len(batch([make_trace(calls=[make_call(effective=effective)], rewards=[score()])]).choices) == 1


def test_a_choice_whose_kept_sets_are_known_trains_with_them(make_call, make_trace):
    kept = ((5, 4), (6,))
    call = make_call(choices=choice(token_ids=(4, 6), kept_ids=kept), effective={"top_p": 0.9, "min_p": 0.05})
    (sample,) = batch([make_trace(calls=[call], rewards=[score()])]).choices
    assert sample.kept_ids == kept


def test_an_empty_choice_is_accounted_for_with_no_tokens(make_call, make_trace):
    call = make_call(choices=choice(token_ids=(), logprobs=()))
    samples = batch([make_trace(calls=[call], rewards=[score()])])
    assert samples.choices == ()
    assert samples.consumption[0].reason == "empty choice"


def test_a_failed_run_does_not_train_and_gives_no_reward(make_call, make_trace):
    samples = batch([make_trace(calls=[make_call()], rewards=[score()], status="failed")])
    assert samples.consumption[0].reason == "run failed"
    assert samples.rewards == {}


def test_a_request_sent_again_trains_once(make_call, make_trace):
    """The retry's answer is the one the app went on with; what it repeats is context for nobody."""
    calls = [make_call("first"), make_call("second", retry_of="first"), make_call("third", retry_of="second")]
    samples = batch([make_trace(calls=calls, rewards=[score()])])
    assert [choice.call_id for choice in samples.choices] == ["third"]
    assert samples.excluded_tokens == {"superseded by a retry": 4}


def test_no_reward_is_not_a_reward_of_zero(make_call, make_trace):
    bare = batch([make_trace(calls=[make_call()])])
    assert bare.consumption[0].reason == "no reward"
    uncounted = batch([make_trace(calls=[make_call()], rewards=[score(name="latency")])], {"f1": 1.0})
    assert uncounted.consumption[0].reason == "no reward"
    zero = batch([make_trace(calls=[make_call()], rewards=[score(value=0.0)])])
    assert len(zero.choices) == 1


def test_a_reward_on_one_role_or_call_leaves_the_others_unrewarded(make_call, make_trace):
    calls = [
        make_call("call_1", role="planner"),
        make_call("call_2", role="writer"),
        make_call("call_3", role="writer"),
    ]
    by_role = batch([make_trace(calls=calls, rewards=[score(role="planner")])])
    assert [c.reason for c in by_role.consumption] == [None, "no reward", "no reward"]
    by_call = batch([make_trace(calls=calls, rewards=[score(call_id="call_3", role="writer")])])
    assert [c.reason for c in by_call.consumption] == ["no reward", "no reward", None]


def test_every_choice_of_every_run_is_accounted_for_once(make_call, make_trace):
    many = tuple(choice(index=i, token_ids=(7,) * (i + 1), logprobs=(-1.0,) * (i + 1))[0] for i in range(3))
    traces = [
        make_trace("run_a", calls=[make_call("c1", choices=many), make_call("c2", model="other")], rewards=[score()]),
        make_trace("run_b", calls=[make_call("c3", quarantine="nan")], rewards=[score("run_b")]),
    ]
    samples = batch(traces)
    stored = sum(len(c.token_ids) for trace in traces for call in trace.calls for c in call.choices)
    assert samples.n_trained_tokens == sum(len(c.token_ids) for c in samples.choices) == 1 + 2 + 3
    assert samples.excluded_tokens == {"other model": 2, "quarantined: nan": 2}
    assert samples.n_trained_tokens + sum(samples.excluded_tokens.values()) == stored
    assert len({(c.call_id, c.choice_index) for c in samples.consumption}) == len(samples.consumption) == 5


def test_order_is_the_plans_order(make_call, make_trace):
    traces = [make_trace(r, calls=[make_call(f"call_{r}")], rewards=[score(r)]) for r in ("run_b", "run_a")]
    assert [c.run_id for c in batch(traces).choices] == ["run_b", "run_a"]


def test_runs_that_are_never_leased_are_refused(make_call, make_trace):
    with pytest.raises(SampleError, match="run_a is still open"):
        batch([make_trace(calls=[make_call()], status="open")])
    with pytest.raises(SampleError, match="eval"):
        batch([make_trace(calls=[make_call()], purpose="eval")])


def test_a_reward_given_twice_is_refused(make_call, make_trace):
    with pytest.raises(SampleError, match="'f1' stands twice"):
        batch([make_trace(calls=[make_call()], rewards=[score(value=0.0), score(value=1.0)])])


def test_a_turn_is_the_same_place_in_two_runs(make_call):
    span = make_call(namespace="plan:1f0a-77|model:9c").attribution.span
    assert (
        turn_of(span) == turn_of(replace(span, namespace="plan:aaaa|model:bb")) == Turn(superstep=1, path="plan|model")
    )
    assert turn_of(replace(span, namespace="other:1")) != turn_of(span)
    assert turn_of(None) == Turn()


def test_the_scope_decides_whether_an_earlier_call_is_rewarded(make_call, make_trace):
    """Only the writer's call has a reward. In the graph it reaches the planner's, which came before; elsewhere not."""
    calls = [
        make_call("first", superstep=1, namespace="plan:1"),
        make_call("second", role="writer", superstep=2, namespace="write:2"),
        make_call("third", role="writer", superstep=3, namespace="more:3"),
    ]
    trace = make_trace(calls=calls, rewards=[score(call_id="second")])

    def reasons(scope):
        made = build_batch([trace], RULE, scope=scope)
        assert [node.call_id for node in made.graphs["run_a"].nodes] == ["third", "second", "first"]
        return [entry.reason for entry in made.consumption]

    assert reasons("call") == reasons("role") == ["no reward", None, "no reward"]
    assert reasons("graph") == [None, None, "no reward"]
