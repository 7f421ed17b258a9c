"""Small worlds for tests of a store: a clock to turn, calls with given tokens, ready groups, a live version.

Called by the contract suite beside it, and by any test that needs a store with something in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import text

from tracegrad.tracestore.records import (
    Attribution,
    Call,
    CallTiming,
    Choice,
    Consumption,
    Group,
    Lease,
    LeaseRule,
    ModelCalls,
    PolicyVersion,
    Purpose,
    Reward,
    Run,
    Span,
    Task,
)
from tracegrad.tracestore.step_records import NewVersion, StepCommit
from tracegrad.tracestore.store import Store

JOB = "job"
MODEL = "main"


class Clock:
    """Unix seconds that pass only when told to; hand it to `open_store`."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def make_call(
    call_id: str,
    run_id: str | None,
    *,
    tokens: Sequence[Sequence[int]] = ((4, 5, 6),),
    role: str | None = "answerer",
    model: str = MODEL,
    version: int | None = None,
    at: float = 1_000.0,
    **changed: Any,
) -> Call:
    """Return a complete call with one choice per token sequence; `changed` are other fields of `Call`."""
    span = None if run_id is None else Span(span_id=f"span-{role}", run_id=run_id, name=str(role), superstep=1)
    fields: dict[str, Any] = {
        "call_id": call_id,
        "completion_id": f"chatcmpl-{call_id}",
        "attribution": Attribution(
            run_id=run_id,
            run_source="header" if run_id else None,
            role=role,
            role_source="header" if role else None,
            span=span,
        ),
        "model": model,
        "requested_model": "gpt-4o",
        "version_dispatched": version,
        "version_completed": version,
        "prompt_ids": (1, 2, 3),
        "choices": tuple(make_choice(index, ids) for index, ids in enumerate(tokens)),
        "status": "complete",
        "timing": CallTiming(received_at=at, dispatched_at=at, first_token_at=None, completed_at=at + 1),
        "request": {"messages": [{"role": "user", "content": "hé"}]},
        "requested": {"temperature": 0.0},
        "effective": {"temperature": 1.0},
    }
    return Call(**{**fields, **changed})


