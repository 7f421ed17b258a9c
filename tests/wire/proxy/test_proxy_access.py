"""API keys at the door: what each scope opens, what a key decides, and that a key goes nowhere else."""

import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from away_store import AwayStore

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import ProxyRefused
from tracegrad.adapters.proxy import access
from tracegrad.adapters.proxy.access import is_loopback, keys_wanted, scope_for
from tracegrad.tracestore.config import ProxyConfig, parse_config
from tracegrad.tracestore.keys import hash_key
from tracegrad.tracestore.records import KEY_SCOPES, KeyScope, Run, Task
from tracegrad.tracestore.store import Store

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hello"}]}
TASK = {"tasks": [{"task_id": "t", "input": {}}]}
REWARD = {"rewards": [{"run_id": "r", "name": "x", "value": 1}]}


@pytest.fixture
def guarded(start_proxy: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return start_proxy(proxy={"access": {"keys": "on"}})


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def key_for(store: Store, *scopes: KeyScope, **bound: Any) -> dict[str, str]:
    return bearer(store.create_key(scopes=scopes, **bound)[0])


def test_where_keys_are_wanted() -> None:
    def wanted(host: str, **keys: Any) -> bool:
        return keys_wanted(parse_config({"proxy": {"host": host, **({"access": keys} if keys else {})}}).proxy)

    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.3", "example.org", "localhost.evil")] == [False] * 5
    assert not wanted("127.0.0.1") and wanted("0.0.0.0") and wanted("example.org")
    assert wanted("127.0.0.1", keys="on") and not wanted("0.0.0.0", keys="off")
    assert wanted("127.0.0.1", keys=True) and not wanted("0.0.0.0", keys=False)  # a bare `on` in YAML is True
    assert not keys_wanted(ProxyConfig())


SAMPLES: list[tuple[str, str, KeyScope | None, Any]] = [
    ("GET", "/health", None, None),
    ("POST", CHAT, "call", ASK),
    ("GET", "/v1/models", "call", None),
    ("POST", "/run/r/role/a/v1/chat/completions", "call", ASK),
    ("POST", "/tracegrad/v1/runs", "call", {"run_id": "new"}),
    ("POST", "/tracegrad/v1/runs/r/end", "call", {}),
    ("POST", "/tracegrad/v1/rewards", "reward", REWARD),
    ("GET", "/tracegrad/v1/runs/r", "read", None),
    ("GET", "/tracegrad/v1/backlog", "read", None),
    ("POST", "/tracegrad/v1/tasks", "train", TASK),
    ("POST", "/tracegrad/v1/groups", "train", {"groups": []}),
]


@pytest.mark.parametrize(("method", "path", "scope", "body"), SAMPLES)
def test_each_path_opens_to_its_scope_and_to_no_other(  # noqa: PLR0917 - pytest passes them by name
    guarded: SimpleNamespace, store: Store, engine_app: Any, method: str, path: str, scope: KeyScope | None, body: Any
) -> None:
    store.open_run(Run(run_id="r"))
    ask = {"method": method, "url": path, **({"json": body} if body is not None else {})}
    for held in KEY_SCOPES:
        engine_app.requests.clear()
        answer = guarded.client.request(**ask, headers=key_for(store, held))
        if scope is None or held in (scope, "admin"):
            assert answer.status_code == 200, answer.text
            continue
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (403, "missing_scope", "permission_error")
        assert f"tracegrad keys create --scope {scope}" in error["message"]
        assert engine_app.requests == []
    without = guarded.client.request(**ask)
    assert without.status_code == (200 if scope is None else 401)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/nothing"), ("GET", "/"), ("POST", "/tracegrad/v1/newer"), ("DELETE", "/v1x/models")]
)
def test_a_path_that_nobody_listed_is_closed(method: str, path: str) -> None:
    assert scope_for(method, path) == "admin"


def test_the_sdk_sees_its_own_errors(guarded: SimpleNamespace, store: Store) -> None:
    def ask(text: str) -> Any:
        sdk = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=text, max_retries=0, timeout=20)
        return sdk.chat.completions.create(model="main", messages=[{"role": "user", "content": "hello"}])

    with pytest.raises(openai.AuthenticationError) as unknown:
        ask("tg-" + "x" * 43)
    assert unknown.value.code == "invalid_api_key" and "unknown or revoked" in str(unknown.value)
    with pytest.raises(openai.AuthenticationError, match="they begin with tg-"):
        ask("sk-somebody-elses")
    with pytest.raises(openai.PermissionDeniedError) as wrong:
        ask(store.create_key(scopes=("read",))[0])
    assert wrong.value.code == "missing_scope"
    assert ask(store.create_key(scopes=("call",))[0]).choices[0].message.content == "0: hello"


