"""Law 2: with recording on, the client receives what the engine would have sent. Compared with the direct answer."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from wire_bytes import SAME_ID, timeless, without_fingerprints

from tracegrad.adapters.proxy.fields import salt_of

ASK = {"model": "main", "messages": [{"role": "user", "content": "héllo \u2603"}]}


def both(proxy: SimpleNamespace, direct: httpx.Client, ask: dict[str, Any]) -> tuple[httpx.Response, httpx.Response]:
    through = proxy.client.post("/run/known/role/known/v1/chat/completions", json=ask, headers=SAME_ID)
    return through, direct.post("/v1/chat/completions", json=ask, headers=SAME_ID)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"return_token_ids": True},
        {"return_token_ids": True, "logprobs": True},
        {"logprobs": False, "return_token_ids": False, "top_logprobs": None},
        {"max_tokens": 3, "temperature": 0.5},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_byte_for_byte_the_direct_one(
    proxy: SimpleNamespace, direct: httpx.Client, extra: dict[str, Any], stream: bool
) -> None:
    through, straight = both(proxy, direct, {**ASK, **extra, "stream": stream})
    assert straight.status_code == 200
    if stream and extra.get("n"):  # the earlier choices' fingerprints are listed exceptions
        assert without_fingerprints(timeless(through.content)) == without_fingerprints(timeless(straight.content))
    else:
        assert timeless(through.content) == timeless(straight.content)
    assert through.headers["content-type"] == straight.headers["content-type"]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("options", [None, {"include_usage": True}])
def test_a_stream_of_nobody_names_its_call_in_the_fingerprint_of_its_ends(
    proxy: SimpleNamespace, direct: httpx.Client, n: int, options: dict[str, Any] | None
) -> None:
    ask = {**ASK, "stream": True, "n": n, "stream_options": options}
    through = proxy.client.post("/v1/chat/completions", json=ask, headers=SAME_ID)
    straight = direct.post("/v1/chat/completions", json=ask, headers=SAME_ID)
    assert without_fingerprints(timeless(through.content)) == without_fingerprints(timeless(straight.content))
    chunks = [msgspec.json.decode(line[6:]) for line in through.content.splitlines() if line.startswith(b"data: {")]
    named = [chunk.get("system_fingerprint") for chunk in chunks if any(c["finish_reason"] for c in chunk["choices"])]
    assert named == [through.headers["x-tracegrad-call"]] * n


@pytest.mark.parametrize(
    "options",
    [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}, {"include_usage": False}],
)
def test_usage_chunks_are_sent_where_asked_for(
    proxy: SimpleNamespace, direct: httpx.Client, options: dict[str, Any] | None
) -> None:
    through, straight = both(proxy, direct, {**ASK, "stream": True, "stream_options": options})
    assert timeless(through.content) == timeless(straight.content)
    assert (b'"usage"' in through.content) == bool(options and options["include_usage"])


@pytest.mark.parametrize(
    "bad",
    [
        {"tools": []},
        {"top_logprobs": 5},
        {"stream_options": {"include_usage": True}},
        {"n": 3, "temperature": 0},
    ],
)
def test_engine_errors_come_through_with_status_message_and_param(
    proxy: SimpleNamespace, direct: httpx.Client, bad: dict[str, Any]
) -> None:
    through, straight = both(proxy, direct, {**ASK, **bad})
    assert through.status_code == straight.status_code == 400
    ours, theirs = through.json()["error"], straight.json()["error"]
    assert (ours["message"], ours["param"]) == (theirs["message"], theirs["param"])
    assert (ours["type"], ours["code"]) == ("invalid_request_error", "invalid_request")


def test_a_503_of_the_engine_comes_through(proxy: SimpleNamespace, direct: httpx.Client, engine_app: Any) -> None:
    engine_app.fault = "overloaded"
    through, straight = both(proxy, direct, {**ASK, "stream": True})
    assert through.status_code == straight.status_code == 503
    assert through.json()["error"]["message"] == straight.json()["error"]["message"]


def test_an_alias_is_answered_under_its_own_name_and_sent_under_the_engines(
    proxy: SimpleNamespace, engine_app: Any
) -> None:
    plain = proxy.client.post("/v1/chat/completions", json={**ASK, "model": "gpt-4o"})
    stream = proxy.client.post("/v1/chat/completions", json={**ASK, "model": "gpt-4o", "stream": True})
    assert plain.json()["model"] == "gpt-4o"
    assert b'"model":"gpt-4o"' in stream.content and b'"model":"main"' not in stream.content
    assert [request["model"] for request in engine_app.requests] == ["main", "main"]


def test_what_goes_up_is_the_clients_request_plus_what_recording_needs(proxy: SimpleNamespace, engine_app: Any) -> None:
    ask = {**ASK, "temperature": 0.30, "stream": True, "stream_options": {"continuous_usage_stats": True}, "user": "u"}
    proxy.client.post(
        "/run/r/role/a/v1/chat/completions", json=ask, headers={"x-tracegrad-role": "b", "authorization": "Bearer k"}
    )
    sent = engine_app.requests[0]
    added = {
        "return_token_ids": True,
        "logprobs": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "cache_salt": salt_of("default", None),
    }
    assert {key: value for key, value in sent.items() if key != "_id"} == {**ask, **added}
    headers = engine_app.headers[0]
    assert headers["authorization"] == "Bearer k"
    assert not [name for name in headers if name.startswith("x-tracegrad")]


@pytest.mark.parametrize("body", [{"kv_transfer_params": {"x": 1}}, {"vllm_xargs": {"kv_transfer_params": "x"}}])
def test_fields_that_reach_into_the_engine_are_refused(
    proxy: SimpleNamespace, engine_app: Any, body: dict[str, Any]
) -> None:
    answer = proxy.client.post("/v1/chat/completions", json={**ASK, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "field_not_allowed"
    assert answer.json()["error"]["param"] == "kv_transfer_params"
    assert engine_app.requests == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"text"', b"\xff"])
def test_a_body_that_is_no_object_is_a_400(proxy: SimpleNamespace, body: bytes) -> None:
    answer = proxy.client.post("/v1/chat/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_stream_is_passed_on_while_the_engine_still_samples(proxy: SimpleNamespace, engine_app: Any) -> None:
    """The engine does not sample its last token before the client has read all the others."""
    engine_app.gate = threading.Event()
    with proxy.client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        early = [next(lines) for _ in range(1 + len("0: héllo \u2603".encode()))]
        assert engine_app.finished == 0 and engine_app.in_flight == 1
        assert all('"finish_reason":null' in line for line in early)
        engine_app.gate.set()
        late = list(lines)
    assert len(late) == 2 and '"finish_reason":"stop"' in late[0] and late[1] == "data: [DONE]"


def test_models_are_the_engines(proxy: SimpleNamespace, direct: httpx.Client) -> None:
    assert proxy.client.get("/v1/models").json() == direct.get("/v1/models").json()


def test_only_listed_paths_exist(proxy: SimpleNamespace, engine_app: Any) -> None:
    for method, path, status in [
        ("POST", "/v1/responses/x", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/pause", 404),
        ("POST", "/collective_rpc", 404),
        ("POST", "/run/r/collective_rpc", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/../pause", 404),
    ]:
        answer = proxy.client.request(method, path, json={})
        assert (answer.status_code, set(answer.json())) == (status, {"error"}), path
    assert engine_app.requests == []


def test_an_unknown_model_is_a_404_with_near_misses(start_proxy: Callable[..., SimpleNamespace]) -> None:
    models = {
        name: {"checkpoint": "none", "engine": {"url": f"http://127.0.0.1:{port}"}}
        for name, port in (("planner-7b", 9), ("writer-7b", 10))
    }
    proxy = start_proxy(models=models, roles={}, trainer={"model": "planner-7b"})
    answer = proxy.client.post("/v1/chat/completions", json={**ASK, "model": "planer-7b"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "did you mean planner-7b" in error["message"]


def test_a_silent_engine_is_a_504(start_proxy: Callable[..., SimpleNamespace], engine_app: Any) -> None:
    engine_app.token_delay_s = 0.2
    proxy = start_proxy(proxy={"upstream_timeout_s": 0.1})
    answer = proxy.client.post("/v1/chat/completions", json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_timeout")


def test_a_body_over_the_limit_is_a_413(start_proxy: Callable[..., SimpleNamespace]) -> None:
    proxy = start_proxy(proxy={"limits": {"max_body_bytes": 1000}})
    assert proxy.client.post("/v1/chat/completions", content=b" " * 1001).status_code == 413

    def chunks() -> Any:
        yield from [b" " * 600] * 2

    assert proxy.client.post("/v1/chat/completions", content=chunks()).status_code == 413


def test_health_says_what_is_live(proxy: SimpleNamespace) -> None:
    report = proxy.client.get("/health").json()
    assert report["status"] == report["store"] == report["models"]["main"]["engine"] == "ok"
    assert report["models"]["main"]["holding"] is False
