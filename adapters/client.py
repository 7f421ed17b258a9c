"""A small client of the proxy's own API (`/tracegrad/v1`): runs, tasks, groups, rewards.

On the standard library's http.client, not httpx: our own requests must not pass our own hook, and an app that only
posts rewards needs nothing else. One connection per request, so a client may be shared by threads. Every write
carries an id made here, so it is repeated safely where the connection broke or the proxy answered 503. Each method
`x` has an async twin `ax`, which runs in a thread. Called by `wrap`, the launcher, the rollout driver and users.
"""

import asyncio
import http.client
import json
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote, urlsplit

from tracegrad.adapters.errors import ProxyFailed, ProxyRefused, ProxyUnreachable
from tracegrad.adapters.scope import key_named
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.records import EndedBy, Group, Json, Purpose, Run, RunStatus, Task

_P = ParamSpec("_P")
_R = TypeVar("_R")
_RUN_FIELDS = frozenset(field.name for field in fields(Run))
_PAUSES_S = (0.05, 0.2, 0.5)
"""Pauses before the repetitions of a request that met a broken connection or a 503."""


def _threaded(
    method: Callable[Concatenate["ProxyClient", _P], _R],
) -> Callable[Concatenate["ProxyClient", _P], Coroutine[Any, Any, _R]]:
    async def twin(self: "ProxyClient", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await asyncio.to_thread(method, self, *args, **kwargs)

    twin.__name__, twin.__doc__ = f"a{method.__name__}", method.__doc__
    return twin


class ProxyClient:
    """Talks to one proxy. `root` is its URL without `/v1`; `timeout_s` bounds each request.

    `api_key` defaults to what the environment names (TRACEGRAD_API_KEY, or a `tg-` key in OPENAI_API_KEY).

    Every method raises `ProxyUnreachable`, `ProxyRefused` (4xx) or `ProxyFailed` (5xx).
    """

    def __init__(self, root: str, *, timeout_s: float = 30.0, api_key: str | None = None) -> None:
        parts = urlsplit(root)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{root!r} is not a proxy's URL (for example http://127.0.0.1:8080)")
        self.root = root.rstrip("/").removesuffix("/v1")
        self._https = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        self._prefix = urlsplit(self.root).path
        self._timeout_s = timeout_s
        key = key_named(os.environ) if api_key is None else api_key
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def health(self) -> Json:
        """Return what `/health` answers."""
        return self._ask("GET", "/health")

    def open_run(
        self,
        *,
        run_id: str | None = None,
        purpose: Purpose = "live",
        task_id: str | None = None,
        group_id: str | None = None,
        member: int | None = None,
    ) -> Run:
        """Open a run and return it as stored; without `run_id` an id is made here. Idempotent by id."""
        body: dict[str, Any] = {"run_id": run_id or new_id("run"), "purpose": purpose}
        optional = {"task_id": task_id, "group_id": group_id, "member": member}
        body |= {name: value for name, value in optional.items() if value is not None}
        return _run(self._ask("POST", "/tracegrad/v1/runs", body))

    def end_run(
        self, run_id: str, *, status: RunStatus = "closed", ended_by: EndedBy = "explicit", error: str | None = None
    ) -> Run:
        """End a run as `closed` or `failed`; the same end twice is one end."""
        body = {"status": status, "ended_by": ended_by, "error": error}
        return _run(self._ask("POST", f"/tracegrad/v1/runs/{_segment(run_id)}/end", body))

    def put_tasks(self, tasks: Sequence[Task]) -> None:
        """Store tasks; the same content again is a no-op."""
        rows = [{"task_id": t.task_id, "input": t.input, "reference": t.reference} for t in tasks]
        self._ask("POST", "/tracegrad/v1/tasks", {"tasks": rows})

    def put_groups(self, groups: Sequence[Group]) -> None:
        """Store groups; the same content again is a no-op."""
        self._ask("POST", "/tracegrad/v1/groups", {"groups": [asdict(group) for group in groups]})

    def post_rewards(self, rewards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Append rewards in one request and return what was stored: reward_id, run_id, call_id, late_for.

        Each has `name`, `value`, `source` and exactly one of `run_id`, `call_id`, `completion_id` (`role` beside
        `run_id`). A `reward_id` is made where there is none, so that a repetition stores nothing twice.
        """
        rows = [{"reward_id": new_id("rwd"), **reward} for reward in rewards]
        stored: list[dict[str, Any]] = self._ask("POST", "/tracegrad/v1/rewards", {"rewards": rows})["rewards"]
        return stored

    def reward(
        self,
        value: float,
        *,
        name: str = "reward",
        run_id: str | None = None,
        call_id: str | None = None,
        completion_id: str | None = None,
        role: str | None = None,
        source: str = "client",
    ) -> dict[str, Any]:
        """Append one reward: on a run, on a role of it, or on a call (by our id or by the completion's).

        Raises:
            ValueError: not exactly one of `run_id`, `call_id`, `completion_id`.
        """
        target = {"run_id": run_id, "call_id": call_id, "completion_id": completion_id}
        given = {key: value for key, value in target.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"name exactly one of run_id, call_id and completion_id, not {sorted(given) or 'none'}")
        row = {**given, "name": name, "value": value, "source": source}
        return self.post_rewards([row | ({"role": role} if role is not None else {})])[0]

    def put_spans(self, run_id: str, spans: Sequence[Mapping[str, Any]]) -> None:
        """Tell parts of spans of a run: the fields of `records.Span` without `run_id`. The same again is a no-op."""
        self._ask("POST", f"/tracegrad/v1/runs/{_segment(run_id)}/spans", {"spans": list(spans)})

    def get_run(self, run_id: str) -> dict[str, Any]:
        """Return `{run, calls_summary, rewards}`."""
        return self._ask("GET", f"/tracegrad/v1/runs/{_segment(run_id)}")

    def group_runs(self, group_id: str) -> list[Run]:
        """Return the runs of a group."""
        return [_run(row) for row in self._ask("GET", f"/tracegrad/v1/groups/{_segment(group_id)}/runs")["runs"]]

    def backlog(self) -> dict[str, Any]:
        """Return `{ready_groups, leased_groups, publishing, live}`; `live`: model -> `{version, step}`, or None."""
        return self._ask("GET", "/tracegrad/v1/backlog")

    ahealth = _threaded(health)
    aopen_run = _threaded(open_run)
    aend_run = _threaded(end_run)
    aput_tasks = _threaded(put_tasks)
    aput_groups = _threaded(put_groups)
    apost_rewards = _threaded(post_rewards)
    areward = _threaded(reward)
    aget_run = _threaded(get_run)
    agroup_runs = _threaded(group_runs)
    abacklog = _threaded(backlog)

    def _ask(self, method: str, path: str, body: Json | None = None) -> dict[str, Any]:
        payload = None if body is None else json.dumps(body, allow_nan=False).encode()
        for pause_s in (*_PAUSES_S, None):
            try:
                status, raw = self._exchange(method, path, payload)
            except TimeoutError as error:
                raise ProxyUnreachable(f"{method} {self.root}{path}: no answer in {self._timeout_s:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                if pause_s is None:
                    raise ProxyUnreachable(
                        f"no proxy answers at {self.root} ({error or type(error).__name__}); start it with "
                        "`tracegrad proxy`, or name the right one"
                    ) from error
            else:
                if status != 503 or pause_s is None:
                    return self._read(method, path, status, raw)
            time.sleep(pause_s)
        raise AssertionError("unreachable: the last repetition returns or raises")

    def _exchange(self, method: str, path: str, payload: bytes | None) -> tuple[int, bytes]:
        factory = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = factory(self._host, self._port, timeout=self._timeout_s)
        try:
            headers = dict(self._headers)
            if payload is not None:
                headers["content-type"] = "application/json"
            connection.request(method, self._prefix + path, body=payload, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _read(self, method: str, path: str, status: int, raw: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(raw) if raw else {}
        except ValueError as error:
            message = f"{method} {self.root}{path}: HTTP {status} without JSON; is that a tracegrad proxy?"
            raise ProxyFailed(message, status=status, code=None) from error
        if status < 400:
            return answer if isinstance(answer, dict) else {"value": answer}
        said = (answer.get("error") or _unwell(answer)) if isinstance(answer, dict) else None
        fields_said = said if isinstance(said, dict) else {"message": str(said or answer)}
        kind = ProxyRefused if status < 500 else ProxyFailed
        message = f"{method} {path}: HTTP {status}: {fields_said.get('message')}"
        raise kind(message, status=status, code=fields_said.get("code"))


def _unwell(health: Json) -> str | None:
    """What is wrong by a report of `/health`, in words; None: it is none, or it is well."""
    if health.get("status") != "unwell":
        return None
    wrong = [f"model {name}: {told['engine']}" for name, told in health["models"].items() if told["engine"] != "ok"]
    return "; ".join([*([] if health["store"] == "ok" else ["the store cannot be reached"]), *wrong])


def _segment(value: str) -> str:
    return quote(value, safe="")


def _run(row: Mapping[str, Any]) -> Run:
    """Read a run; fields that a newer proxy adds are left out."""
    return Run(**{name: value for name, value in row.items() if name in _RUN_FIELDS})