def test_a_key_is_refused_before_the_body_is_read(guarded: SimpleNamespace) -> None:
    host, port = urlsplit(guarded.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_key_goes_to_no_engine_no_store_and_no_log(  # noqa: PLR0917 - pytest passes them by name
    guarded: SimpleNamespace,
    store: Store,
    engine_app: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    header: str,
) -> None:
    text, key = store.create_key(scopes=("call",), name="n")
    value = f"Bearer {text}" if header == "authorization" else text
    with caplog.at_level(logging.DEBUG):
        answer = guarded.client.post("/run/r" + CHAT, json=ASK, headers={header: value, "x-other": "kept"})
        guarded.client.post("/tracegrad/v1/tasks", json=TASK, headers={header: value})
    assert answer.status_code == 200 and text not in answer.text
    assert "x-other" in engine_app.headers[0]
    assert text not in str(engine_app.headers) and text not in caplog.text
    on_disk = b"".join(path.read_bytes() for path in tmp_path.glob("store.db*"))
    assert key.key_id.encode() in on_disk and hash_key(text).encode() in on_disk
    assert text.removeprefix("tg-").encode() not in on_disk


def test_another_services_credential_still_goes_to_the_engine(proxy: SimpleNamespace, engine_app: Any) -> None:
    """An engine of the user's own may want one; only keys of ours are kept back, also where none is needed."""
    proxy.client.post(CHAT, json=ASK, headers=bearer("sk-engine"))
    proxy.client.post(CHAT, json=ASK, headers=bearer("tg-anything"))
    assert engine_app.headers[0]["authorization"] == "Bearer sk-engine"
    assert "authorization" not in engine_app.headers[1]


def test_a_revoked_key_works_no_longer_than_the_cache_lives(
    guarded: SimpleNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, key = store.create_key(scopes=("call",))
    assert guarded.client.get("/v1/models", headers=bearer(text)).status_code == 200
    store.revoke_key(key.key_id)
    monkeypatch.setattr(access, "KEY_CACHE_S", 0.0)
    answer = guarded.client.get("/v1/models", headers=bearer(text))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    monkeypatch.undo()
    assert guarded.client.get("/v1/models", headers=bearer(text)).status_code == 401  # and is not remembered as valid


def test_many_requests_with_one_key_ask_the_store_once(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    asked: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def find_key(self, key_hash: str) -> Any:
            asked.append(key_hash)
            return store.find_key(key_hash)

    guarded = start_proxy(proxy={"access": {"keys": "on"}}, store_object=Counting())
    headers = key_for(store, "call")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: guarded.client.get("/v1/models", headers=headers), range(24)))
    assert [answer.status_code for answer in answers] == [200] * 24
    assert len(asked) == 1
    guarded.client.get("/v1/models", headers=bearer("tg-" + "x" * 1000))  # too long to be one: the store is not asked
    assert len(asked) == 1


def test_while_keys_cannot_be_looked_up_nobody_gets_in(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    guarded = start_proxy(proxy={"access": {"keys": "on"}}, store_object=AwayStore(store, "find_key"))
    answer = guarded.client.post(CHAT, json=ASK, headers=key_for(store, "call"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert engine_app.requests == []


def test_a_key_says_which_run_and_role_where_the_request_does_not(guarded: SimpleNamespace, store: Store) -> None:
    headers = key_for(store, "call", project="shop", run_id="bound", role="planner")
    guarded.client.post(CHAT, json=ASK, headers=headers)
    guarded.client.post("/role/writer" + CHAT, json=ASK, headers=headers)
    hook = {"x-tracegrad-role": "node", "x-tracegrad-source": "hook"}
    guarded.client.post(CHAT, json=ASK, headers={**headers, **hook})
    who = [call.attribution for call in store.trace("bound").calls]
    assert [(a.run_source, a.role, a.role_source) for a in who] == [
        ("key", "planner", "key"),
        ("key", "writer", "path"),
        ("key", "planner", "key"),
    ]
    assert store.get_run("bound").project == "shop"
    assert {call.project for call in store.trace("bound").calls} == {"shop"}


def test_a_key_sees_its_own_project_only(guarded: SimpleNamespace, store: Store, engine_app: Any) -> None:
    store.put_tasks([Task(task_id="theirs", input={}, project="theirs")])
    theirs = key_for(store, "admin", project="theirs")
    ours = key_for(store, "admin", project="ours")
    control = "/tracegrad/v1"

    def post(path: str, body: Any, headers: dict[str, str] = ours) -> httpx.Response:
        answer: httpx.Response = guarded.client.post(path, json=body, headers=headers)
        return answer

    group = {"groups": [{"group_id": "g", "task_id": "theirs", "planned_size": 2, "purpose": "train"}]}
    member = {"run_id": "r", "purpose": "train", "group_id": "g", "member": 0}
    assert post(f"{control}/groups", group).status_code == 404
    assert post(f"{control}/groups", group, theirs).status_code == 200
    assert post(f"{control}/runs", member).status_code == 404
    assert post(f"{control}/runs", {"run_id": "x", "task_id": "theirs"}).status_code == 404
    assert post(f"{control}/runs", member, theirs).status_code == 200
    assert store.get_run("r").project == "theirs"
    call = post("/run/r" + CHAT, ASK, theirs).headers["x-tracegrad-call"]
    assert [
        guarded.client.get(f"{control}/{path}", headers=ours).status_code for path in ("runs/r", "groups/g/runs")
    ] == [
        404,
        404,
    ]
    assert post(f"{control}/rewards", REWARD).status_code == 404
    by_call = {"rewards": [{"call_id": call, "name": "x", "value": 1}]}
    assert post(f"{control}/rewards", by_call).status_code == 404
    assert post(f"{control}/runs/r/end", {}).status_code == 404
    engine_app.requests.clear()
    answer = post("/run/r" + CHAT, ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_project")
    assert engine_app.requests == [] and len(store.trace("r").calls) == 1
    assert post(f"{control}/rewards", by_call, theirs).status_code == 200
    assert post(f"{control}/runs/r/end", {}, theirs).status_code == 200
    tasks = {"tasks": [{"task_id": "ours", "input": {}}]}
    assert post(f"{control}/tasks", tasks).status_code == 200
    assert store.get_task("ours").project == "ours"


def test_idle_runs_end_in_every_project(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    guarded = start_proxy(proxy={"access": {"keys": "on"}})
    guarded.client.post("/run/quiet" + CHAT, json=ASK, headers=key_for(store, "call", project="elsewhere"))
    guarded.app._close_idle_once(-1.0)
    assert (store.get_run("quiet").status, store.get_run("quiet").ended_by) == ("closed", "idle")


def test_the_client_sends_the_key_of_the_environment(
    guarded: SimpleNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = store.create_key(scopes=("call", "reward", "read"))
    for name in ("TRACEGRAD_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ProxyRefused, match="needs an API key"):
        ProxyClient(guarded.url).open_run()
    run = ProxyClient(guarded.url, api_key=text).open_run()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    with pytest.raises(ProxyRefused, match="needs an API key"):  # their key is not ours to send around
        ProxyClient(guarded.url).get_run(run.run_id)
    monkeypatch.setenv("OPENAI_API_KEY", text)
    assert ProxyClient(guarded.url).reward(1.0, run_id=run.run_id)["run_id"] == run.run_id
    monkeypatch.setenv("TRACEGRAD_API_KEY", "tg-wrong")
    with pytest.raises(ProxyRefused, match="unknown or revoked"):
        ProxyClient(guarded.url).get_run(run.run_id)


def test_a_retry_is_answered_from_nobody_elses_attempt(guarded: SimpleNamespace, store: Store, engine_app: Any) -> None:
    """Equal bodies, and no Authorization to tell them apart: the key itself does."""
    keys = [store.create_key(scopes=("call",), project=project)[0] for project in ("ours", "ours", "theirs")]
    for path in (CHAT, "/run/same" + CHAT):
        first = guarded.client.post(path, json=ASK, headers={"x-api-key": keys[0], "x-stainless-retry-count": "0"})
        retries = [
            guarded.client.post(path, json=ASK, headers={"x-api-key": key, "x-stainless-retry-count": "1"})
            for key in keys
        ]
        call_ids = [answer.headers.get("x-tracegrad-call") for answer in retries]
        assert call_ids[0] == first.headers["x-tracegrad-call"]  # a retry it is
        if path == CHAT:
            assert len(set(call_ids)) == 3
        else:
            assert retries[2].status_code == 403 and call_ids[2] is None
