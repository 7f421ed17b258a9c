"""The fake engine of the proxy's tests against the real vLLM: same shapes, same keys in the same order, same nulls.

Every proxy test rests on the fake; this one keeps it honest. Where `TRACEGRAD_ENGINE_URL` is set that engine is
asked instead of the shared tiny one; it needs `--enable-auto-tool-choice --tool-call-parser hermes`. Calls that are
forced and strict are sampled under a grammar, so that a tiny model makes them too.
"""

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fake_vllm
import httpx
import pytest

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "3 5"}]
DIGITS = list(range(15, 25))
"""Token ids whose text is never empty: where a text is, the parser decides whether there is a chunk."""
ASK = {"messages": MESSAGES, "max_tokens": 4, "temperature": 1.0, "ignore_eos": True, "allowed_token_ids": DIGITS}
FREE = {"max_tokens": 400, "ignore_eos": False, "allowed_token_ids": None, "seed": 1}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OK = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "pick", "parameters": OK, "strict": True}}
CALLING = {**FREE, "tools": [TOOL], "parallel_tool_calls": False}
NAMED = {"type": "function", "function": {"name": "pick"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": OK}}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "token ids": {"return_token_ids": True},
    "logprobs": {"logprobs": True},
    "what the proxy asks for": {"return_token_ids": True, "logprobs": True},
    "top logprobs": {"logprobs": True, "top_logprobs": 2},
    "kept sets": {"top_k": 2, "logprobs": True, "top_logprobs": 10, "return_tokens_as_token_ids": True},
    "two choices": {"n": 2, "return_token_ids": True, "logprobs": True},
    "a required call": {**CALLING, "tool_choice": "required"},
    "a required call with ids": {**CALLING, "tool_choice": "required", "return_token_ids": True, "logprobs": True},
    "a named call": {**CALLING, "tool_choice": NAMED},
    "tools, none": {"tools": [TOOL], "tool_choice": "none"},
    "a schema": {**FREE, "response_format": FORMAT},
    "hidden reasoning": {"include_reasoning": False, "return_token_ids": True, "logprobs": True},
}
STREAMS = {
    **REQUESTS,
    "usage": {"stream_options": {"include_usage": True}},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "what the proxy asks for in streams": {
        "return_token_ids": True,
        "logprobs": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    },
}
ERRORS: dict[str, dict[str, Any]] = {
    "no tools": {"tools": []},
    "top logprobs without logprobs": {"top_logprobs": 3},
    "stream options without a stream": {"stream_options": {"include_usage": True}},
    "too many top logprobs": {"logprobs": True, "top_logprobs": 21},
    "greedy with n > 1": {"n": 3, "temperature": 0},
    "unknown model": {"model": "no-such-model"},
    "overflow": {"messages": [{"role": "user", "content": "x" * 600}]},
}
COMPLETION = {"prompt": "3 5", "max_tokens": 4, "temperature": 1.0, "ignore_eos": True}
COMPLETION_REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "token ids": {"return_token_ids": True},
    "logprobs": {"logprobs": 0},
    "what the proxy asks for": {"return_token_ids": True, "logprobs": 0},
    "kept sets": {"top_k": 2, "logprobs": 10, "return_tokens_as_token_ids": True},
    "two choices of two prompts": {"n": 2, "prompt": ["3 5", "7"], "return_token_ids": True, "logprobs": 1},
    "token ids in": {"prompt": [70, 71, 72], "return_token_ids": True},
    "echo": {"echo": True},
    "echo with logprobs": {"echo": True, "logprobs": 1},
    "echo with ids": {"echo": True, "return_token_ids": True},
}
COMPLETION_STREAMS = {
    **COMPLETION_REQUESTS,
    "usage": {"stream_options": {"include_usage": True}},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    url = os.environ.get("TRACEGRAD_ENGINE_URL") or request.getfixturevalue("engine").url
    with httpx.Client(base_url=url, timeout=120, verify=False) as client:
        yield client


@pytest.fixture(scope="module")
def name(real: httpx.Client) -> str:
    return str(real.get("/v1/models").json()["data"][0]["id"])


@pytest.fixture(scope="module")
def fake(name: str) -> Iterator[SimpleNamespace]:
    app = fake_vllm.FakeEngine(name)
    with fake_vllm.ServerThread(app) as server, httpx.Client(base_url=server.url, verify=False) as client:
        yield SimpleNamespace(app=app, client=client)


def shape(value: Any) -> Any:
    """Types and key order; a list is the shapes that occur in it, `bytes` lists are not looked into."""
    if isinstance(value, dict):
        if value and all(isinstance(member, float) for member in value.values()):
            return "token -> logprob"
        if value and all(key.isdigit() for key in value):
            return "token id -> logprob"
        return [(key, "bytes" if key == "bytes" else shape(member)) for key, member in value.items()]
    if isinstance(value, list):
        shapes: list[Any] = []
        for member in value:
            if (found := shape(member)) not in shapes:
                shapes.append(found)
        return shapes
    return None if value is None else type(value).__name__


def chunk_shapes(text: str) -> list[Any]:
    """The shapes of a stream's chunks, each once, in order of appearance; [DONE] stands for itself."""
    shapes: list[Any] = []
    for event in text.split("\n\n"):
        if event:
            assert event.startswith("data: ")
            data = event.removeprefix("data: ")
            found = data if data == "[DONE]" else shape(json.loads(data))
            if found not in shapes:
                shapes.append(found)
    return shapes


def ask_both(
    real: httpx.Client, fake: SimpleNamespace, body: dict[str, Any], path: str = CHAT
) -> tuple[httpx.Response, httpx.Response]:
    return real.post(path, json=body), fake.client.post(path, json=body)


@pytest.mark.parametrize("what", REQUESTS)
def test_plain_answers_have_the_real_shape(real: httpx.Client, fake: SimpleNamespace, name: str, what: str) -> None:
    truth, ours = ask_both(real, fake, {**ASK, "model": name, **REQUESTS[what]})
    assert truth.status_code == ours.status_code == 200, truth.text
    assert shape(ours.json()) == shape(truth.json())
    assert ours.headers["content-type"] == truth.headers["content-type"]
    assert json.dumps(truth.json(), separators=(",", ":"), ensure_ascii=False).encode() == truth.content


@pytest.mark.parametrize("what", STREAMS)
def test_streams_have_the_real_shape(real: httpx.Client, fake: SimpleNamespace, name: str, what: str) -> None:
    truth, ours = ask_both(real, fake, {**ASK, "model": name, "stream": True, **STREAMS[what]})
    assert truth.status_code == ours.status_code == 200, truth.text
    assert chunk_shapes(ours.text) == chunk_shapes(truth.text)
    assert ours.headers["content-type"] == truth.headers["content-type"]


@pytest.mark.parametrize("what", COMPLETION_REQUESTS)
def test_completions_have_the_real_shape(real: httpx.Client, fake: SimpleNamespace, name: str, what: str) -> None:
    body = {**COMPLETION, "model": name, **COMPLETION_REQUESTS[what]}
    truth, ours = ask_both(real, fake, body, COMPLETIONS)
    assert truth.status_code == ours.status_code == 200, truth.text
    assert shape(ours.json()) == shape(truth.json())
    assert [choice["index"] for choice in ours.json()["choices"]] == [c["index"] for c in truth.json()["choices"]]


@pytest.mark.parametrize("what", COMPLETION_STREAMS)
def test_streamed_completions_have_the_real_shape(
    real: httpx.Client, fake: SimpleNamespace, name: str, what: str
) -> None:
    body = {**COMPLETION, "model": name, "stream": True, **COMPLETION_STREAMS[what]}
    truth, ours = ask_both(real, fake, body, COMPLETIONS)
    assert truth.status_code == ours.status_code == 200, truth.text
    assert chunk_shapes(ours.text) == chunk_shapes(truth.text)


@pytest.mark.parametrize(("asked", "is_echoed"), [({}, True), ({"return_token_ids": True}, False)])
def test_ids_take_the_echo_away(
    real: httpx.Client, fake: SimpleNamespace, name: str, asked: dict[str, Any], is_echoed: bool
) -> None:
    """Why the proxy asks for nothing beside `echo`."""
    for answer in ask_both(real, fake, {**COMPLETION, "model": name, "echo": True, **asked}, COMPLETIONS):
        assert answer.json()["choices"][0]["text"].startswith("3 5") == is_echoed


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/models/tiny"])
def test_unknown_paths_have_the_real_answer(real: httpx.Client, fake: SimpleNamespace, path: str) -> None:
    truth, ours = real.post(path, json={}), fake.client.post(path, json={})
    assert (ours.status_code, ours.json()) == (truth.status_code, truth.json())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}),
        ("/v1/load_lora_adapter", {"lora_name": "NAME", "lora_path": "/somewhere"}),
        ("/v1/unload_lora_adapter", {"lora_name": ""}),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    ],
)
def test_adapters_are_refused_as_by_the_real_one(
    real: httpx.Client, fake: SimpleNamespace, name: str, path: str, body: dict[str, Any]
) -> None:
    """That they are taken, and listed with their folder, the real one shows in test_roles_learn.py."""
    named = {key: name if value == "NAME" else value for key, value in body.items()}
    truth, ours = real.post(path, json=named), fake.client.post(path, json=named)
    assert (ours.status_code, ours.json()) == (truth.status_code, truth.json())


