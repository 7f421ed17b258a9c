"""`/tracegrad/v1/...`: tasks, groups, runs, their spans, rewards and the trainer's backlog, as JSON.

The doors for hooks, reward functions and rollout drivers that share no code with us. Every write is idempotent, as in
the store. Refuses (400) unknown fields, (404) unknown ids, (409) a record that says something else. With an API key
everything is of the key's project: what belongs to another project does not exist (404).
Called by `app`; calls the store in a worker thread.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec

from tracegrad.adapters.proxy.attribution import SpanHeader
from tracegrad.adapters.proxy.errors import InvalidRequest, from_store
from tracegrad.adapters.proxy.purposes import Purposes
from tracegrad.adapters.proxy.wire import Request
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import NotFound, TraceStoreError
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.records import ApiKey, Call, Group, Purpose, Reward, Run, RunTrace, Span, Task
from tracegrad.tracestore.rules import lease_rule
from tracegrad.tracestore.store import Store

PREFIX = "/tracegrad/v1/"
Handler = Callable[[bytes], Awaitable[Any]]


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request body. Unknown fields are refused."""


class _Task(_Body, frozen=True, kw_only=True):
    task_id: str
    input: dict[str, Any]
    reference: dict[str, Any] = {}


class _Tasks(_Body, frozen=True, kw_only=True):
    tasks: list[_Task]


class _Group(_Body, frozen=True, kw_only=True):
    group_id: str
    task_id: str
    planned_size: int
    purpose: Purpose


class _Groups(_Body, frozen=True, kw_only=True):
    groups: list[_Group]


class _Run(_Body, frozen=True, kw_only=True):
    run_id: str | None = None
    purpose: Purpose = "live"
    task_id: str | None = None
    group_id: str | None = None
    member: int | None = None


class _End(_Body, frozen=True, kw_only=True):
    status: Literal["closed", "failed"] = "closed"
    ended_by: Literal["hook", "explicit"] = "explicit"
    error: str | None = None


class _Reward(_Body, frozen=True, kw_only=True):
    name: str
    value: float
    source: str = "client"
    run_id: str | None = None
    call_id: str | None = None
    completion_id: str | None = None
    role: str | None = None
    reward_id: str | None = None


class _Rewards(_Body, frozen=True, kw_only=True):
    rewards: list[_Reward]


class _Span(SpanHeader, frozen=True, kw_only=True):
    wrote: tuple[str, ...] | None = None
    input: Any = None
    output: Any = None
    error: str | None = None
    started_at: float | None = None
    ended_at: float | None = None


class _Spans(_Body, frozen=True, kw_only=True):
    spans: list[_Span]
    source: Literal["hook", "header"] = "hook"


