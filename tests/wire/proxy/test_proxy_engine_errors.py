"""Errors of the engine reach the client in OpenAI's shape, with the codes that SDKs act on; the store has them raw."""

import json
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tracegrad.adapters.proxy.endpoints import CHAT, COMPLETIONS, EMBEDDINGS
from tracegrad.adapters.proxy.engine_errors import OVERFLOW_WORDS, openai_error, openai_error_event
from tracegrad.tracestore.store import Store

HELLO: Any = [{"role": "user", "content": "hello"}]
LONG: Any = [{"role": "user", "content": "x" * 3000}]


def vllm(message: str, status: int, kind: str = "BadRequestError", param: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()


def error(status: int, body: bytes, shape: Any = CHAT) -> dict[str, Any]:
    told = json.loads(openai_error(status, body, shape))
    assert set(told) == {"error"}
    found: dict[str, Any] = told["error"]
    assert set(found) == {"message", "type", "code", "param"}
    assert isinstance(found["message"], str) and found["message"]
    return found


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, vllm("bad", 400, param="tools"), ("bad", "invalid_request_error", "invalid_request", "tools")),
        (404, vllm("The model `m` does not exist. Valid aliases: n.", 404, "NotFoundError", "model"),
         ("The model `m` does not exist. Valid aliases: n.", "invalid_request_error", "model_not_found", "model")),
        (404, vllm("Gone", 404, "Not Found"), ("Gone", "invalid_request_error", "not_found", None)),
        (422, vllm("no image there", 422, "UnprocessableEntityError"),
         ("no image there", "invalid_request_error", "unprocessable_entity", None)),
        (429, vllm("slow down", 429, "Too Many Requests"), ("slow down", "requests", "rate_limit_exceeded", None)),
        (500, vllm("EngineCore died", 500, "InternalServerError"),
         ("EngineCore died", "server_error", "engine_error", None)),
        (503, vllm("retry", 503, "ServiceUnavailableError"), ("retry", "server_error", "service_unavailable", None)),
        (401, b'{"error":"Unauthorized"}', ("Unauthorized", "invalid_request_error", "invalid_api_key", None)),
        (404, b'{"detail":"Not here"}', ("Not here", "invalid_request_error", "not_found", None)),
        (422, b'{"detail":[{"loc":["body","messages"],"msg":"Field required","type":"missing"}]}',
         ("Field required", "invalid_request_error", "unprocessable_entity", "messages")),
        (400, b'{"object":"error","message":"old","type":"BadRequestError","param":null,"code":400}',
         ("old", "invalid_request_error", "invalid_request", None)),
        (418, vllm("tea", 418), ("tea", "invalid_request_error", "invalid_request", None)),
        (599, vllm("net", 599), ("net", "server_error", "engine_error", None)),
        (503, b"upstream connect error", ("upstream connect error", "server_error", "service_unavailable", None)),
    ],
)  # fmt: skip
def test_every_shape_becomes_openais(status: int, body: bytes, expected: tuple[Any, ...]) -> None:
    found = error(status, body)
    assert (found["message"], found["type"], found["code"], found["param"]) == expected


@pytest.mark.parametrize("body", [b"", b"<html><body>502 Bad Gateway</body></html>", b"[]", b"null", b'{"error":7}'])
def test_what_says_nothing_is_told_by_its_status(body: bytes) -> None:
    found = error(502, body)
    assert (found["type"], found["code"]) == ("server_error", "bad_gateway")
    assert "<" not in found["message"]


OVERFLOWS = [
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens, "
    "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
    "(parameter=input_tokens, value=2049)",
    "This model's maximum context length is 16 tokens. However, your prompt contains 999 characters (more than 64 "
    "characters, which is the upper bound for 16 input tokens).",
    "Input length (3000) exceeds model's maximum context length (2048).",
    "The decoder prompt (length 3000) is longer than the maximum model length of 2048. Make sure that ...",
    "The decoder prompt (length 2048) plus the number of requested output tokens (at least 1) is longer than the "
    "maximum model length of 2048. Make sure that ...",
]


@pytest.mark.parametrize("message", OVERFLOWS)
def test_an_overflow_has_the_code_that_clients_know(message: str) -> None:
    found = error(400, vllm(message, 400, param="input_tokens"))
    assert (found["code"], found["type"], found["param"]) == (
        "context_length_exceeded", "invalid_request_error", "messages",
    )  # fmt: skip
    assert found["message"] == message + OVERFLOW_WORDS
    assert error(400, vllm(message, 400), COMPLETIONS)["param"] == "prompt"
    assert error(400, vllm(message, 400), EMBEDDINGS)["param"] == "input"


