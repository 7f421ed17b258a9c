"""Every call shape of chat, streaming and not: what the client gets, what is stored, what is flagged.

Each feature is asked three times with one completion id: of the engine directly, through the proxy, and of the engine
again with ids and logprobs, which is the truth that the record must equal.
"""

import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from wire_bytes import SAME_ID, timeless, without_fingerprints, without_silent_chunks

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import open_store

CHAT = "/v1/chat/completions"


def say(text: str, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text}]}


def function(name: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


WEATHER, NEWS, STRICT = function("weather"), function("news"), function("weather", strict=True)
NAMED = {"type": "function", "function": {"name": "news"}}
SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
HISTORY = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]  # fmt: skip
NOT_OURS = {"some_new_field": {"a": [1, 2.50]}, "metadata": {"k": "v"}, "user": "u", "service_tier": "auto"}

CONSTRAINED = ("constrained",)
FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "text": (say("hello"), ()),
    "developer role": (say("hello", "developer"), ()),
    "content parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, ()),
    "a history with tool results": ({"messages": HISTORY, "tools": [WEATHER]}, ()),
    "unknown fields": ({**say("hello"), **NOT_OURS}, ()),
    "tools unused": ({**say("hello"), "tools": [WEATHER]}, ()),
    "a tool called": ({**say("call"), "tools": [WEATHER]}, ()),
    "tools auto": ({**say("call"), "tools": [WEATHER, NEWS], "tool_choice": "auto"}, ()),
    "parallel calls": ({**say("call all"), "tools": [WEATHER, NEWS], "parallel_tool_calls": True}, ()),
    "one call at most": (
        {**say("call all"), "tools": [WEATHER, NEWS], "parallel_tool_calls": False},
        ("constrained", "hidden_tool_calls"),
    ),
    "one call at most, none made": (
        {**say("hello"), "tools": [WEATHER], "parallel_tool_calls": False},
        CONSTRAINED,
    ),
    "tools none": ({**say("call"), "tools": [STRICT], "tool_choice": "none"}, ()),
    "tools required": ({**say("hello"), "tools": [WEATHER, NEWS], "tool_choice": "required"}, CONSTRAINED),
    "tools named": ({**say("hello"), "tools": [WEATHER, NEWS], "tool_choice": NAMED}, CONSTRAINED),
    "strict tools": ({**say("call"), "tools": [STRICT]}, CONSTRAINED),
    "calls of several choices": ({**say("call all"), "tools": [WEATHER, NEWS], "n": 2}, ()),
    "a call cut short": ({**say("call"), "tools": [WEATHER], "max_tokens": 40}, ()),
    "json schema": (
        {**say("hi"), "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        CONSTRAINED,
    ),
    "json object": ({**say("hi"), "response_format": {"type": "json_object"}}, CONSTRAINED),
    "format text": ({**say("hi"), "response_format": {"type": "text"}}, ()),
    "several choices": ({**say("hello"), "n": 3, "temperature": 0.7}, ()),
    "a stop string": ({**say("hello world"), "stop": ["lo w", "zzz"]}, ("stop_string",)),
    "a stop string that does not come": ({**say("hello"), "stop": "zzz"}, ()),
    "a seed": ({**say("hello"), "seed": 7, "temperature": 1.0}, ()),
    "a limit": ({**say("hello"), "max_completion_tokens": 4}, ()),
    "logprobs": ({**say("hello"), "logprobs": True}, ()),
    "top logprobs": ({**say("hello"), "logprobs": True, "top_logprobs": 2}, ()),
    "logprobs beside a call": ({**say("call"), "tools": [WEATHER], "logprobs": True, "top_logprobs": 1}, ()),
    "token ids": ({**say("hello"), "return_token_ids": True}, ()),
    "reasoning": (say("think"), ("reasoning",)),
    "reasoning before a call": ({**say("think and call"), "tools": [WEATHER]}, ("reasoning",)),
    "penalties": ({**say("hello"), "frequency_penalty": 0.5, "logit_bias": {"5": 1}}, ("penalised",)),
    "truncation": ({**say("hello"), "top_p": 0.9}, ()),
    "truncation and logprobs": ({**say("hello"), "top_p": 0.9, "logprobs": True}, ("truncated_sampling",)),
    "greedy": ({**say("hello"), "temperature": 0}, ("greedy",)),
    "everything at once": (
        {**say("call all"), "tools": [WEATHER, STRICT], "n": 2, "temperature": 0.5, "top_p": 0.5, "seed": 1,
         "logprobs": True, "presence_penalty": 0.1, "user": "u"},
        ("constrained", "penalised", "truncated_sampling"),
    ),
}  # fmt: skip
REASONING = ("reasoning", "reasoning before a call")