class Control:
    """The endpoints. Each handler takes the body's bytes and returns what will be encoded as JSON."""

    def __init__(self, config: Config, store: Store, purposes: Purposes, *, guarded: bool = False) -> None:
        self._config = config
        self._store = store
        self._purposes = purposes
        self._guarded = guarded

    def seen_by(self, key: ApiKey | None) -> "Control":
        """Return the endpoints as this key sees them: its project, and nothing of others."""
        if key is None:
            return self
        config = msgspec.structs.replace(self._config, project=key.project)
        return Control(config, self._store, self._purposes, guarded=True)

    def find(self, path: str) -> dict[str, Handler]:  # noqa: PLR0911 - a table of paths
        """Return method -> handler for a path under `PREFIX`; empty where there is no such path."""
        parts = path.removeprefix(PREFIX).split("/")
        match parts:
            case ["tasks"]:
                return {"POST": self._put_tasks}
            case ["groups"]:
                return {"POST": self._put_groups}
            case ["groups", group_id, "runs"]:
                return {"GET": lambda _: self._group_runs(group_id)}
            case ["runs"]:
                return {"POST": self._open_run}
            case ["runs", run_id]:
                return {"GET": lambda _: self._show_run(run_id)}
            case ["runs", run_id, "end"]:
                return {"POST": lambda body: self._end_run(run_id, body)}
            case ["runs", run_id, "spans"]:
                return {"POST": lambda body: self._put_spans(run_id, body)}
            case ["rewards"]:
                return {"POST": self._add_rewards}
            case ["backlog"]:
                return {"GET": lambda _: self._backlog()}
        return {}

    async def answer(self, handler: Handler, request: Request) -> bytes:
        """Run a handler and return its JSON. Raises ProxyError."""
        try:
            return msgspec.json.encode(await handler(await request.body()))
        except TraceStoreError as error:
            raise from_store(error) from error

    async def _put_tasks(self, body: bytes) -> Any:
        project = self._config.project
        tasks = [
            Task(task_id=t.task_id, input=t.input, reference=t.reference, project=project)
            for t in _read(body, _Tasks).tasks
        ]
        await asyncio.to_thread(self._store.put_tasks, tasks)
        return {"tasks": [task.task_id for task in tasks]}

    async def _put_groups(self, body: bytes) -> Any:
        groups = [Group(**msgspec.structs.asdict(group)) for group in _read(body, _Groups).groups]
        await asyncio.to_thread(self._put_own_groups, groups)
        return {"groups": [group.group_id for group in groups]}

    async def _group_runs(self, group_id: str) -> Any:
        return {"runs": await asyncio.to_thread(self._own_group_runs, group_id)}

    async def _open_run(self, body: bytes) -> Any:
        asked = _read(body, _Run)
        run = Run(
            run_id=asked.run_id or new_id("run"),
            project=self._config.project,
            purpose=asked.purpose,
            task_id=asked.task_id,
            group_id=asked.group_id,
            member=asked.member,
            opened_at=time.time(),
        )
        stored = await asyncio.to_thread(self._open_own_run, run)
        self._purposes.learn(stored)
        return stored

    async def _end_run(self, run_id: str, body: bytes) -> Any:
        end = _read(body or b"{}", _End)
        return await asyncio.to_thread(self._end_own_run, run_id, end)

    async def _show_run(self, run_id: str) -> Any:
        trace = await asyncio.to_thread(self._own_trace, run_id)
        return {
            "run": trace.run,
            "calls_summary": [_summary(call) for call in trace.calls],
            "rewards": trace.rewards,
        }

    async def _put_spans(self, run_id: str, body: bytes) -> Any:
        asked = _read(body, _Spans)
        told = [Span(run_id=run_id, source=asked.source, **msgspec.structs.asdict(span)) for span in asked.spans]
        await asyncio.to_thread(self._put_own_spans, run_id, told)
        return {"spans": len(told)}

    async def _add_rewards(self, body: bytes) -> Any:
        asked = _read(body, _Rewards).rewards
        stored = await asyncio.to_thread(lambda: self._store.add_rewards([self._reward(reward) for reward in asked]))
        return {
            "rewards": [
                {
                    "reward_id": reward.reward_id,
                    "run_id": reward.run_id,
                    "call_id": reward.call_id,
                    "late_for": reward.late_for,
                }
                for reward in stored
            ]
        }

    def _reward(self, asked: _Reward) -> Reward:
        """Find the target. Runs in a worker thread: a call is looked up by our id or by its completion id."""
        run_id, call_id = asked.run_id, None
        if (wanted := asked.call_id or asked.completion_id) is not None:
            call_id, owner = self._store.find_call(wanted, self._config.project if self._guarded else None)
            if owner is None:
                raise InvalidRequest(f"the call {call_id} belongs to no run, so a reward on it would never be read")
            if run_id not in (None, owner):
                raise InvalidRequest(f"the call {call_id} belongs to run {owner}, not to {run_id}", param="run_id")
            run_id = owner
        if run_id is None:
            raise InvalidRequest("a reward needs a run_id, a call_id or a completion_id", param="rewards")
        self._check_run(run_id)
        return Reward(
            reward_id=asked.reward_id or new_id("reward"),
            run_id=run_id,
            name=asked.name,
            value=asked.value,
            source=asked.source,
            role=asked.role,
            call_id=call_id,
            created_at=time.time(),
        )

    def _check_run(self, run_id: str) -> None:
        """Raise NotFound where the run is not the key's to see."""
        if self._guarded and self._store.get_run(run_id).project != self._config.project:
            raise NotFound(f"no run {run_id!r} in project {self._config.project!r}")

    def _check_task(self, task_id: str) -> None:
        if self._guarded and self._store.project_of_task(task_id) != self._config.project:
            raise NotFound(f"no task {task_id!r} in project {self._config.project!r}")

    def _end_own_run(self, run_id: str, end: _End) -> Run:
        self._check_run(run_id)
        return self._store.end_run(run_id, status=end.status, ended_by=end.ended_by, error=end.error)

    def _own_trace(self, run_id: str) -> RunTrace:
        self._check_run(run_id)
        return self._store.trace(run_id)

    def _put_own_spans(self, run_id: str, spans: list[Span]) -> None:
        """Write spans; a run that they open is of the key's project."""
        if self._guarded:
            self._store.ensure_runs([run_id], self._config.project)
            self._check_run(run_id)
        self._store.put_spans(spans, self._config.project)

    def _put_own_groups(self, groups: list[Group]) -> None:
        for group in groups:
            self._check_task(group.task_id)
        self._store.put_groups(groups)

    def _own_group_runs(self, group_id: str) -> list[Run]:
        if self._guarded:
            self._check_task(self._store.get_group(group_id).task_id)
        return self._store.group_runs(group_id)

    def _open_own_run(self, run: Run) -> Run:
        if self._guarded and run.group_id is not None:
            self._check_task(self._store.get_group(run.group_id).task_id)
        if run.task_id is not None:
            self._check_task(run.task_id)
        return self._store.open_run(run)

    async def _backlog(self) -> Any:
        return await asyncio.to_thread(self._read_backlog)

    def _read_backlog(self) -> Any:
        rule = lease_rule(self._config)
        backlog = self._store.backlog(self._config.trainer.job, rule)
        live = {model: self._store.live_version(model) for model in rule.models}
        return {
            "ready_groups": backlog.ready_groups,
            "leased_groups": backlog.leased_groups,
            "publishing": backlog.publishing,
            "live": {
                model: None if version is None else {"version": version.version_id, "step": version.step}
                for model, version in live.items()
            },
        }


def _summary(call: Call) -> dict[str, Any]:
    span = call.attribution.span
    return {
        "call_id": call.call_id,
        "completion_id": call.completion_id,
        "role": call.attribution.role,
        "model": call.model,
        "span": None if span is None else span.name,
        "status": call.status,
        "quarantine": call.quarantine,
        "version_dispatched": call.version_dispatched,
        "version_completed": call.version_completed,
        "prompt_tokens": None if call.prompt_ids is None else len(call.prompt_ids),
        "sampled_tokens": [len(choice.token_ids) for choice in call.choices],
        "finish_reasons": [choice.finish_reason for choice in call.choices],
        "flags": [list(choice.flags) for choice in call.choices],
        "version_spans": [choice.version_spans for choice in call.choices],
        "dispatched_at": call.timing.dispatched_at,
    }


def _read(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body cannot be read: {error}") from error
