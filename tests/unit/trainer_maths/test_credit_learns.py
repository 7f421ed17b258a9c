"""Credit that must learn: the reward is decided by the earlier role and stands on the later role's call.

The whole way from traces to advantages (`build_batch`, `assign`), with a table of softmax policies in place of a
model: a planner picks one of four plans, a writer sees the plan and picks one of two words. The writer's call is
rewarded where the plan was the right one, whatever it wrote. Call-local credit tells the planner nothing of that.
"""

import numpy as np
import pytest

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.tracestore.records import (
    Attribution,
    Call,
    CallTiming,
    Choice,
    LeaseRule,
    ModelCalls,
    Reward,
    Run,
    RunTrace,
    Span,
)
from tracegrad.trainer.credit import assign
from tracegrad.trainer.samples import build_batch

RULE = LeaseRule(trained=(ModelCalls(model="main"),), max_staleness=1, min_group=1)

PLANS, WORDS, RIGHT, EASY = 4, 2, 2, 0
STEPS, RUNS, RATE = 30, 16, 1.0
PASS, CHANCE = 0.9, 1 / PLANS


def softmax(logits):
    scaled = np.exp(logits - logits.max())
    return scaled / scaled.sum()


def call(run_id, role, step, token, state):
    """One token, sampled in `state`: the writer's prompt holds the plan."""
    span = Span(span_id=f"{run_id}-{role}", run_id=run_id, name=role, namespace=f"{role}:{step}", superstep=step)
    return Call(
        call_id=f"{run_id}-{role}",
        completion_id=None,
        attribution=Attribution(run_id=run_id, role=role, span=span),
        model="main",
        requested_model="main",
        version_dispatched=1,
        version_completed=1,
        prompt_ids=(state,),
        choices=(Choice(index=0, token_ids=(token,), logprobs=(-1.0,), finish_reason="stop"),),
        status="complete",
        timing=CallTiming(received_at=0.0, dispatched_at=0.0, first_token_at=None, completed_at=0.0),
        request={},
        requested={},
        effective={},
    )


def run_of(number, plan, word, *, lure):
    """A run and its rewards: 1 on the writer's call for the right plan; `lure` on the planner's for the easy one."""
    run_id = f"r{number:02d}"
    rewards = [("success", f"{run_id}-writer", float(plan == RIGHT))]
    if lure:
        rewards.append(("lure", f"{run_id}-planner", lure * (plan == EASY)))
    return RunTrace(
        run=Run(run_id=run_id, purpose="train", task_id="t", group_id="g", member=number, status="closed"),
        calls=(call(run_id, "planner", 1, plan, 0), call(run_id, "writer", 2, word, 1 + plan)),
        rewards=tuple(
            Reward(reward_id=f"{run_id}-{name}", run_id=run_id, name=name, value=value, source="t", call_id=call_id)
            for name, call_id, value in rewards
        ),
    )


def chance_of_the_right_plan(config, *, lure, seed):
    """Train the tables on STEPS groups of RUNS runs; return the planner's probability of the right plan."""
    rng = np.random.default_rng(seed)
    planner, writer, values = np.zeros(PLANS), np.zeros((PLANS, WORDS)), np.zeros(1 + PLANS)
    for _ in range(STEPS):
        plans = rng.choice(PLANS, size=RUNS, p=softmax(planner))
        words = [int(rng.choice(WORDS, p=softmax(writer[plan]))) for plan in plans]
        traces = [run_of(n, int(p), w, lure=lure) for n, (p, w) in enumerate(zip(plans, words, strict=True))]
        samples = build_batch(traces, RULE, scope=config.scope)
        states = np.array([choice.prompt_ids[0] for choice in samples.choices])
        credit = assign(samples, config, values[states] if config.advantage == "gae" else None)
        for number, choice in enumerate(samples.choices):
            table = planner if choice.role == "planner" else writer[choice.prompt_ids[0] - 1]
            step = -softmax(table)
            step[choice.token_ids[0]] += 1.0
            table += RATE * credit.advantages_N[number] * step / RUNS
            if credit.targets_N is not None:
                values[states[number]] += 0.5 / RUNS * (credit.targets_N[number] - values[states[number]])
    return float(softmax(planner)[RIGHT])


@pytest.mark.parametrize(
    "advantage",
    [
        pytest.param({"advantage": "gae", "turn_lambda": 0.5, "critic_lambda": 1.0}, id="gae-bootstrapped"),
        pytest.param({"advantage": "grpo"}, id="grpo"),
        pytest.param({"advantage": "rloo"}, id="rloo"),
    ],
)
@pytest.mark.parametrize("lure", [0.0, 0.25])
def test_only_credit_of_the_graph_learns_what_an_earlier_role_decides(advantage, lure):
    """Without a reward of its own the planner is not trained; with a small misleading one it learns the wrong plan."""
    local = chance_of_the_right_plan(CreditConfig(scope="call", **advantage), lure=lure, seed=0)
    graph = chance_of_the_right_plan(CreditConfig(scope="graph", **advantage), lure=lure, seed=0)
    assert local <= CHANCE
    assert graph > PASS
