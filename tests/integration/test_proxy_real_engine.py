"""The proxy in front of the real vLLM: the client gets the direct answer's bytes, and the record is exact.

Where `TRACEGRAD_ENGINE_URL` is set that engine is asked instead of the shared tiny one; it needs
`--enable-auto-tool-choice --tool-call-parser hermes`. Forced, strict calls are sampled under a grammar, so that a
tiny model makes them.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import httpx
import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from wire_bytes import merged

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import open_store

pytestmark = pytest.mark.engine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAID = [{"role": "user", "content": "max 3 5"}]
OK = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "pick", "parameters": OK, "strict": True}}
CALL = {"tools": [TOOL], "max_tokens": 400, "temperature": 1.0, "seed": 1}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": OK}}
ASKED: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "token ids": {"return_token_ids": True},
    "two choices": {"n": 2, "temperature": 0.9, "seed": 5},
    "top-k": {"top_k": 4, "temperature": 1.0, "seed": 5},
    "top-p": {"top_p": 0.9, "temperature": 1.0, "seed": 5},
    "a stop string": {"stop": ["1"]},
    "an error": {"tools": []},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "a required call": {**CALL, "tool_choice": "required", "parallel_tool_calls": False},
    "a named call": {**CALL, "tool_choice": {"type": "function", "function": {"name": "pick"}}},
    "a call and usage": {
        **CALL, "tool_choice": "required", "parallel_tool_calls": False, "stream_options": {"include_usage": True},
    },
    "tools, none": {"tools": [TOOL], "tool_choice": "none"},
    "tools, auto": {"tools": [TOOL], "temperature": 1.0, "seed": 3},
    "a schema": {"response_format": FORMAT, "max_tokens": 400},
    "a json object": {"response_format": {"type": "json_object"}, "temperature": 1.0, "seed": 1},
    "hidden reasoning": {"include_reasoning": False},
    "developer role": {"messages": [{"role": "developer", "content": "3 5"}]},
    "unknown fields": {"some_new_field": {"a": 1}, "user": "u", "service_tier": "auto"},
    "bytes that are no text": {"temperature": 1.0, "seed": 7, "allowed_token_ids": list(range(140, 200))},
}  # fmt: skip
COMPLETIONS_ASKED: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "logprobs": {"logprobs": 2},
    "two choices": {"n": 2, "temperature": 0.9, "seed": 5},
    "top-k": {"top_k": 4, "temperature": 1.0, "seed": 5},
    "token ids": {"prompt": [70, 71, 72], "return_token_ids": True},
    "several prompts": {"prompt": ["3 5", "7 2"]},
    "echo": {"echo": True},
    "echo and logprobs": {"echo": True, "logprobs": 1},
    "usage": {"stream_options": {"include_usage": True}},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "bytes that are no text": {"temperature": 1.0, "seed": 7, "allowed_token_ids": list(range(140, 200))},
}
FLAGS = {
    "a required call": ("constrained", "hidden_tool_calls"),
    "a named call": ("constrained",),
    "a schema": ("constrained",),
    "a json object": ("constrained",),
    "tools, auto": ("constrained",),
    "tools, none": (),
    "bytes that are no text": ("constrained",),
}
CALL_ID = re.compile(rb'"chatcmpl-tool-[0-9a-f]*"')


CALLER = {"x-request-id": "same", "x-tracegrad-run": "compared", "x-tracegrad-role": "solver"}
"""A stream of nobody names its call in its fingerprint, so that a LangSmith tree can be joined with it."""


def levelled(body: bytes) -> bytes:
    """Without what no two answers share: the time, and the ids of tool calls."""
    return CALL_ID.sub(b'"call"', re.sub(rb'"created":\d+', b'"created":0', body))


def compare(through: bytes, direct: bytes, *, stream: bool) -> None:
    """Byte for byte; a stream by what it says, since a busy engine cuts it differently each time.

    Byte for byte it is compared in the wire tier, where the engine is the fake one.
    """
    if not stream:
        assert levelled(through) == levelled(direct)
        return
    assert merged(levelled(through)) == merged(levelled(direct))


@pytest.fixture(scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The engine, a proxy in front of it, and its store."""
    with in_front(request, tmp_path_factory) as served:
        yield served