def make_choice(index: int, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> Choice:
    """Return a choice with the given tokens, each sampled at logprob -0.5 unless told otherwise."""
    return Choice(
        index=index,
        token_ids=tuple(ids),
        logprobs=tuple(-0.5 for _ in ids) if logprobs is None else tuple(logprobs),
        finish_reason="stop",
        message={"role": "assistant", "content": "x"},
        flags=("stop_string",),
    )


def make_rule(**changed: Any) -> LeaseRule:
    """Return the rule of the tests: one model, any role, two members, one step of staleness."""
    fields = {"max_staleness": 1, "min_group": 2, **changed}
    of = {name: fields.pop(name) for name in ("model", "roles", "other_roles") if name in fields}
    return LeaseRule(**{"trained": (ModelCalls(**{"model": MODEL, **of}),), **fields})


def add_group(store: Store, group_id: str = "g", *, size: int = 2, purpose: Purpose = "train") -> list[str]:
    """Put a task and a group and open its runs; return the run ids."""
    store.put_tasks([Task(task_id=f"task-{group_id}", input={"question": group_id})])
    store.put_groups([Group(group_id=group_id, task_id=f"task-{group_id}", planned_size=size, purpose=purpose)])
    run_ids = [f"{group_id}-{member}" for member in range(size)]
    for member, run_id in enumerate(run_ids):
        store.open_run(Run(run_id=run_id, purpose=purpose, group_id=group_id, member=member))
    return run_ids


def finish_run(store: Store, run_id: str, *, version: int | None = None, reward: float | None = 1.0) -> None:
    """Give a run one call of three sampled tokens, a reward (unless None), and close it; default: the first version."""
    version = first_version(store) if version is None else version
    store.append_calls([make_call(f"call-{run_id}", run_id, version=version)])
    if reward is not None:
        store.add_rewards([make_reward(f"reward-{run_id}", run_id, reward)])
    store.end_run(run_id, status="closed", ended_by="explicit")


def make_reward(reward_id: str, run_id: str, value: float = 1.0, name: str = "f1", **changed: Any) -> Reward:
    """Return a reward; `changed` are other fields."""
    return Reward(**{"reward_id": reward_id, "run_id": run_id, "name": name, "value": value, "source": "t", **changed})


def ready_group(store: Store, group_id: str = "g", *, size: int = 2, version: int | None = None) -> list[str]:
    """Add a group all of whose runs are closed and rewarded; return the run ids."""
    run_ids = add_group(store, group_id, size=size)
    for run_id in run_ids:
        finish_run(store, run_id, version=version)
    return run_ids


def first_version(store: Store, model: str = MODEL) -> int:
    """Return the model's oldest version, made now where there is none: a call without one never trains."""
    versions = store.list_versions(model)
    if versions:
        return min(version.version_id for version in versions)
    made = store.add_version(
        model=model, kind="initial", parent_id=None, checkpoint_path="/w", checkpoint_hash="w", step=0, job_id=None
    )
    return made.version_id


def live_version(store: Store, step: int = 0, model: str = MODEL) -> PolicyVersion:
    """Add a version and publish it. It goes on from the newest of fewer updates of the live line."""
    live = store.live_version(model)
    line = [] if live is None else [one for one in store.list_versions(model) if one.line == live.line]
    parent = next((one for one in reversed(line) if one.updates < step and not one.abandoned), None)
    for number in range(step if parent is None else parent.updates + 1, step + 1):
        parent = store.add_version(
            model=model,
            kind="initial" if number == 0 else "step",
            parent_id=None if parent is None else parent.version_id,
            checkpoint_path=f"/checkpoints/{number}",
            checkpoint_hash=f"hash-{number}",
            step=number,
            job_id=None,
        )
    assert parent is not None
    go_live(store, parent)
    return parent


def go_live(store: Store, version: PolicyVersion) -> None:
    """Publish a version."""
    publish_id = store.request_publish(version.version_id).publish_id
    store.advance_publish(publish_id, "draining")
    store.advance_publish(publish_id, "swapping")
    store.advance_publish(publish_id, "live")


def take(store: Store, *, groups: int = 1, step: int = 1, epoch: int = 0, lease_s: float = 60, **rule: Any) -> Lease:
    """Register the job and lease; fail where nothing is ready."""
    store.register_job(JOB, [MODEL], {})
    lease = store.lease(JOB, make_rule(**rule), groups=groups, lease_s=lease_s, step=step, epoch=epoch, seed=7)
    assert lease is not None, "no group is ready"
    return lease


def account(store: Store, lease: Lease, *, excluded: Mapping[str, str] | None = None) -> list[Consumption]:
    """Account for every choice of a lease: all tokens trained, but for the calls in `excluded` (call id -> reason)."""
    reasons = excluded or {}
    return [
        Consumption(
            run_id=trace.run.run_id,
            call_id=call.call_id,
            choice_index=choice.index,
            trained_tokens=0 if call.call_id in reasons else len(choice.token_ids),
            excluded_tokens=len(choice.token_ids) if call.call_id in reasons else 0,
            reason=reasons.get(call.call_id),
        )
        for trace in store.lease_traces(lease)
        for call in trace.calls
        for choice in call.choices
    ]


def make_commit(
    consumption: Sequence[Consumption], *, hash_: str = "sha", model: str = MODEL, parent: int | None = None
) -> StepCommit:
    """Return the commit of a step of one model."""
    return StepCommit(
        checkpoint_path=f"/checkpoints/{hash_}",
        checkpoint_hash=hash_,
        versions=(NewVersion(model=model, path=f"/checkpoints/{hash_}/{model}", parent_id=parent),),
        consumption=consumption,
        metrics={"loss": 0.25},
    )


def train(store: Store, *, step: int = 1, **how: Any) -> PolicyVersion:
    """Lease one group and commit a step that trained all of it."""
    lease = take(store, step=step, **how)
    return store.commit_step(lease, make_commit(account(store, lease), hash_=f"sha-{step}"))[MODEL]


def sql(store: Store, statement: str, **parameters: Any) -> int:
    """Run a writing statement past the Store's methods; return the row count."""
    with store._db.write() as connection:
        return int(connection.execute(text(statement), parameters).rowcount)