def test_a_prompt_that_fills_the_context_is_an_overflow_too() -> None:
    """vLLM names the tokens that are left. A client that itself asks for none has another problem."""
    body = vllm("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", 400, param="max_tokens")
    for request in ({}, {"max_tokens": 16}, {"max_completion_tokens": None}):
        told = json.loads(openai_error(400, body, CHAT, request))["error"]
        assert (told["code"], told["param"]) == ("context_length_exceeded", "messages")
    for request in ({"max_tokens": 0}, {"max_completion_tokens": 0}):
        told = json.loads(openai_error(400, body, CHAT, request))["error"]
        assert (told["code"], told["param"]) == ("invalid_request", "max_tokens")


def test_an_endpoint_that_the_engine_does_not_have_is_named() -> None:
    found = error(404, b'{"detail":"Not Found"}', EMBEDDINGS)
    assert found["message"] == "the engine of this model does not answer /v1/embeddings"
    assert found["code"] == "not_found"


def test_too_many_output_tokens_are_no_overflow() -> None:
    """A shorter history would not help."""
    message = "max_tokens=9999 cannot be greater than max_model_len=2048. Please request fewer output tokens."
    assert error(400, vllm(message, 400, param="max_tokens"))["code"] == "invalid_request"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message":"x","type":"invalid_request_error","param":null,"code":null}}',
        b'{"error":{"message":"x","type":"insufficient_quota","param":null,"code":"insufficient_quota","more":1}}',
    ],
)
def test_what_is_in_openais_shape_passes_as_it_came(body: bytes) -> None:
    assert openai_error(429, body, CHAT) == body
    assert openai_error_event(body, CHAT) == body


def test_an_event_that_is_no_error_is_left_alone() -> None:
    assert openai_error_event(b'{"choices":[]}', CHAT) == b'{"choices":[]}'
    assert openai_error_event(b"no json", CHAT) == b"no json"


def sdk(proxy: SimpleNamespace) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy.url}/run/r/v1", api_key="none", max_retries=0, timeout=20)


def langchain(proxy: SimpleNamespace) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{proxy.url}/run/r/v1", api_key=SecretStr("none"), model="main", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_sdk_and_langchain_recognise_an_overflow(proxy: SimpleNamespace, store: Store, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk(proxy).chat.completions.create(model="main", messages=LONG, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(ContextOverflowError):
        list(langchain(proxy).stream(LONG)) if stream else langchain(proxy).invoke(LONG)
    for call in store.trace("r").calls:
        assert call.status == "failed" and call.error is not None
        assert call.error.startswith('HTTP 400: {"error":{"message":"This model\'s maximum context length is 2048')


def test_an_overflow_that_shows_after_the_stream_began_is_recognised_too(
    proxy: SimpleNamespace, store: Store, engine_app: Any
) -> None:
    engine_app.fault = "error_event"
    engine_app.event_error = {"message": OVERFLOWS[3], "type": "BadRequestError", "param": None, "code": 400}
    with pytest.raises(openai.APIError) as caught:
        list(sdk(proxy).chat.completions.create(model="main", messages=HELLO, stream=True))
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
    with pytest.raises(ContextOverflowError):
        list(langchain(proxy).stream(HELLO))
    assert json.loads(store.trace("r").calls[0].error or "") == engine_app.event_error


def test_a_failure_in_mid_stream_is_an_api_error(proxy: SimpleNamespace, engine_app: Any) -> None:
    engine_app.fault = "error_event"
    with pytest.raises(openai.APIError, match="CUDA out of memory") as caught:
        list(sdk(proxy).chat.completions.create(model="main", messages=HELLO, stream=True))
    assert (caught.value.code, caught.value.type) == ("engine_error", "server_error")


def test_a_model_that_the_engine_does_not_know(proxy: SimpleNamespace, engine_app: Any) -> None:
    engine_app.name = "renamed"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk(proxy).chat.completions.create(model="main", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_of_something_in_between_becomes_an_error_of_json(
    proxy: SimpleNamespace, store: Store, engine_app: Any, stream: bool
) -> None:
    engine_app.raw_error = (502, b"<html><h1>502 Bad Gateway</h1></html>", b"text/html")
    with pytest.raises(openai.InternalServerError) as caught:
        sdk(proxy).chat.completions.create(model="main", messages=HELLO, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (502, "bad_gateway")
    assert caught.value.response.headers["content-type"] == "application/json"
    (call,) = store.trace("r").calls
    assert call.error == "HTTP 502: <html><h1>502 Bad Gateway</h1></html>"
