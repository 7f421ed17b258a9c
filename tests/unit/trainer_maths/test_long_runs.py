"""One run of very many calls: four times the calls, four times the steps. Counted in bytecode, never in time."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import numpy as np
import pytest

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.tracestore.records import Attribution, CallTiming, LeaseRule, ModelCalls, Reward, Span
from tracegrad.trainer.credit import assign, token_starts
from tracegrad.trainer.samples import build_batch

RULE = LeaseRule(trained=(ModelCalls(model="main", roles=("planner",)),), max_staleness=1, min_group=1)


def span(name, step, number, *, triggers=(), wrote=(), parent=None):
    graph = f"{parent}|" if parent else ""
    fields = {"namespace": f"{graph}{name}:{number}", "superstep": step, "triggers": triggers, "wrote": wrote}
    return Span(span_id=f"{graph}{name}:{number}", run_id="r", name=name, parent_span_id=parent, **fields)


def chain(n):
    """An agent that loops: each round a span."""
    to = ("branch:to:agent",)
    return [(at, span("agent", 1 + at, at, triggers=to, wrote=to)) for at in range(n)]


def rounds(n):
    """An agent that sends four copies of a tool, again and again."""
    found, to = [], ("branch:to:agent",)
    for first in range(0, n, 5):
        found.append((first, span("agent", first, first, triggers=to, wrote=("send:tool",) * 4)))
        found += [
            (first + 1, span("tool", first + 1, first + 1 + at, triggers=(f"__pregel_push:{at}",), wrote=to))
            for at in range(4)
        ]
    return found


def fan(n):
    """One call, very many beside one another, one that reads them all."""
    to = ("branch:to:sum",)
    sent = [(1, span("work", 2, at, triggers=(f"__pregel_push:{at}",), wrote=to)) for at in range(n - 2)]
    plan, read = span("plan", 1, 0, wrote=("send:work",) * len(sent)), span("sum", 3, 0, triggers=to)
    return [(0, plan), *sent, (2, read)]


def one_span(n):
    """A plain loop in one span, without a graph below it."""
    return [(at, span("loop", 1, 0)) for at in range(n)]


def nested(n):
    """A span that makes a call of its own before each of the many subgraphs that it runs."""
    outer, found = span("outer", 1, 0), []
    for at in range(0, n, 2):
        found += [(at, outer), (at + 1, span("inner", 1, at, parent=outer.span_id))]
    return found


def no_spans(n):
    """Nobody told anything but the calls."""
    return [(at, None) for at in range(n)]


def steps_of(work: Callable[[], object]) -> int:
    """Count the bytecode operations of Python functions; those inside a comprehension are among them."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.fixture
def run_of(make_call, make_trace):
    def make(shape, n, *, each):
        calls = []
        for number, (at, where) in enumerate(shape(n)):
            timing = CallTiming(received_at=at, dispatched_at=at, first_token_at=None, completed_at=at + 0.5)
            told = Attribution(run_id="run_a", role="planner", role_source="hook", span=where)
            calls.append(replace(make_call(f"call_{number:06d}"), timing=timing, attribution=told))
        on = [{}] + ([{"call_id": call.call_id} for call in calls] if each else [])
        rewards = [
            Reward(reward_id=str(number), run_id="run_a", name="f1", value=1.0, source="t", **target)
            for number, target in enumerate(on)
        ]
        spans = tuple({where.span_id: where for _, where in shape(n) if where is not None}.values())
        return replace(make_trace(calls=calls, rewards=rewards), spans=spans)

    return make


def steps_of_training(trace, scope, turn_gamma):
    """Count the steps from a trace to advantages."""
    config = CreditConfig(advantage="gae", scope=scope, turn_gamma=turn_gamma)

    def work():
        samples = build_batch([trace], RULE, scope=scope)
        assert len(samples.choices) == len(trace.calls)
        assign(samples, config, values_N=np.zeros(token_starts(samples.choices)[-1]))

    return steps_of(work)


@pytest.mark.parametrize("scope", ["call", "graph"])
@pytest.mark.parametrize("shape", [chain, rounds, fan, one_span, nested, no_spans])
def test_the_steps_go_with_the_calls_of_a_run(run_of, shape, scope):
    steps_of_training(run_of(shape, 10, each=False), scope, 0.9)  # what is done once in a process
    fewer, more = (steps_of_training(run_of(shape, n, each=False), scope, 0.9) for n in (40, 160))
    assert more < 4 * 1.1 * fewer, f"{fewer / 40:.0f} steps a call for 40 calls, {more / 160:.0f} for 160"


def test_a_reward_on_every_call_changes_nothing_of_that(run_of):
    """The sums grow, since each call's holds what follows; no call is looked at for them again."""
    steps_of_training(run_of(chain, 10, each=True), "graph", 1.0)
    fewer, more = (steps_of_training(run_of(chain, n, each=True), "graph", 1.0) for n in (40, 160))
    assert more < 4 * 1.1 * fewer, f"{fewer / 40:.0f} steps a call for 40 calls, {more / 160:.0f} for 160"
