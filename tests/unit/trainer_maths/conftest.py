"""Builders for the trainer's maths: choices without a store, traces without a proxy."""

from collections.abc import Callable

import pytest
import torch

from tracegrad.tracestore.records import Attribution, Call, CallTiming, Choice, Run, RunTrace, Span
from tracegrad.trainer.samples import ChoiceSample, Turn


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
