"""A retry of the SDK is no second row where the first attempt can still answer, and says what it repeats elsewhere."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from conversations import calls_of
from waits import wait_for

from tracegrad.adapters.proxy import chat, exchange, retries
from tracegrad.tracestore.store import Store

ASK = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}


def ask(proxy: SimpleNamespace, retry: int | None, run_id: str = "r", *, timeout: float = 20, **extra: Any) -> Any:
    headers = {} if retry is None else {"x-stainless-retry-count": str(retry)}
    headers |= extra.pop("headers", {})
    path = "/v1/chat/completions" if run_id == "" else f"/run/{run_id}/v1/chat/completions"
    return proxy.client.post(path, json={**ASK, **extra}, headers=headers, timeout=timeout)


def called(answer: httpx.Response) -> str:
    return answer.headers["x-tracegrad-call"]


@pytest.fixture
def gate(engine_app: Any) -> Iterator[threading.Event]:
    """The engine stops before the end of each answer until this is set."""
    engine_app.gate = event = threading.Event()
    yield event
    event.set()


def joined(proxy: SimpleNamespace) -> int:
    return sum(attempt.claimed for listed in proxy.app.answer.attempts._by_key.values() for attempt in listed)


# -- one process: joined or answered again


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("run_id", ["r", ""])
def test_a_retry_joins_the_attempt_that_is_still_with_the_engine(
    *,
    proxy: SimpleNamespace,
    store: Store,
    engine_app: Any,
    pool: ThreadPoolExecutor,
    gate: threading.Event,
    stream: bool,
    run_id: str,
) -> None:
    first = pool.submit(ask, proxy, 0, run_id, stream=stream)
    wait_for(lambda: engine_app.in_flight == 1, "the first attempt is with the engine")
    second = pool.submit(ask, proxy, 1, run_id, stream=stream)
    wait_for(lambda: joined(proxy), "the retry waits for it")
    gate.set()
    answers = first.result(10), second.result(10)
    assert answers[0].content == answers[1].content and answers[0].status_code == answers[1].status_code == 200
    assert called(answers[0]) == called(answers[1])
    assert len(engine_app.requests) == 1
    if run_id:
        assert [call.status for call in calls_of(store)] == ["complete"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_of_an_answered_call_gets_the_same_bytes(
    proxy: SimpleNamespace, store: Store, engine_app: Any, stream: bool
) -> None:
    answers = [ask(proxy, number, stream=stream) for number in (0, 1, 2)]
    assert len({answer.content for answer in answers}) == len({called(answer) for answer in answers}) == 1
    assert len({tuple(sorted(answer.headers.items())) for answer in answers}) == 1
    assert (len(engine_app.requests), len(calls_of(store))) == (1, 1)


def test_a_reply_that_is_sent_again_counts_with_its_status(proxy: SimpleNamespace) -> None:
    for number in (0, 1):
        assert ask(proxy, number).status_code == 200
    page = proxy.client.get("/metrics").text
    answers = [line for line in page.splitlines() if line.startswith("tracegrad_http_answers_total{")]
    assert [line.split("{")[1] for line in answers if "chat" in line] == [
        'code="200",path="/v1/chat/completions",worker="0"} 2.0'
    ]


def test_a_joined_stream_is_kept_alive(
    proxy: SimpleNamespace,
    engine_app: Any,
    pool: ThreadPoolExecutor,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.02)
    first = pool.submit(ask, proxy, 0, stream=True)
    wait_for(lambda: engine_app.in_flight == 1, "the first attempt is with the engine")
    second = pool.submit(ask, proxy, 1, stream=True)
    time.sleep(0.1)
    gate.set()
    text = second.result(10).text
    assert text.count('"choices":[]') >= 2 and text.endswith(first.result(10).text)


@pytest.mark.parametrize("answered", [False, True])
def test_equal_calls_side_by_side_stay_as_many_rows_when_each_is_retried(
    *,
    proxy: SimpleNamespace,
    store: Store,
    engine_app: Any,
    pool: ThreadPoolExecutor,
    gate: threading.Event,
    answered: bool,
) -> None:
    firsts = [pool.submit(ask, proxy, 0) for _ in range(4)]
    wait_for(lambda: engine_app.in_flight == 4, "all are with the engine")
    if answered:
        gate.set()
        [first.result(10) for first in firsts]
    again = [pool.submit(ask, proxy, 1) for _ in range(4)]
    if not answered:
        wait_for(lambda: joined(proxy) == 4, "each retry found its own")
        gate.set()
    ids = {called(first.result(10)) for first in firsts}
    assert len(ids) == 4 and {called(second.result(10)) for second in again} == ids
    assert len(engine_app.requests) == 4
    assert {call.call_id for call in calls_of(store)} == ids
    assert [call.retry_of for call in calls_of(store)] == [None] * 4


@pytest.mark.parametrize(
    "other",
    [
        {"run_id": "other"},
        {"retry": 0},
        {"retry": None},
        {"user": "somebody else"},
        {"headers": {"x-tracegrad-role": "other"}},
    ],
)
def test_what_differs_is_no_retry(proxy: SimpleNamespace, engine_app: Any, other: dict[str, Any]) -> None:
    first = ask(proxy, 0)
    second = ask(proxy, **{"retry": 1, **other})
    assert called(first) != called(second) and len(engine_app.requests) == 2


@pytest.mark.parametrize("run_id", ["r", ""])
def test_another_key_is_another_client(proxy: SimpleNamespace, engine_app: Any, run_id: str) -> None:
    for number, key in ((0, "a"), (1, "b")):
        ask(proxy, number, run_id, headers={"authorization": f"Bearer {key}"})
    assert len(engine_app.requests) == 2


def test_a_client_that_does_not_count_is_never_joined(proxy: SimpleNamespace, engine_app: Any) -> None:
    ask(proxy, None)
    ask(proxy, None)
    assert len(engine_app.requests) == 2
    assert not proxy.app.answer.attempts._by_key


# -- the client leaves


def hang_up(proxy: SimpleNamespace, engine_app: Any, **extra: Any) -> None:
    """Ask, and leave once the request is with the engine."""
    before = len(engine_app.requests)
    with socket_of(proxy) as client:
        client.send(request_bytes(proxy, **extra))
        wait_for(lambda: len(engine_app.requests) > before, "the request is with the engine")
        if extra.get("stream") and engine_app.gate_at == "end":
            seen = b""
            while b'"content":"o"' not in seen:
                seen += client.recv(65536)


def socket_of(proxy: SimpleNamespace) -> Any:

    host, port = proxy.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def request_bytes(proxy: SimpleNamespace, **extra: Any) -> bytes:
    headers = {"x-stainless-retry-count": "0"}
    asked = proxy.client.build_request("POST", "/run/r/v1/chat/completions", json={**ASK, **extra}, headers=headers)
    lines = [b"POST /run/r/v1/chat/completions HTTP/1.1", *(b": ".join(pair) for pair in asked.headers.raw)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + asked.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("window", ["headers", "body", "end"])
def test_a_client_that_leaves_stops_the_engine_and_its_retry_is_a_call_of_its_own(
    *, proxy: SimpleNamespace, store: Store, engine_app: Any, gate: threading.Event, stream: bool, window: str
) -> None:
    """Before the headers, before the first chunk, and in the middle of a stream."""
    engine_app.gate_at = window
    hang_up(proxy, engine_app, stream=stream)
    wait_for(lambda: engine_app.cancelled == 1, "the engine noticed")
    wait_for(store.list_runs, "the call was stored")
    gate.set()
    again = ask(proxy, 1, stream=stream)
    aborted, complete = calls_of(store)
    assert (aborted.status, complete.status) == ("aborted", "complete")
    sampled = len("0: hello") if stream and window == "end" else 0
    assert sum(len(choice.token_ids) for choice in aborted.choices) == sampled
    assert (aborted.retry_of, complete.retry_of, complete.call_id) == (None, aborted.call_id, called(again))
    assert aborted.request_hash == complete.request_hash
    assert proxy.app.hold.gates["main"].in_flight == 0
    engine = proxy.app.upstream.pools["main"].engines[0]
    wait_for(lambda: engine.in_flight == 0, "the engine's answer is put down, which is after the client has it")


@pytest.mark.parametrize("stream", [False, True])
def test_a_joined_attempt_goes_on_without_its_first_client(
    *,
    proxy: SimpleNamespace,
    store: Store,
    engine_app: Any,
    pool: ThreadPoolExecutor,
    gate: threading.Event,
    stream: bool,
) -> None:
    with socket_of(proxy) as client:
        client.send(request_bytes(proxy, stream=stream))
        wait_for(lambda: engine_app.in_flight == 1, "the first attempt is with the engine")
        second = pool.submit(ask, proxy, 1, stream=stream)
        wait_for(lambda: joined(proxy), "the retry waits for it")
    (attempt,) = proxy.app.answer.attempts._by_key[next(iter(proxy.app.answer.attempts._by_key))]
    wait_for(lambda: attempt.depart is not None, "the proxy has noticed that the first client left")
    gate.set()
    answer = second.result(10)
    assert answer.status_code == 200 and "hello"[-1] in answer.text
    (call,) = calls_of(store)
    assert (call.status, call.call_id, engine_app.cancelled) == ("complete", called(answer), 0)


def test_when_the_retry_leaves_as_well_the_engine_is_stopped(
    proxy: SimpleNamespace, store: Store, engine_app: Any, pool: ThreadPoolExecutor, gate: threading.Event
) -> None:
    with socket_of(proxy) as client:
        client.send(request_bytes(proxy))
        wait_for(lambda: engine_app.in_flight == 1, "the first attempt is with the engine")
        second = pool.submit(ask, proxy, 1, timeout=0.3)
        wait_for(lambda: joined(proxy), "the retry waits for it")
    with pytest.raises(httpx.ReadTimeout):
        second.result(10)
    wait_for(lambda: engine_app.cancelled == 1, "the engine is stopped")
    wait_for(store.list_runs, "the call was stored")
    gate.set()
    third = ask(proxy, 2)
    aborted, complete = calls_of(store)
    assert (aborted.status, complete.retry_of, complete.call_id) == ("aborted", aborted.call_id, called(third))


# -- attempts that failed


def test_a_failed_attempt_is_not_sent_again_but_named(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    """The real SDK: it sees 503, waits for `retry-after` and asks again."""
    engine_app.fault = "drop"
    slept: list[float] = []
    client = openai.OpenAI(base_url=f"{proxy.url}/run/r/v1", api_key="none", max_retries=2)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        engine_app.fault = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openai._base_client.time.sleep", sleep)
        done = client.chat.completions.create(model="main", messages=ASK["messages"])  # type: ignore[arg-type]
    assert done.choices[0].message.content == "0: hello"
    failed, complete = calls_of(store)
    assert (failed.status, complete.status, complete.retry_of) == ("failed", "complete", failed.call_id)
    assert slept == [1.0]


def test_a_retry_of_a_retry_names_the_last_one(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    engine_app.fault = "drop"
    ask(proxy, 0)
    ask(proxy, 1)
    engine_app.fault = None
    ask(proxy, 2)
    first, second, third = calls_of(store)
    assert [call.retry_of for call in (first, second, third)] == [None, first.call_id, second.call_id]


def test_a_request_that_was_never_dispatched_is_no_first_attempt(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_url: str
) -> None:
    proxy = start_proxy(proxy={"hold_timeout_s": 0.05})
    engine = proxy.app.upstream.pools["main"].engines[0]
    engine.state = "down"
    assert ask(proxy, 0).status_code == 503
    engine.state = "up"
    assert ask(proxy, 1).status_code == 200
    (call,) = calls_of(store)
    assert call.retry_of is None


# -- several processes, and bounds


@pytest.mark.parametrize("run_id", ["r", ""])
def test_a_retry_through_another_process_names_its_first_attempt(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, run_id: str
) -> None:
    one, other = start_proxy(), start_proxy()
    firsts = [called(ask(one, 0, run_id)) for _ in range(2)]
    again = [ask(other, 1, run_id) for _ in range(3)]
    assert len(engine_app.requests) == 5, "nothing is in the memory of the other one"
    named = [store.get_call(called(answer)).retry_of for answer in again]
    assert named == [firsts[1], firsts[0], None], "each is named once"
    assert store.get_call(called(ask(other, 1, run_id, user="x"))).retry_of is None


def test_a_retry_without_a_run_names_no_call_that_cannot_be_its_own(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one of another project, nor one with a run, one of another client of this process, or one too old."""
    one, other = start_proxy(), start_proxy()
    keys = {project: store.create_key(scopes=("call",), project=project)[0] for project in ("default", "theirs")}
    theirs = {"headers": {"x-api-key": keys["theirs"]}}
    first = called(ask(one, 0, "", **theirs))
    ask(one, 0, "r")
    ask(other, 0, "", headers={"x-api-key": keys["default"]})
    assert store.get_call(called(ask(other, 1, ""))).retry_of is None
    assert store.get_call(called(ask(other, 1, "", **theirs))).retry_of == first
    monkeypatch.setattr(chat, "STORE_WINDOW_S", -1.0)
    ask(one, 0, "", user="late")
    assert store.get_call(called(ask(other, 1, "", user="late"))).retry_of is None