@pytest.mark.parametrize("what", ERRORS)
def test_errors_have_the_real_status_and_shape(real: httpx.Client, fake: SimpleNamespace, name: str, what: str) -> None:
    fake.app.max_model_len = 512
    truth, ours = ask_both(real, fake, {**ASK, "model": name, **ERRORS[what]})
    assert truth.status_code == ours.status_code
    assert shape(ours.json()) == shape(truth.json())
    assert (ours.json()["error"]["code"], ours.json()["error"]["type"]) == (
        truth.json()["error"]["code"], truth.json()["error"]["type"],
    )  # fmt: skip
    if what == "overflow":
        assert ours.json() == truth.json()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("what", ["too many top logprobs", "greedy with n > 1", "unknown model"])
def test_streams_are_refused_where_the_real_one_refuses_them(
    real: httpx.Client, fake: SimpleNamespace, name: str, what: str, path: str
) -> None:
    """Before the stream, or in an event of it: what only the engine itself finds comes after its 200."""
    wrong = {"logprobs": 21} if path == COMPLETIONS and "logprobs" in what else ERRORS[what]
    body = {**(ASK if path == CHAT else COMPLETION), "model": name, "stream": True, **wrong}
    truth, ours = ask_both(real, fake, body, path)
    inside = "top logprobs" in what
    assert truth.status_code == ours.status_code and (truth.status_code == 200) == inside
    assert ours.headers["content-type"] == truth.headers["content-type"]
    if inside:
        assert ours.text == truth.text
    else:
        assert shape(ours.json()) == shape(truth.json())


