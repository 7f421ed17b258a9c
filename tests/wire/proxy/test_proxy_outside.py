"""Roles served by an outside API: recorded as text, never trained, and nothing of ours or the client's leaks to it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from versions import add_version

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.records import Call, Run
from tracegrad.tracestore.store import Store

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def api(fake: ModuleType, stack: ExitStack) -> Any:
    """Somebody else's API, which knows its model as big-1."""
    return stack.enter_context(fake.ServerThread(fake.FakeEngine("big-1")))


@pytest.fixture
def proxy(
    start_proxy: Callable[..., SimpleNamespace], api: Any, engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    monkeypatch.setenv("BIG_KEY", "sk-ours")
    outside = {"url": f"{api.url}/v1", "key_env": "BIG_KEY", "model": "big-1"}
    yield start_proxy(
        models={
            "main": {"checkpoint": "none", "engine": {"url": engine_url}},
            "big": {"api": outside, "trained": False},
        },
        roles={"judge": "big", "*": "main"},
        proxy={"sampling": {"*": {"temperature": 0.9, "top_k": 5}}},
    )


def ask(proxy: SimpleNamespace, role: str = "judge", **extra: Any) -> httpx.Response:
    headers = {"authorization": "Bearer sk-the-clients", "cookie": "a=b", "openai-organization": "theirs"}
    answer: httpx.Response = proxy.client.post(
        f"/run/r/role/{role}/v1/chat/completions",
        json={"model": "gpt-4o", "messages": MESSAGES, **extra},
        headers=headers,
    )
    return answer


def only_call(store: Store) -> Call:
    (call,) = store.trace("r").calls
    return call


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_asked_under_its_own_name_with_our_key_and_nothing_added(
    proxy: SimpleNamespace, api: Any, engine_app: Any, stream: bool
) -> None:
    answer = ask(proxy, stream=stream, temperature=0.2)
    assert answer.status_code == 200
    assert '"model":"gpt-4o"' in answer.text and "big-1" not in answer.text
    (sent,) = api.app.requests
    assert sent == {"model": "big-1", "messages": MESSAGES, "stream": stream, "temperature": 0.2}
    (headers,) = api.app.headers
    assert headers["authorization"] == "Bearer sk-ours"
    assert set(headers) <= {"host", "authorization", "user-agent", "content-type", "accept", "content-length"}
    assert engine_app.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_recorded_as_text(proxy: SimpleNamespace, store: Store, stream: bool) -> None:
    """Even where its answer has tokens, because the client asked for them."""
    answer = ask(proxy, stream=stream, logprobs=True, return_token_ids=True)
    assert '"logprob"' in answer.text, "what the client asked for, it gets"
    call = only_call(store)
    assert (call.status, call.quarantine, call.model, call.requested_model) == ("complete", None, "big", "gpt-4o")
    assert (call.version_dispatched, call.version_completed, call.prompt_ids) == (None, None, None)
    (choice,) = call.choices
    assert (choice.token_ids, choice.logprobs, choice.flags) == ((), None, ("external",))
    assert (choice.message["content"], choice.finish_reason) == ("0: hello", "stop")


def test_the_sampling_override_is_not_for_it(proxy: SimpleNamespace, store: Store, api: Any, engine_app: Any) -> None:
    store.open_run(Run(run_id="r", purpose="train"))
    ask(proxy, "judge", temperature=0)
    ask(proxy, "writer", temperature=0)
    assert (api.app.requests[0]["temperature"], "top_k" in api.app.requests[0]) == (0, False)
    assert (engine_app.requests[0]["temperature"], engine_app.requests[0]["top_k"]) == (0.9, 5)


def test_publishing_does_not_hold_it(proxy: SimpleNamespace, store: Store) -> None:
    for model in ("main", "big"):
        version = add_version(store, "/c", model=model)
        store.advance_publish(store.request_publish(version.version_id).publish_id, "draining")
    assert ask(proxy).status_code == 200


def test_its_errors_pass_and_are_recorded(proxy: SimpleNamespace, store: Store, api: Any) -> None:
    api.app.fault = "overloaded"
    assert ask(proxy).status_code == 503
    assert (only_call(store).status, only_call(store).quarantine) == ("failed", None)
    assert proxy.client.get("/health").json()["models"]["big"]["engine"] == "ok", "it is not watched"


def test_when_it_cannot_be_reached_the_client_hears_at_once(
    start_proxy: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIG_KEY", "sk-ours")
    outside = {"url": "http://127.0.0.1:9/v1", "key_env": "BIG_KEY", "model": "big-1"}
    proxy = start_proxy(models={"big": {"api": outside, "trained": False}}, roles={"*": "big"})
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError, match="cannot be reached") as caught:
        client.chat.completions.create(model="x", messages=MESSAGES)  # type: ignore[arg-type]
    assert caught.value.response.headers["retry-after"] == "1"


def test_the_list_of_models_has_it(proxy: SimpleNamespace, api: Any) -> None:
    cards = proxy.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["main", "big"]
    assert api.app.headers == []


def test_a_key_that_is_not_set_is_an_error_at_the_start(store: Store) -> None:
    raw = {"url": "https://api.example.com/v1", "key_env": "SURELY_NOT_SET", "model": "big-1"}
    config = parse_config({"models": {"big": {"api": raw, "trained": False}}, "roles": {"*": "big"}})
    with pytest.raises(ConfigError, match="environment variable SURELY_NOT_SET, which is not set"):
        ProxyApp(config, store, environ={})