@pytest.fixture(scope="module")
def served(
    fake: Any, served_engine: Any, empty_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """One proxy for the whole matrix: each test has a run of its own."""
    file = shutil.copy(empty_file, tmp_path_factory.mktemp("matrix") / "store.db")
    engine = {"checkpoint": "none", "engine": {"url": served_engine.url}}
    config = parse_config({"store": f"sqlite:///{file}", "models": {"main": engine}, "roles": {"*": "main"}})
    store = open_store(config.store)
    with (
        fake.ServerThread(ProxyApp(config, store)) as server,
        httpx.Client(base_url=server.url, timeout=20, verify=False) as client,
    ):
        yield SimpleNamespace(url=server.url, client=client, store=store, runs=count())
    store.close()


@pytest.fixture
def matrix(served: SimpleNamespace, engine_app: Any) -> SimpleNamespace:
    """The proxy's URL under this test's run, `ask` for a feature, `calls` of the run."""
    run_id = f"run-{next(served.runs)}"

    def ask(what: str, **more: Any) -> httpx.Response:
        engine_app.reasoning_parser = what in REASONING
        body = {"model": "main", **FEATURES[what][0], **more}
        answer: httpx.Response = served.client.post(f"/run/{run_id}/role/a{CHAT}", json=body, headers=SAME_ID)
        return answer

    return SimpleNamespace(
        url=f"{served.url}/run/{run_id}/role/a/v1", ask=ask, calls=lambda: served.store.trace(run_id).calls
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", FEATURES)
def test_the_client_gets_what_the_engine_would_have_sent(
    matrix: SimpleNamespace, direct: httpx.Client, what: str, stream: bool
) -> None:
    ours = matrix.ask(what, stream=stream)
    theirs = direct.post(CHAT, json={"model": "main", **FEATURES[what][0], "stream": stream}, headers=SAME_ID)
    assert (ours.status_code, ours.headers["content-type"]) == (200, theirs.headers["content-type"])
    left, right = timeless(ours.content), timeless(theirs.content)
    if stream and FEATURES[what][0].get("n"):
        left, right = without_fingerprints(left), without_fingerprints(right)
    if stream and what == "one call at most":  # a call that was cut leaves an empty delta: it says nothing
        left, right = without_silent_chunks(left), without_silent_chunks(right)
    assert left == right


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
@pytest.mark.parametrize("what", ["text", "parallel calls", "several choices", "logprobs"])
def test_usage_rides_on_the_stream_where_it_is_asked_for(
    matrix: SimpleNamespace, direct: httpx.Client, what: str, options: dict[str, Any]
) -> None:
    body = {"model": "main", **FEATURES[what][0], "stream": True, "stream_options": options}
    theirs = timeless(direct.post(CHAT, json=body, headers=SAME_ID).content)
    ours = timeless(matrix.ask(what, stream=True, stream_options=options).content)
    assert ours == theirs and b'"usage"' in ours


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", FEATURES)
def test_the_record_is_what_was_sampled(matrix: SimpleNamespace, direct: httpx.Client, what: str, stream: bool) -> None:
    matrix.ask(what, stream=stream)
    body = {"model": "main", **FEATURES[what][0], "return_token_ids": True, "logprobs": True}
    truth = direct.post(CHAT, json=body, headers=SAME_ID).json()
    (call,) = matrix.calls()
    assert (call.status, call.quarantine, call.error, call.stream) == ("complete", None, None, stream)
    assert list(call.prompt_ids or ()) == truth["prompt_token_ids"]
    assert len(call.choices) == len(truth["choices"])
    for choice, said in zip(call.choices, truth["choices"], strict=True):
        assert list(choice.token_ids) == said["token_ids"]
        assert list(choice.logprobs or ()) == [token["logprob"] for token in said["logprobs"]["content"]]
        assert choice.finish_reason == said["finish_reason"]
        assert choice.flags == FEATURES[what][1]
        if what != "a call cut short" or not stream:  # a stream has said the head of the call, a plain answer has not
            assert _spoken(choice.message) == _spoken(said["message"])
    assert {**call.request, **call.requested} == json.loads(json.dumps({"model": "main", **FEATURES[what][0],
                                                                        "stream": stream}))  # fmt: skip


def _spoken(message: Any) -> dict[str, Any]:
    """What a message says: streams leave out what is null."""
    return {name: message[name] for name in ("role", "content", "reasoning", "tool_calls") if message.get(name)}


@pytest.mark.parametrize("what", FEATURES)
def test_what_goes_up_is_the_request_and_what_recording_needs(
    matrix: SimpleNamespace, engine_app: Any, what: str
) -> None:
    matrix.ask(what)
    sent = dict(engine_app.requests[0])
    kept_sets = ("top_logprobs", "return_tokens_as_token_ids") if what == "truncation" else ()
    for injected in ("return_token_ids", "logprobs", "cache_salt", *kept_sets):
        if injected not in FEATURES[what][0]:
            sent.pop(injected)
    assert sent == {"model": "main", **FEATURES[what][0]}


@pytest.mark.parametrize("stream", [False, True])
def test_hidden_reasoning_is_answered_and_quarantined(
    matrix: SimpleNamespace, direct: httpx.Client, stream: bool
) -> None:
    """The engine withholds ids and logprobs with it, so there is nothing exact to record."""
    body = {"model": "main", **say("think"), "include_reasoning": False, "stream": stream}
    ours = matrix.ask("reasoning", include_reasoning=False, stream=stream)
    theirs = direct.post(CHAT, json=body, headers=SAME_ID)
    assert timeless(ours.content) == timeless(theirs.content)
    assert b"because" not in ours.content and b'"reasoning":"' not in ours.content
    (call,) = matrix.calls()
    assert (call.status, call.quarantine) == ("complete", "reasoning hidden")
    assert call.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_parser_nothing_is_hidden(matrix: SimpleNamespace, engine_app: Any, stream: bool) -> None:
    engine_app.tools_parser = False
    matrix.ask("text", include_reasoning=False, stream=stream)
    assert matrix.calls()[0].quarantine is None


# ---- through the SDK


SDK_FEATURES = ("text", "parallel calls", "one call at most", "tools named", "json schema", "several choices",
                "top logprobs", "reasoning", "a stop string")  # fmt: skip


@pytest.fixture
def clients(matrix: SimpleNamespace, engine_url: str) -> tuple[openai.OpenAI, openai.OpenAI]:
    settings: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 20, "default_headers": SAME_ID}
    through = openai.OpenAI(base_url=matrix.url, **settings)
    return through, openai.OpenAI(base_url=f"{engine_url}/v1", **settings)


def _is_silent(delta: dict[str, Any], finish_reason: str | None, **_: Any) -> bool:
    return finish_reason is None and not any(delta.values())


def _dumped(answer: BaseModel) -> dict[str, Any]:
    return {name: value for name, value in answer.model_dump().items() if name != "created"}


@pytest.mark.parametrize("what", SDK_FEATURES)
def test_the_sdk_reads_the_same_answer(
    clients: tuple[openai.OpenAI, openai.OpenAI], engine_app: Any, what: str
) -> None:
    engine_app.reasoning_parser = what in REASONING
    ours, theirs = (client.chat.completions.create(model="main", **FEATURES[what][0]) for client in clients)
    assert _dumped(ours) == _dumped(theirs)


@pytest.mark.parametrize("what", SDK_FEATURES)
def test_the_sdk_reads_the_same_stream(
    clients: tuple[openai.OpenAI, openai.OpenAI], engine_app: Any, what: str
) -> None:
    engine_app.reasoning_parser = what in REASONING
    streams = []
    for client in clients:
        chunks = client.chat.completions.create(model="main", stream=True, **FEATURES[what][0])
        dumped = [{**_dumped(chunk), "system_fingerprint": None} for chunk in chunks]
        if what == "one call at most":
            dumped = [chunk for chunk in dumped if not _is_silent(**chunk["choices"][0])]
        streams.append(dumped)
    assert streams[0] == streams[1]


# ---- through LangChain


class Verdict(BaseModel):
    """What is asked for."""

    answer: int
    why: str


@tool
def weather(city: str) -> str:
    """Say how the weather is."""
    return city


@tool
def news(days: int) -> str:
    """Say what happened."""
    return str(days)


@pytest.fixture
def chat(matrix: SimpleNamespace) -> ChatOpenAI:
    return ChatOpenAI(base_url=matrix.url, api_key=SecretStr("none"), model="main", max_retries=0, timeout=20)


def the_call(matrix: SimpleNamespace) -> Call:
    call: Call
    (call,) = matrix.calls()
    assert (call.status, call.quarantine) == ("complete", None)
    return call


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("stream", [False, True])
def test_with_structured_output(chat: ChatOpenAI, matrix: SimpleNamespace, method: Any, stream: bool) -> None:
    model = chat.with_structured_output(Verdict, method=method)
    verdict = list(model.stream("judge"))[-1] if stream else model.invoke("judge")
    assert verdict == Verdict(answer=7, why="x")
    call = the_call(matrix)
    assert "constrained" in call.choices[0].flags
    if method == "function_calling":
        assert call.choices[0].message["tool_calls"][0]["function"]["name"] == "Verdict"


BINDINGS: list[tuple[dict[str, Any], list[str], tuple[str, ...]]] = [
    ({}, ["weather", "news"], ()),
    ({"tool_choice": "auto"}, ["weather", "news"], ()),
    ({"tool_choice": "none"}, [], ()),
    ({"tool_choice": "any"}, ["weather", "news"], CONSTRAINED),
    ({"tool_choice": "required"}, ["weather", "news"], CONSTRAINED),
    ({"tool_choice": "news"}, ["news"], CONSTRAINED),
    ({"parallel_tool_calls": False}, ["weather"], ("constrained", "hidden_tool_calls")),
    ({"strict": True}, ["weather", "news"], CONSTRAINED),
]


@pytest.mark.parametrize("binding", BINDINGS, ids=lambda binding: str(binding[0]))
@pytest.mark.parametrize("stream", [False, True])
def test_bind_tools(chat: ChatOpenAI, matrix: SimpleNamespace, binding: Any, stream: bool) -> None:
    bound, names, flags = binding
    model = chat.bind_tools([weather, news], **bound)
    if stream:
        answer: Any = AIMessageChunk(content="")
        for chunk in model.stream("call all"):
            answer += chunk
    else:
        answer = model.invoke("call all")
    arguments = {"weather": {"city": "x"}, "news": {"days": 7}}
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [(n, arguments[n]) for n in names]
    choice = the_call(matrix).choices[0]
    assert [call["function"]["name"] for call in choice.message.get("tool_calls", [])] == names
    assert choice.flags == flags


def test_langchain_gets_the_logprobs_it_asks_for_and_no_others(chat: ChatOpenAI, fake: Any) -> None:
    assert chat.invoke("hi").response_metadata["logprobs"] is None
    asked = chat.bind(logprobs=True).invoke("hi").response_metadata["logprobs"]["content"]
    ids = [*fake.encode_text("0: hi"), fake.EOS]
    assert [token["logprob"] for token in asked] == [fake.logprob_of(t, i, 0) for i, t in enumerate(ids)]
