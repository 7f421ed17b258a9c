"""Holds, retries and disconnects against the real vLLM, and a real one in the place of an outside API."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store, open_store

pytestmark = pytest.mark.engine

MESSAGES: list[Any] = [{"role": "user", "content": "max of 3 and 5"}]
DIGITS = list(range(15, 25))
LONG: dict[str, Any] = {"n": 16, "max_tokens": 400, "extra_body": {"ignore_eos": True, "allowed_token_ids": DIGITS}}
"""A second of the tiny model, or four with 64 choices, in text that a client can see grow. A test that looks at what
goes on meanwhile has missed all of a second once, on a busy machine."""


@pytest.fixture(scope="module")
def served(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A proxy in front of the shared engine, which serves its model and stands for an outside API as well."""
    folder: Path = tmp_path_factory.mktemp("waits")
    api = {"url": f"{engine.url}/v1", "key_env": "JUDGE_KEY", "model": engine.name}
    config = parse_config(
        {
            "store": f"sqlite:///{folder / 'store.db'}",
            "models": {
                engine.name: {"checkpoint": "none", "engine": {"url": engine.url}},
                "judge": {"api": api, "trained": False},
            },
            "roles": {"judge": "judge", "*": engine.name},
            "trainer": {"model": engine.name},
            "proxy": {"poll_s": 0.02},
        }
    )
    store = open_store(config.store)
    app = ProxyApp(config, store, environ={"JUDGE_KEY": "sk-x"})
    with fake_vllm.ServerThread(app) as server:
        yield SimpleNamespace(url=server.url, app=app, store=store, name=engine.name, engine=engine)
    store.close()


def sdk(served: SimpleNamespace, run: str, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/run/{run}/v1", api_key="none", **{"timeout": 60, **settings})


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def running(served: SimpleNamespace) -> float:
    """How many requests the engine works on."""
    page = httpx.get(f"{served.engine.url}/metrics", timeout=20).text
    (found,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", page, re.MULTILINE)
    return float(found)


def stored(served: SimpleNamespace, run: str) -> Sequence[Call]:
    """The calls of the run so far; the run itself comes with its first call."""
    try:
        return served.store.trace(run).calls
    except NotFound:
        return ()


def new_publish(store: Store, model: str) -> int:
    version = store.add_version(
        model=model,
        kind="initial",
        parent_id=None,
        checkpoint_path="/none",
        checkpoint_hash="none",
        step=0,
        job_id=None,
    )
    return store.request_publish(version.version_id).publish_id


@pytest.mark.parametrize("stream", [False, True])
def test_a_publish_holds_calls_and_lets_them_through(served: SimpleNamespace, stream: bool) -> None:
    """What is with the engine ends first; what came after waits, and is answered as if nothing had been."""
    store, run = served.store, f"held-{stream}"
    model = ChatOpenAI(
        model=served.name, base_url=f"{served.url}/run/{run}/v1", api_key=SecretStr("none"), max_tokens=4
    )
    with ThreadPoolExecutor(4) as pool:
        ask = sdk(served, f"{run}-before").chat.completions.create
        before = pool.submit(ask, model=served.name, messages=MESSAGES, **{**LONG, "n": 64})
        wait_for(lambda: served.app.hold.gates[served.name].in_flight, "the engine works")
        publish_id = new_publish(store, served.name)
        store.advance_publish(publish_id, "draining")
        wait_for(lambda: served.app.hold.gates[served.name].holding, "the proxy holds")
        held = [
            pool.submit(
                lambda: "".join(str(part.content) for part in model.stream("3 5")) if stream else model.invoke("3 5")
            )
            for _ in range(3)
        ]
        wait_for(lambda: len(served.app.hold.gates[served.name].line) == 3, "they wait in line")
        assert before.result(60).choices[0].finish_reason == "length"
        assert store.list_runs(limit=50) and not any(one.run.run_id == run for one in store.list_runs(limit=50))
        store.advance_publish(publish_id, "failed")
        assert all(future.result(60) is not None for future in held)
    calls = store.trace(run).calls
    assert [(call.status, call.quarantine) for call in calls] == [("complete", None)] * 3


def test_a_client_that_loses_patience_is_told_apart_from_others(served: SimpleNamespace) -> None:
    """The SDK's own time-out and retries: each attempt stops the engine, and names the one that it repeats.

    The engine is frozen while it works, so that no machine is fast enough to answer in time.
    """
    client = sdk(served, "impatient", timeout=1, max_retries=2)
    processes = os.getpgid(served.engine.process.pid)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.chat.completions.create, model=served.name, messages=MESSAGES, **{**LONG, "n": 64})
        wait_for(lambda: running(served), "the engine works")
        os.killpg(processes, signal.SIGSTOP)
        try:
            with pytest.raises(openai.APITimeoutError):
                asked.result(60)
        finally:
            os.killpg(processes, signal.SIGCONT)
    wait_for(lambda: not running(served), "the engine has stopped", limit_s=5)
    wait_for(lambda: len(stored(served, "impatient")) == 3, "each attempt is stored")
    first, second, third = served.store.trace("impatient").calls
    assert {call.status for call in (first, second, third)} == {"aborted"}
    assert (first.retry_of, second.retry_of, third.retry_of) == (None, first.call_id, second.call_id)


@pytest.mark.parametrize("when", ["before the headers", "in mid-stream"])
def test_the_engine_stops_when_the_client_leaves(served: SimpleNamespace, when: str) -> None:
    run = when.replace(" ", "-")
    body = {
        "model": served.name,
        "messages": MESSAGES,
        "max_tokens": 440,
        "n": 16,
        "ignore_eos": True,
        "allowed_token_ids": DIGITS,
    }
    url = f"{served.url}/run/{run}/v1/chat/completions"
    if when == "in mid-stream":
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as answer:
            seen = next(chunk for chunk in answer.iter_text() if '"content":"' in chunk)
            assert seen
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.8)
    wait_for(lambda: not running(served), "the engine has stopped", limit_s=5)
    wait_for(lambda: stored(served, run), "the call is stored")
    (call,) = served.store.trace(run).calls
    assert (call.status, call.error) == ("aborted", "the client closed the connection")
    assert sum(len(choice.token_ids) for choice in call.choices) < 16 * 440