def test_the_real_sdks_retry_without_a_run_is_marked_across_processes(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    """The first attempt fails at one process; the SDK sends it again, and the retry reaches the other."""
    one, other = start_proxy(), start_proxy()

    def to_the_other(request: Any) -> None:
        if request.headers.get("x-stainless-retry-count") == "1":
            engine_app.fault = None
            request.url = request.url.copy_with(port=int(other.url.rsplit(":", 1)[1]))

    engine_app.fault = "drop"
    http = openai.DefaultHttpxClient(event_hooks={"request": [to_the_other]})
    client = openai.OpenAI(base_url=one.url + "/v1", api_key="x", max_retries=2, http_client=http)
    answer = client.chat.completions.with_raw_response.create(model="main", messages=ASK["messages"])  # type: ignore[call-overload]
    again = store.get_call(answer.headers["x-tracegrad-call"])
    assert (again.status, again.attribution.run_id) == ("complete", None)
    assert again.retry_of is not None and store.get_call(again.retry_of).status == "failed"


def test_what_is_kept_is_bounded(start_proxy: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = start_proxy()
    attempts = proxy.app.answer.attempts
    ask(proxy, 0, user="first")
    wait_for(lambda: attempts._bytes > 300, "the first attempt is over, after its reply")
    kept = attempts._bytes
    monkeypatch.setattr(retries, "KEEP_BYTES", 2 * kept + 100)
    for i in range(5):
        ask(proxy, 0, user=f"{i:05}")
    wait_for(lambda: len(attempts._ended) == len(attempts._by_key) == 2, "the last attempt is over, after its reply")
    assert attempts._bytes <= 2 * kept + 100
    monkeypatch.setattr(retries, "KEEP_S", 0.0)
    ask(proxy, 0, user="last")
    wait_for(lambda: len(attempts._by_key) <= 1, "it is over, and the older ones are forgotten")
