"""Builders for the trainer's maths: choices without a store, traces without a proxy."""

from collections.abc import Callable

import pytest
import torch

from tracegrad.tracestore.records import Attribution, Call, CallTiming, Choice, Run, RunTrace, Span
from tracegrad.trainer.run_graph import CallNode, linked
from tracegrad.trainer.samples import ChoiceSample, Samples, Turn


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_choice() -> Callable[..., ChoiceSample]:
    def make(prompt=(1, 2, 3), tokens=(4, 5), **changes) -> ChoiceSample:
        fields = {
            "run_id": "run_a",
            "group_id": "group_1",
            "task_id": "task_1",
            "call_id": "call_1",
            "choice_index": 0,
            "role": "planner",
            "turn": Turn(superstep=1, path="plan"),
            "behaviour_logprobs": tuple(-0.5 - 0.1 * i for i in range(len(tokens))),
            "temperature": 1.0,
            "finish_reason": "stop",
            "version_id": 1,
        }
        return ChoiceSample(prompt_ids=tuple(prompt), token_ids=tuple(tokens), **(fields | changes))

    return make


@pytest.fixture(scope="session")
def make_call() -> Callable[..., Call]:
    def make(call_id="call_1", *, role="planner", superstep=1, namespace="plan:1f", choices=None, **changes) -> Call:
        span = Span(span_id=f"span_{call_id}", run_id="r", name="plan", namespace=namespace, superstep=superstep)
        fields = {
            "completion_id": f"cmpl_{call_id}",
            "attribution": Attribution(run_id="r", role=role, role_source="hook", span=span),
            "model": "main",
            "requested_model": "gpt-4o",
            "version_dispatched": 3,
            "version_completed": 3,
            "prompt_ids": (1, 2, 3),
            "choices": choices
            if choices is not None
            else (Choice(index=0, token_ids=(4, 5), logprobs=(-0.5, -0.25), finish_reason="stop"),),
            "status": "complete",
            "timing": CallTiming(received_at=0.0, dispatched_at=0.0, first_token_at=None, completed_at=1.0),
            "request": {"messages": []},
            "requested": {},
            "effective": {"temperature": 0.8},
        }
        return Call(call_id=call_id, **(fields | changes))

    return make


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., RunTrace]:
    def make(run_id="run_a", *, calls=(), rewards=(), **changes) -> RunTrace:
        fields = {"purpose": "train", "task_id": "task_1", "group_id": "group_1", "member": 0, "status": "closed"}
        return RunTrace(run=Run(run_id=run_id, **(fields | changes)), calls=tuple(calls), rewards=tuple(rewards))

    return make


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., Samples]:
    """Samples of choices as they are given; `links`: pairs of call ids; `context`: calls that are not trained."""

    def make(choices, rewards, *, links=(), context=()) -> Samples:
        runs = {choice.run_id for choice in choices} | {one.run_id for one in rewards}
        graphs = {}
        for run in runs:
            nodes = {
                c.call_id: CallNode(call_id=c.call_id, role=c.role, model="main") for c in choices if c.run_id == run
            }
            nodes |= {node.call_id: node for node in context}
            graphs[run] = linked(nodes.values(), [link for link in links if set(link) <= set(nodes)])
        groups = {choice.run_id: choice.group_key for choice in choices}
        return Samples(
            choices=tuple(choices),
            consumption=(),
            rewards={run: tuple(one for one in rewards if one.run_id == run) for run in runs},
            run_groups={run: groups.get(run, "group_1") for run in runs},
            graphs=graphs,
        )

    return make