@pytest.mark.parametrize("stream", [False, True])
def test_an_outside_api_is_recorded_as_text(served: SimpleNamespace, stream: bool) -> None:
    """The same engine, as somebody else's: no ids are asked for, and none are kept."""
    client = sdk(served, f"outside-{stream}", default_headers={"x-tracegrad-role": "judge"})
    if stream:
        chunks = list(client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=5, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert {chunk.model for chunk in chunks} == {"gpt-4o"}
    else:
        answer = client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=5)
        text = answer.choices[0].message.content or ""
        assert answer.model == "gpt-4o"
    (call,) = served.store.trace(f"outside-{stream}").calls
    assert (call.status, call.quarantine, call.model, call.prompt_ids) == ("complete", None, "judge", None)
    (choice,) = call.choices
    assert (choice.token_ids, choice.logprobs, choice.flags[-1]) == ((), None, "external")
    assert (choice.message.get("content") or "") == text


def test_many_at_once_are_each_answered_and_each_stored(served: SimpleNamespace) -> None:
    """More than the engine takes at a time, from threads with one client: nothing is lost, doubled or mixed up."""
    client = sdk(served, "many")

    def ask(number: int) -> tuple[int, str]:
        answer = client.chat.completions.create(
            model=served.name, messages=[{"role": "user", "content": str(number)}], max_tokens=3, seed=number
        )
        return number, answer.id

    with ThreadPoolExecutor(48) as pool:
        answered = dict(pool.map(ask, range(96)))
    calls = served.store.trace("many").calls
    asked = {int(call.request["messages"][0]["content"]): call.completion_id for call in calls}
    assert len(calls) == 96 and asked == answered
    assert {call.quarantine for call in calls} == {None}