def test_models_and_health_have_the_real_shape(real: httpx.Client, fake: SimpleNamespace) -> None:
    assert shape(fake.client.get("/v1/models").json()) == shape(real.get("/v1/models").json())
    truth, ours = real.get("/health"), fake.client.get("/health")
    assert (ours.status_code, ours.content) == (truth.status_code, truth.content)


def test_the_request_id_header_becomes_the_completion_id(real: httpx.Client, fake: SimpleNamespace, name: str) -> None:
    for client in (real, fake.client):
        answer = client.post("/v1/chat/completions", json={**ASK, "model": name}, headers={"x-request-id": "abc"})
        assert answer.json()["id"] == "chatcmpl-abc"


def test_rendering_and_ids_have_the_real_shape(real: httpx.Client, fake: SimpleNamespace, name: str) -> None:
    """A render gives the ids of the same request's prompt; ids that are given instead are the prompt."""
    asked = {**ASK, "model": name, "return_token_ids": True, "logprobs": True}
    rendered = ask_both(real, fake, asked, f"{CHAT}/render")
    truth, ours = ([(key, shape(value)) for key, value in one.json().items()] for one in rendered)
    assert [key for key, _ in ours] == [key for key, _ in truth if key in dict(ours)]
    for client, answer in zip((real, fake.client), rendered, strict=True):
        ids = answer.json()["token_ids"]
        assert client.post(CHAT, json=asked).json()["prompt_token_ids"] == ids
        other = [*ids, ids[-1], ids[-2]]
        for stream in (False, True):
            body = {**asked, "stream": stream, "kv_transfer_params": {"prompt_token_ids": other}}
            assert json.dumps(other, separators=(",", ":")) in client.post(CHAT, json=body).text
        ended = client.post(f"{CHAT}/render", json={**asked, "add_generation_prompt": False}).json()["token_ids"]
        assert ids[: len(ended)] == ended and len(ended) < len(ids)
        text = client.post("/detokenize", json={"model": name, "tokens": ids})
        assert list(text.json()) == ["prompt"] and "3 5" in text.json()["prompt"]