@pytest.fixture(scope="module")
def token_in(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    with in_front(request, tmp_path_factory, token_in=["*"]) as served:
        yield served


@contextmanager
def in_front(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, **settings: Any
) -> Iterator[SimpleNamespace]:
    url = os.environ.get("TRACEGRAD_ENGINE_URL") or request.getfixturevalue("engine").url
    folder: Path = tmp_path_factory.mktemp("proxy")
    name = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    config = parse_config(
        {
            "store": f"sqlite:///{folder / 'store.db'}",
            "models": {name: {"checkpoint": "none", "engine": {"url": url}}},
            "roles": {"*": name},
            "trainer": {"model": name},
            **settings,
        }
    )
    store = open_store(config.store)
    with (
        fake_vllm.ServerThread(ProxyApp(config, store)) as server,
        httpx.Client(base_url=server.url, timeout=120, verify=False) as proxy,
        httpx.Client(base_url=url, timeout=120, verify=False) as engine,
    ):
        yield SimpleNamespace(name=name, store=store, proxy=proxy, engine=engine)
    store.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ASKED)
def test_the_client_gets_the_bytes_of_the_direct_answer(both: SimpleNamespace, what: str, stream: bool) -> None:
    messages = [{"role": "user", "content": "max of 3 and 5"}]
    body = {"model": both.name, "messages": messages, "max_tokens": 8, "temperature": 0, "stream": stream}
    answers = [client.post(CHAT, json={**body, **ASKED[what]}, headers=CALLER) for client in (both.proxy, both.engine)]
    assert answers[0].status_code == answers[1].status_code
    if answers[1].status_code != 200:
        told, said = (answer.json()["error"] for answer in answers)
        assert (told["message"], told["param"]) == (said["message"], said["param"])
        return
    compare(*(answer.content for answer in answers), stream=stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", COMPLETIONS_ASKED)
def test_so_it_is_with_text_completions(both: SimpleNamespace, what: str, stream: bool) -> None:
    body = {"model": both.name, "prompt": "max of 3 and 5", "max_tokens": 8, "temperature": 0, "stream": stream}
    answers = [
        client.post(COMPLETIONS, json={**body, **COMPLETIONS_ASKED[what]}, headers={"x-request-id": "same"})
        for client in (both.proxy, both.engine)
    ]
    assert answers[0].status_code == answers[1].status_code
    if answers[1].status_code != 200:
        assert answers[0].json()["error"]["message"] == answers[1].json()["error"]["message"]
        return
    compare(*(answer.content for answer in answers), stream=stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", FLAGS)
def test_what_the_parsers_and_grammars_make_is_recorded_exactly(both: SimpleNamespace, what: str, stream: bool) -> None:
    body = {"model": both.name, "messages": [{"role": "user", "content": "3 5"}], "max_tokens": 8, "stream": stream}
    run_id = f"parsed-{what}-{stream}".replace(" ", "-").replace(",", "")
    answer = both.proxy.post(f"/run/{run_id}/role/a{CHAT}", json={**body, **ASKED[what]})
    assert answer.status_code == 200, answer.text
    (call,) = both.store.trace(run_id).calls
    assert (call.status, call.quarantine, call.error) == ("complete", None, None)
    (choice,) = call.choices
    assert choice.flags == FLAGS[what]
    asked = {**body, **ASKED[what], "stream": False, "return_token_ids": True, "logprobs": True}
    truth = both.engine.post(CHAT, json=asked).json()
    if "seed" in asked:
        (said,) = truth["choices"]
        assert list(choice.token_ids) == said["token_ids"]
        assert choice.finish_reason == said["finish_reason"]
        assert choice.logprobs == pytest.approx([t["logprob"] for t in said["logprobs"]["content"]], abs=1e-2)
        assert [c["function"] for c in choice.message.get("tool_calls", [])] == [
            {**c["function"], "arguments": c["function"]["arguments"]} for c in said["message"].get("tool_calls", [])
        ] or stream  # a plain answer writes the arguments anew, a stream has them as they were sampled
    if "call" in what:
        assert [c["function"]["name"] for c in choice.message["tool_calls"]] == ["pick"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_completion_is_recorded_exactly(both: SimpleNamespace, stream: bool) -> None:
    body = {"model": both.name, "prompt": "max of 7 and 2", "max_tokens": 12, "temperature": 1.0, "seed": 11, "n": 2}
    answer = both.proxy.post(f"/run/text-{stream}/role/a{COMPLETIONS}", json={**body, "stream": stream})
    assert answer.status_code == 200
    (call,) = both.store.trace(f"text-{stream}").calls
    assert (call.status, call.quarantine, call.endpoint) == ("complete", None, "completions")
    truth = both.engine.post(COMPLETIONS, json={**body, "return_token_ids": True, "logprobs": 0}).json()
    for choice, said in zip(call.choices, truth["choices"], strict=True):
        assert list(call.prompt_ids) == said["prompt_token_ids"]
        assert list(choice.token_ids) == said["token_ids"]
        assert choice.message == {"content": said["text"]}
        assert choice.logprobs == pytest.approx(said["logprobs"]["token_logprobs"], abs=1e-2)


def test_hidden_reasoning_is_quarantined(both: SimpleNamespace) -> None:
    """A tool parser is enough for vLLM to withhold the ids."""
    body = {"model": both.name, "messages": [{"role": "user", "content": "3 5"}], "max_tokens": 4}
    assert both.proxy.post(f"/run/hidden{CHAT}", json={**body, "include_reasoning": False}).status_code == 200
    assert [call.quarantine for call in both.store.trace("hidden").calls] == ["reasoning hidden"]


@pytest.mark.parametrize("prompt", ["x" * 600, "x" * 512])
def test_langchain_recognises_an_overflow(both: SimpleNamespace, prompt: str) -> None:
    url = f"{both.proxy.base_url}/v1"
    model = ChatOpenAI(base_url=url, api_key=SecretStr("none"), model=both.name, max_retries=0)
    with pytest.raises(ContextOverflowError):
        model.invoke(prompt)
    with pytest.raises(openai.BadRequestError) as caught:
        openai.OpenAI(base_url=url, api_key="none", max_retries=0).completions.create(
            model=both.name, prompt=[70] * len(prompt)
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


class Ok(BaseModel, extra="forbid"):
    """Whether it is."""

    ok: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_of_langchain(both: SimpleNamespace, method: Any, stream: bool) -> None:
    url = f"{both.proxy.base_url}/v1"
    model = ChatOpenAI(
        base_url=url, api_key=SecretStr("none"), model=both.name, max_retries=0, max_tokens=400, seed=1, temperature=1
    ).with_structured_output(Ok, method=method, strict=True)
    answer = list(model.stream("3 5"))[-1] if stream else model.invoke("3 5")
    assert isinstance(answer, Ok)


def test_structured_output_that_promises_json_only(both: SimpleNamespace) -> None:
    """`json_mode` holds the engine to JSON, not to a schema: which object it makes is the tiny model's affair."""
    url = f"{both.proxy.base_url}/run/json-mode/v1"
    model = ChatOpenAI(base_url=url, api_key=SecretStr("none"), model=both.name, max_tokens=400, seed=1, temperature=1)
    answer = model.with_structured_output(Ok, method="json_mode", include_raw=True).invoke("3 5")
    (call,) = both.store.trace("json-mode").calls
    assert call.request["response_format"] == {"type": "json_object"}
    assert (call.quarantine, call.choices[0].flags) == (None, ("constrained",))
    assert call.choices[0].message["content"] == answer["raw"].content
    if call.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer["raw"].content), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_the_record_is_what_the_engine_says_it_sampled(both: SimpleNamespace, stream: bool) -> None:
    """Seeded, so that asking the engine again for ids and logprobs gives the sample that the proxy recorded."""
    body = {
        "model": both.name,
        "messages": [{"role": "user", "content": "max of 7 and 2"}],
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 11,
        "n": 2,
    }
    answer = both.proxy.post(f"/run/exact-{stream}/role/a/v1/chat/completions", json={**body, "stream": stream})
    assert answer.status_code == 200
    (call,) = both.store.trace(f"exact-{stream}").calls
    assert (call.status, call.quarantine) == ("complete", None)
    truth = both.engine.post("/v1/chat/completions", json={**body, "return_token_ids": True, "logprobs": True}).json()
    assert list(call.prompt_ids) == truth["prompt_token_ids"]
    for choice, said in zip(call.choices, truth["choices"], strict=True):
        assert list(choice.token_ids) == said["token_ids"]
        assert choice.message["content"] == said["message"]["content"]
        assert choice.logprobs == pytest.approx([t["logprob"] for t in said["logprobs"]["content"]], abs=1e-2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "cut"),
    [
        *((CHAT, cut) for cut in ({"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_p": 0.8, "top_k": 4})),
        *((COMPLETIONS, cut) for cut in ({"top_k": 4}, {"min_p": 0.1})),
    ],
)
def test_what_was_left_when_a_tail_was_cut_off_is_recorded(
    both: SimpleNamespace, path: str, cut: dict[str, Any], stream: bool
) -> None:
    """What is left is what has a logprob at all, and it sums to one. The tiny model answers a digit and an end."""
    prompt: dict[str, Any] = {"prompt": "3 5"} if path == COMPLETIONS else {"messages": SAID}
    body = {"model": both.name, **prompt, "max_tokens": 8, "temperature": 1.0, "seed": 3, **cut}
    run_id = f"cut-{stream}-{path[4:]}-{'-'.join(cut)}".replace("/", "-")
    answer = both.proxy.post(f"/run/{run_id}/role/a{path}", json={**body, "stream": stream})
    assert answer.status_code == 200 and "token_id:" not in answer.text
    (call,) = both.store.trace(run_id).calls
    (choice,) = call.choices
    assert (call.quarantine, choice.flags) == (None, ())
    assert choice.kept_ids is not None and len(choice.kept_ids) == len(choice.token_ids)
    sizes = [len(kept) for kept in choice.kept_ids]
    assert 1 < max(sizes) <= cut.get("top_k", 20)
    raw = {"logprobs": 20} if path == COMPLETIONS else {"logprobs": True, "top_logprobs": 20}
    asked = {**body, **raw, "return_token_ids": True, "return_tokens_as_token_ids": True}
    (said,) = both.engine.post(path, json=asked).json()["choices"]
    assert list(choice.token_ids) == said["token_ids"]
    tops = [
        {one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in said["logprobs"].get("content", ())
    ] or said["logprobs"]["top_logprobs"]
    assert [{f"token_id:{i}" for i in kept} for kept in choice.kept_ids] == [
        {name for name, value in top.items() if value > -9999.0} for top in tops
    ]
    assert [sum(math.exp(value) for value in top.values()) for top in tops] == pytest.approx(
        [1.0] * len(tops), abs=1e-5
    )


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_that_the_engine_refuses_for_our_sake_is_asked_again(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    path: str,
) -> None:
    """More than twenty are left: the proxy asks for more and is refused inside of a 200; the client sees nothing."""
    prompt: dict[str, Any] = {"prompt": "3 5"} if path == COMPLETIONS else {"messages": SAID}
    with in_front(request, tmp_path_factory) as both:
        body = {"model": both.name, **prompt, "max_tokens": 4, "temperature": 2.0, "ignore_eos": True, "stream": True}
        for number in range(3):
            answer = both.proxy.post(f"/run/{number}/role/a{path}", json={**body, "min_p": 1e-6})
            assert answer.status_code == 200 and "error" not in answer.text
            (call,) = both.store.trace(str(number)).calls
            assert (call.status, call.quarantine) == ("complete", None)
            assert call.choices[0].flags == ("truncated_sampling",)
    assert "refuses 80 top logprobs" in caplog.text


def test_a_prompt_goes_on_from_what_was_sampled(token_in: SimpleNamespace) -> None:
    """Bytes that are no text come back as other bytes; the engine is given the ones it sampled, and parses as ever."""
    name, no_text = token_in.name, {"allowed_token_ids": list(range(140, 200)), "temperature": 1.0, "seed": 7}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "3 5"}]

    def ask(**extra: Any) -> dict[str, Any]:
        body = {"model": name, "messages": messages, "tools": [TOOL], "max_tokens": 6, **extra}
        answer = token_in.proxy.post(CHAT, json=body, headers={"x-tracegrad-run": "r", "x-tracegrad-role": "a"})
        assert answer.status_code == 200, answer.text
        message: dict[str, Any] = answer.json()["choices"][0]["message"]
        return message

    messages.append({"role": "assistant", "content": ask(**no_text)["content"]})
    messages.append({"role": "user", "content": "7 1"})
    called = ask(**CALL, tool_choice="required", parallel_tool_calls=False)
    assert called["tool_calls"][0]["function"]["name"] == "pick"
    *_, first, second = token_in.store.trace("r").calls
    rendered = token_in.engine.post(f"{CHAT}/render", json={"model": name, "messages": messages}).json()["token_ids"]
    sampled = [*first.prompt_ids, *first.choices[0].token_ids]
    assert list(second.prompt_ids)[: len(sampled)] == sampled
    assert rendered[: len(sampled)] != sampled
    assert (second.continues.call_id, second.continues.token_in) == (first.call_id, True)
    assert (second.continues.drift, second.quarantine) == ("template", None)
    tail = [258, *rendered[len(rendered) - rendered[::-1].index(257, rendered[::-1].index(257) + 1) - 1 :]]
    assert list(second.prompt_ids)[len(sampled) :] == tail, "the turn is ended, the rest is as rendered"
