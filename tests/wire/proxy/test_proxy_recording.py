"""Laws 3, 4 and 6: recorded before replied, exactly, and nothing invented."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from conversations import calls_of
from waits import wait_for

from tracegrad.tracestore.errors import StoreUnavailable
from tracegrad.tracestore.store import Store

HELLO = [{"role": "user", "content": "hello"}]
ASK = {"model": "main", "messages": HELLO}


def post(proxy: SimpleNamespace, run_id: str = "r", **extra: Any) -> httpx.Response:
    answer: httpx.Response = proxy.client.post(f"/run/{run_id}/role/a/v1/chat/completions", json={**ASK, **extra})
    return answer


def sdk(proxy: SimpleNamespace) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_every_choice_is_stored_with_its_ids_and_logprobs(
    proxy: SimpleNamespace, store: Store, fake: Any, stream: bool, n: int
) -> None:
    before = time.time()
    answer = post(proxy, stream=stream, n=n, temperature=0.7, max_completion_tokens=50)
    (call,) = calls_of(store)
    assert answer.headers["x-tracegrad-call"] == call.call_id
    assert call.completion_id is not None and call.completion_id in answer.text
    assert (call.status, call.quarantine, call.stream, call.error) == ("complete", None, stream, None)
    assert call.prompt_ids == tuple(fake.FakeEngine().render(ASK))
    assert [choice.index for choice in call.choices] == list(range(n))
    for choice in call.choices:
        ids = (*fake.encode_text(f"{choice.index}: hello"), fake.EOS)
        assert choice.token_ids == ids
        assert choice.logprobs == tuple(fake.logprob_of(t, i, choice.index) for i, t in enumerate(ids))
        assert choice.finish_reason == "stop"
        assert choice.message["content"] == f"{choice.index}: hello"
        assert choice.message["role"] == "assistant"
    assert call.requested == call.effective
    assert call.effective["temperature"] == 0.7 and call.effective["max_completion_tokens"] == 50
    assert call.request["messages"] == HELLO and "temperature" not in call.request
    assert (call.model, call.requested_model) == ("main", "main")
    timing = call.timing
    assert before <= timing.received_at <= timing.dispatched_at <= timing.completed_at <= time.time()
    assert (timing.first_token_at is not None) == stream


def test_a_plain_answer_waits_for_the_commit(
    start_proxy: Callable[..., SimpleNamespace], blocked_store: Any, store: Store
) -> None:
    proxy = start_proxy(store_object=blocked_store)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(proxy)))
    asking.start()
    assert blocked_store.reached.wait(10)
    asking.join(0.3)
    assert answers == [] and asking.is_alive()
    blocked_store.let_go.set()
    asking.join(10)
    assert answers[0].status_code == 200
    assert len(calls_of(store)) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_a_streams_end_waits_for_the_commit_and_its_middle_does_not(
    start_proxy: Callable[..., SimpleNamespace], blocked_store: Any, n: int
) -> None:
    proxy = start_proxy(store_object=blocked_store)
    lines: list[str] = []

    def read() -> None:
        ask = {**ASK, "stream": True, "n": n, "stream_options": {"include_usage": True}}
        with proxy.client.stream("POST", "/run/r/v1/chat/completions", json=ask) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    def received() -> str:
        return "\n".join(lines)

    reading = threading.Thread(target=read)
    reading.start()
    assert blocked_store.reached.wait(10)
    reading.join(0.3)
    assert reading.is_alive()
    assert len(lines) == n + n * len("0: hello") + (n - 1), "all but the last finishing chunk"
    assert received().count('"finish_reason":"stop"') == n - 1
    assert "[DONE]" not in received() and '"usage"' not in received()
    blocked_store.let_go.set()
    reading.join(10)
    assert received().count('"finish_reason":"stop"') == n
    assert lines[-1] == "data: [DONE]" and '"usage"' in lines[-2]


def test_a_store_that_cannot_commit_is_a_503_without_the_answer(
    start_proxy: Callable[..., SimpleNamespace], blocked_store: Any
) -> None:
    blocked_store.error = StoreUnavailable("the disk is full")
    blocked_store.let_go.set()
    proxy = start_proxy(store_object=blocked_store)
    with pytest.raises(openai.InternalServerError, match=r"could not be recorded.*the disk is full") as caught:
        sdk(proxy).chat.completions.create(model="main", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "call_not_recorded")
    assert "0: hello" not in caught.value.response.text


def test_a_store_that_cannot_commit_ends_a_stream_in_an_error_the_sdk_raises(
    start_proxy: Callable[..., SimpleNamespace], blocked_store: Any
) -> None:
    blocked_store.error = StoreUnavailable("the disk is full")
    blocked_store.let_go.set()
    proxy = start_proxy(store_object=blocked_store)
    chunks = []
    with pytest.raises(openai.APIError, match=r"could not be recorded.*the disk is full"):
        for chunk in sdk(proxy).chat.completions.create(model="main", messages=HELLO, stream=True):
            chunks.append(chunk)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "0: hello"
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "flaw",
    [
        ("no_token_ids", "no prompt ids"),
        ("no_logprobs", "no logprobs"),
        ("short_logprobs", "length mismatch"),
        ("nan", "nan logprob"),
        ("missing_logprob", "missing logprob"),
        ("usage", "usage mismatch"),
    ],
)
def test_what_is_not_exact_is_quarantined_and_answered(
    proxy: SimpleNamespace, store: Store, engine_app: Any, stream: bool, flaw: tuple[str, str]
) -> None:
    fault, reason = flaw
    engine_app.fault = fault
    answer = post(proxy, stream=stream)
    assert answer.status_code == 200 and "hello"[-1] in answer.text
    (call,) = calls_of(store)
    assert (call.status, call.quarantine) == ("complete", reason)
    assert call.error is not None
    if reason not in ("usage mismatch", "no prompt ids"):
        assert call.choices[0].logprobs is None, "doubtful logprobs must not be kept"


def test_an_error_inside_a_stream_is_passed_on_and_stored_as_failed(
    proxy: SimpleNamespace, store: Store, engine_app: Any
) -> None:
    engine_app.fault = "error_event"
    answer = post(proxy, stream=True)
    assert answer.text.endswith('"code":"engine_error","param":null}}\n\ndata: [DONE]\n\n')
    (call,) = calls_of(store)
    raw = '{"message": "CUDA out of memory", "type": "InternalServerError", "param": null, "code": 500}'
    assert (call.status, call.error) == ("failed", raw), "the engine's own words"
    assert len(call.choices[0].token_ids) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_mid_answer(proxy: SimpleNamespace, store: Store, engine_app: Any, stream: bool) -> None:
    engine_app.fault = "drop"
    if stream:
        with pytest.raises(openai.APIError, match="engine of model 'main'"):
            list(sdk(proxy).chat.completions.create(model="main", messages=HELLO, stream=True,
                                                   extra_headers={"x-tracegrad-run": "r"}))  # fmt: skip
    else:
        answer = post(proxy)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unreachable")
        assert answer.headers["retry-after"] == "1", "the SDK tries again, and is then held until the engine is back"
    (call,) = calls_of(store)
    assert call.status == "failed"
    assert [len(choice.token_ids) for choice in call.choices] == ([3] if stream else [])


def test_an_answer_that_is_no_json_is_a_502(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    engine_app.fault = "not_json"
    assert post(proxy).json()["error"]["code"] == "engine_bad_answer"
    assert [call.status for call in calls_of(store)] == ["failed"]


def test_an_engine_error_is_stored_as_failed(proxy: SimpleNamespace, store: Store) -> None:
    post(proxy, tools=[])
    (call,) = calls_of(store)
    assert (call.status, call.choices, call.prompt_ids) == ("failed", (), None)
    assert call.error is not None and call.error.startswith("HTTP 400:")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_the_engine_and_is_stored_as_aborted(
    proxy: SimpleNamespace, store: Store, engine_app: Any, stream: bool
) -> None:
    engine_app.gate = threading.Event()
    with pytest.raises(httpx.ReadTimeout):
        proxy.client.post("/run/r/v1/chat/completions", json={**ASK, "stream": stream}, timeout=0.3)
    wait_for(lambda: engine_app.cancelled, "the engine noticed")
    wait_for(store.list_runs, "the call was stored")
    (call,) = calls_of(store)
    assert call.status == "aborted"
    assert [len(choice.token_ids) for choice in call.choices] == ([len("0: hello")] if stream else [])
    assert proxy.app.hold.gates["main"].in_flight == 0
    engine_app.gate.set()
    engine_app.gate = None
    assert post(proxy, "after").status_code == 200


def test_concurrent_calls_keep_their_own_answers_and_runs(proxy: SimpleNamespace, store: Store) -> None:
    wrong: list[str] = []

    def ask(worker: int) -> None:
        with httpx.Client(base_url=proxy.url, timeout=20, verify=False) as client:
            for turn in range(6):
                text = f"worker {worker} turn {turn}"
                body = {"messages": [{"role": "user", "content": text}], "stream": bool((worker + turn) % 2)}
                answer = client.post(f"/run/run-{worker}/role/role-{turn}/v1/chat/completions", json=body)
                content = call_text(answer)
                if content != f"0: {text}":
                    wrong.append(content)

    def call_text(answer: httpx.Response) -> str:
        (call,) = [c for c in calls_of(store, worker_of(answer)) if c.call_id == answer.headers["x-tracegrad-call"]]
        return str(call.choices[0].message["content"])

    def worker_of(answer: httpx.Response) -> str:
        return answer.request.url.path.split("/")[2]

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    for worker in range(8):
        calls = calls_of(store, f"run-{worker}")
        assert {call.attribution.role for call in calls} == {f"role-{turn}" for turn in range(6)}
        assert {call.request["messages"][0]["content"] for call in calls} == {
            f"worker {worker} turn {turn}" for turn in range(6)
        }


def test_the_override_applies_to_train_runs_and_both_values_are_stored(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    sampling = {"a": {"temperature": 0.9, "max_tokens": 4}}
    proxy = start_proxy(proxy={"sampling": sampling})
    for purpose in ("train", "eval", "live"):
        opened = proxy.client.post("/tracegrad/v1/runs", json={"run_id": purpose, "purpose": purpose})
        assert opened.status_code == 200, opened.text
        post(proxy, purpose, temperature=0, seed=5)
    proxy.client.post("/run/train/role/b/v1/chat/completions", json={**ASK, "temperature": 0, "seed": 5})
    sent = [{k: r.get(k) for k in ("temperature", "seed", "max_tokens")} for r in engine_app.requests]
    unchanged = {"temperature": 0, "seed": 5, "max_tokens": None}
    assert sent == [{"temperature": 0.9, "seed": None, "max_tokens": 4}, unchanged, unchanged, unchanged]
    first, other_role = calls_of(store, "train")
    assert first.requested == {"temperature": 0, "seed": 5}
    assert first.effective == {"temperature": 0.9, "max_tokens": 4}
    assert first.choices[0].flags == () and first.choices[0].finish_reason == "length"
    assert other_role.choices[0].flags == ("greedy",)


def test_an_override_is_known_after_a_restart_too(start_proxy: Callable[..., SimpleNamespace], engine_app: Any) -> None:
    first = start_proxy()
    first.client.post("/tracegrad/v1/runs", json={"run_id": "t", "purpose": "train"})
    second = start_proxy(proxy={"sampling": {"*": {"temperature": 0.5}}})
    post(second, "t", temperature=0)
    assert engine_app.requests[0]["temperature"] == 0.5


def test_tool_calls_of_a_stream_are_joined() -> None:
    from tracegrad.adapters.proxy.recorder import merge_delta

    message: dict[str, Any] = {}
    for delta in [
        {"role": "assistant", "content": ""},
        {"tool_calls": [{"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
        {"tool_calls": [{"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}], "reasoning": "be"},
        {"reasoning": "cause"},
    ]:
        merge_delta(message, delta)
    assert message == {
        "role": "assistant",
        "content": "",
        "reasoning": "because",
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_a_call_knows_its_project_and_a_digest_of_the_body_as_sent(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    proxy = start_proxy(project="shop")
    post(proxy, seed=1)
    post(proxy, seed=1)
    post(proxy, seed=2)
    first, same, other = calls_of(store)
    assert first.request_hash == same.request_hash != other.request_hash
    assert first.project == store.get_run("r").project == "shop"


def test_an_unknown_run_is_opened_by_its_first_call_and_not_before(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    """So that whoever opens it while that call runs can still say what it is for."""
    proxy = start_proxy(proxy={"sampling": {"*": {"temperature": 0.5}}})
    engine_app.gate = threading.Event()
    calling = threading.Thread(target=post, args=(proxy,))
    calling.start()
    wait_for(lambda: engine_app.in_flight, "the engine has the call")
    assert proxy.client.post("/tracegrad/v1/runs", json={"run_id": "r", "purpose": "train"}).status_code == 200
    engine_app.gate.set()
    calling.join(10)
    post(proxy, temperature=0)
    assert [call.effective.get("temperature") for call in calls_of(store)] == [None, 0.5]
