"""Requests that cannot be dispatched now: held in line, answered before their client gives up, dispatched after."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import httpx2
import openai
import pytest
from versions import go_live, next_version
from waits import wait_for

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import ProxyFailed
from tracegrad.adapters.proxy import deadlines, engines, exchange, hold
from tracegrad.adapters.proxy.courses import Caller
from tracegrad.tracestore.store import Store

ASK = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}
CHAT = "/run/{}/v1/chat/completions"


@contextmanager
def publishing(store: Store, proxy: SimpleNamespace) -> Iterator[None]:
    """A publish is under way for the body, and fails at its end."""
    publish_id = store.request_publish(next_version(store)).publish_id
    store.advance_publish(publish_id, "draining")
    wait_for(lambda: proxy.app.hold.gates["main"].holding, "the proxy holds")
    yield
    store.advance_publish(publish_id, "failed")


def ask(proxy: SimpleNamespace, run_id: str, headers: dict[str, str] | None = None, **extra: Any) -> httpx.Response:
    answer: httpx.Response = proxy.client.post(CHAT.format(run_id), json={**ASK, **extra}, headers=headers)
    return answer


class Restartable:
    """An engine that can be stopped and started again at the same address."""

    def __init__(self, fake: ModuleType) -> None:
        self._fake = fake
        self.app = fake.FakeEngine("main")
        self._server = fake.ServerThread(self.app, timeout_graceful_s=0)
        self.url: str = self._server.url
        self._server.__enter__()

    def stop(self) -> None:
        self._server.__exit__()

    def start(self) -> None:
        port = int(self.url.rpartition(":")[2])
        self._server = self._fake.ServerThread(self.app, timeout_graceful_s=0, port=port)
        self._server.__enter__()


@pytest.fixture
def engine(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restartable]:
    monkeypatch.setattr(engines, "PROBE_FIRST_S", 0.01)
    monkeypatch.setattr(engines, "PROBE_LONGEST_S", 0.02)
    restartable = Restartable(fake)
    yield restartable
    restartable.stop()


def with_engine(start_proxy: Callable[..., SimpleNamespace], *urls: str, **overrides: Any) -> SimpleNamespace:
    model = {"checkpoint": "none", "engine": {"url": urls[0]}}
    return start_proxy(models={"main": model}, **overrides)


# -- the client's deadline


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({b"x-stainless-read-timeout": b"600"}, 600.0),
        ({b"x-stainless-read-timeout": b"2.5", b"x-stainless-timeout": b"9"}, 2.5),
        ({b"x-stainless-timeout": b"30"}, 30.0),
        ({b"x-stainless-timeout": b"0"}, 0.5),
        ({b"x-stainless-read-timeout": b"soon"}, None),
        ({b"x-stainless-read-timeout": b"nan"}, None),
        ({b"x-stainless-read-timeout": b"inf"}, None),
    ],
)
def test_the_clients_own_time_out_is_read(headers: dict[bytes, bytes], seconds: float | None) -> None:
    assert deadlines.client_timeout_s(headers) == seconds


def test_patience_ends_before_the_client_leaves() -> None:
    said = {b"x-stainless-read-timeout": b"100"}
    assert deadlines.patience_s(said, stream=False, hold_timeout_s=600) == 95
    assert deadlines.patience_s(said, stream=True, hold_timeout_s=600) == 595
    assert deadlines.patience_s({b"x-stainless-read-timeout": b"1"}, stream=False, hold_timeout_s=600) == 0.8
    assert deadlines.patience_s(said, stream=False, hold_timeout_s=50) == 45
    assert [deadlines.retry_after_s(s) for s in (0.2, 7.4, 1000)] == [1, 7, 60]
    assert [deadlines.retry_after_s(8, number) for number in (0, 1, 2)] == [8, 24, 40]
    assert deadlines.beat_s({b"x-stainless-read-timeout": b"10"}, 15.0) == 5


def test_a_held_request_is_answered_503_before_its_client_gives_up(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    proxy = start_proxy()
    with publishing(store, proxy):
        began = time.monotonic()
        answer = ask(proxy, "r", {"x-stainless-read-timeout": "0.5"})
        assert 0.3 < time.monotonic() - began < 0.5
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "held")
    assert "new weights are being published" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "1"
    assert (engine_app.requests, store.list_runs(), proxy.app.hold.gates["main"].in_flight) == ([], [], 0)


def test_the_sdk_obeys_the_answer(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    proxy = start_proxy(proxy={"hold_timeout_s": 0.1})
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)
    with publishing(store, proxy), pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="main", messages=ASK["messages"])  # type: ignore[arg-type]
    assert isinstance(caught.value.response, httpx2.Response)
    assert client._should_retry(caught.value.response)
    assert client._parse_retry_after_header(caught.value.response.headers) == 1.0


def test_a_held_stream_lasts_beyond_its_clients_read_time_out(
    start_proxy: Callable[..., SimpleNamespace], store: Store, pool: ThreadPoolExecutor
) -> None:
    proxy = start_proxy()
    with publishing(store, proxy):
        held = pool.submit(ask, proxy, "r", {"x-stainless-read-timeout": "0.2"}, stream=True)
        time.sleep(0.3)
    text = held.result(10).text
    assert '"choices":[]' in text, "a heartbeat comes at half of the read time-out"
    assert text.endswith("data: [DONE]\n\n")


def test_a_stream_held_too_long_ends_in_an_error_that_the_sdk_raises(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.02)
    proxy = start_proxy(proxy={"hold_timeout_s": 0.1})
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)
    with publishing(store, proxy), pytest.raises(openai.APIError, match="has taken no calls"):
        list(client.chat.completions.create(model="main", messages=ASK["messages"], stream=True))  # type: ignore[arg-type]


def test_held_requests_go_in_the_order_of_their_arrival(
    start_proxy: Callable[..., SimpleNamespace],
    store: Store,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heartbeats do not cost a stream its place. (One being written as the gate opens may cost others a loop turn.)"""
    monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.005)
    released: list[int] = []
    enter = hold.Hold.enter

    async def noted(self: hold.Hold, model: str, caller: Caller) -> hold.Ticket:
        ticket = await enter(self, model, caller)
        released.append(caller.number)
        return ticket

    monkeypatch.setattr(hold.Hold, "enter", noted)
    proxy = start_proxy()
    futures: list[Future[httpx.Response]] = []
    with publishing(store, proxy):
        for i in range(8):
            futures.append(pool.submit(ask, proxy, f"r{i}", stream=i % 2 == 0))
            wait_for(lambda i=i: len(proxy.app.hold.gates["main"].line) > i, "it is in line")
    assert [future.result(10).status_code for future in futures] == [200] * 8
    assert released == list(range(1, 9))


# -- the engine goes and comes back


@pytest.mark.parametrize("stream", [False, True])
def test_requests_wait_for_an_engine_that_is_down(
    start_proxy: Callable[..., SimpleNamespace],
    store: Store,
    pool: ThreadPoolExecutor,
    engine: Restartable,
    stream: bool,
) -> None:
    version = go_live(store)
    proxy = with_engine(start_proxy, engine.url)
    assert ask(proxy, "before", stream=stream).status_code == 200
    engine.stop()
    held = [pool.submit(ask, proxy, f"held{i}", stream=stream) for i in range(3)]
    gate = proxy.app.hold.gates["main"]
    wait_for(lambda: len(gate.line) == 3, "they wait")
    assert gate.in_flight == 0 and not gate.holding
    report = proxy.client.get("/health")
    assert report.status_code == 503
    assert report.json()["models"]["main"]["engines"][0]["state"] == "down"
    assert "is it running?" in report.json()["models"]["main"]["engine"]
    (card,) = proxy.client.get("/v1/models").json()["data"]
    assert card["id"] == "main" and "is it running?" in card["unavailable"]
    engine.start()
    assert [future.result(10).status_code for future in held] == [200] * 3
    for i in range(3):
        (call,) = store.trace(f"held{i}").calls
        assert (call.status, call.version_dispatched, call.quarantine) == ("complete", version, None)
    assert proxy.client.get("/health").json()["models"]["main"]["engines"][0]["state"] == "up"
    assert proxy.app.upstream.pools["main"]._watchers == {}, "nobody watches an engine that is up"


def test_an_engine_that_stays_down_is_a_503_that_says_so(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    proxy = with_engine(start_proxy, "http://127.0.0.1:9", proxy={"hold_timeout_s": 0.1})
    for stream in (False, True):
        answer = ask(proxy, "r", stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "held")
        assert "http://127.0.0.1:9 cannot be reached" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
    assert store.list_runs() == [], "nothing was sent, nothing is recorded"
    with pytest.raises(ProxyFailed, match=r"HTTP 503: model main: http://127\.0\.0\.1:9 cannot be reached"):
        ProxyClient(proxy.url).health()


def test_an_engine_that_came_back_with_other_weights_gets_no_calls(
    start_proxy: Callable[..., SimpleNamespace], store: Store, pool: ThreadPoolExecutor, engine: Restartable
) -> None:
    version = go_live(store)
    engine.app.version = str(version)
    proxy = with_engine(start_proxy, engine.url)
    assert ask(proxy, "before").status_code == 200
    engine.stop()
    held = pool.submit(ask, proxy, "held")
    wait_for(lambda: proxy.app.hold.gates["main"].line, "it waits")
    engine.app.version = "default"
    engine.start()
    models = proxy.app.upstream.pools["main"]
    wait_for(lambda: models.engines[0].state == "behind", "the engine is back, with other weights")
    time.sleep(0.05)
    assert len(engine.app.requests) == 1 and not held.done()
    assert f"serves the weights 'default' while version {version} is to be served" in models.complaint
    engine.app.version = str(version)  # `tracegrad engine` has caught up
    assert held.result(10).status_code == 200
    (call,) = store.trace("held").calls
    assert (call.version_dispatched, call.version_completed) == (version, version)


def test_an_engine_restarted_unnoticed_is_asked_before_it_gets_a_call(
    start_proxy: Callable[..., SimpleNamespace],
    store: Store,
    pool: ThreadPoolExecutor,
    engine: Restartable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = go_live(store)
    proxy = with_engine(start_proxy, engine.url)
    engine.app.version = str(version)
    assert ask(proxy, "before").status_code == 200
    engine.app.version = "default"
    assert ask(proxy, "at once").status_code == 200, "no engine restarts in CONTACT_S"
    monkeypatch.setattr(engines, "CONTACT_S", 0.0)
    held = [pool.submit(ask, proxy, f"held{i}") for i in range(3)]
    wait_for(lambda: len(proxy.app.hold.gates["main"].line) == 3, "they wait")
    assert len(engine.app.requests) == 2
    engine.app.version = str(version)
    assert [future.result(10).status_code for future in held] == [200] * 3


@pytest.mark.parametrize("body", [b"", b"null", b"<html>", b"{}", b'{"weight_version":null}', b'{"weight_version":7}'])
def test_an_engine_that_does_not_tell_its_version_is_believed(body: bytes) -> None:
    assert engines._version_in(body) is None


def test_a_stale_connection_is_no_failure(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine: Restartable
) -> None:
    """The engine is restarted between two calls: the pooled connection is dead, the call is not."""
    proxy = with_engine(start_proxy, engine.url)
    for round_ in range(3):
        assert ask(proxy, "r", user=str(round_)).status_code == 200
        engine.stop()
        engine.start()
    assert [call.status for call in store.trace("r").calls] == ["complete"] * 3


def test_a_client_that_leaves_while_the_engine_is_down_is_forgotten(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine: Restartable
) -> None:
    proxy = with_engine(start_proxy, engine.url)
    engine.stop()
    with pytest.raises(httpx.ReadTimeout):
        proxy.client.post(CHAT.format("r"), json=ASK, timeout=0.1)
    gate = proxy.app.hold.gates["main"]
    wait_for(lambda: not gate.line, "it is forgotten")
    engine.start()
    assert ask(proxy, "after").status_code == 200
    assert (len(engine.app.requests), gate.in_flight) == (1, 0)
    assert [summary.run.run_id for summary in store.list_runs()] == ["after"]


def test_an_engine_that_breaks_a_call_is_watched_until_it_is_well(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine: Restartable
) -> None:
    proxy = with_engine(start_proxy, engine.url)
    engine.app.fault = "drop"
    assert ask(proxy, "broken").status_code == 503
    engine.app.fault = None
    assert ask(proxy, "next").status_code == 200, "held until the watcher has seen it well"
    assert [call.status for call in store.trace("broken").calls] == ["failed"]
    assert threading.active_count() < 100


# -- several engines of one model


@pytest.fixture
def two(fake: ModuleType, engine: Restartable) -> Iterator[tuple[Restartable, Restartable]]:
    other = Restartable(fake)
    yield engine, other
    other.stop()


def with_replicas(
    start_proxy: Callable[..., SimpleNamespace], two: tuple[Restartable, Restartable], **overrides: Any
) -> SimpleNamespace:
    model = {"checkpoint": "none", "engine": {"url": two[0].url}, "replicas": [two[1].url]}
    return start_proxy(models={"main": model}, **overrides)


def test_a_run_keeps_to_one_engine_and_runs_are_spread(
    start_proxy: Callable[..., SimpleNamespace], two: tuple[Restartable, Restartable]
) -> None:
    proxy = with_replicas(start_proxy, two)
    for i in range(12):
        for turn in range(3):
            ask(proxy, f"r{i}", user=f"{i}", seed=turn)
    users = [[request["user"] for request in each.app.requests] for each in two]
    assert all(users) and set(users[0]).isdisjoint(users[1])
    assert sorted(users[0] + users[1]) == sorted([f"{i}" for i in range(12)] * 3)


def test_without_a_run_the_engine_with_the_least_to_do_is_taken(
    start_proxy: Callable[..., SimpleNamespace], pool: ThreadPoolExecutor, two: tuple[Restartable, Restartable]
) -> None:
    proxy = with_replicas(start_proxy, two)
    gate = threading.Event()
    for each in two:
        each.app.gate = gate
    futures = [pool.submit(proxy.client.post, "/v1/chat/completions", json=ASK) for _ in range(6)]
    wait_for(lambda: sum(each.app.in_flight for each in two) == 6, "all are with the engines")
    assert [each.app.in_flight for each in two] == [3, 3]
    assert [each["in_flight"] for each in proxy.client.get("/health").json()["models"]["main"]["engines"]] == [3, 3]
    gate.set()
    assert [future.result(10).status_code for future in futures] == [200] * 6


def test_when_one_engine_goes_the_other_takes_its_runs(
    start_proxy: Callable[..., SimpleNamespace], store: Store, two: tuple[Restartable, Restartable]
) -> None:
    proxy = with_replicas(start_proxy, two)
    two[1].stop()
    assert {ask(proxy, f"r{i}").status_code for i in range(8)} == {200}
    assert len(two[0].app.requests) == 8
    health = proxy.client.get("/health")
    states = [each["state"] for each in health.json()["models"]["main"]["engines"]]
    assert (health.status_code, states) == (503, ["up", "down"])
    assert two[1].url in health.json()["models"]["main"]["engine"]
    two[1].start()
    wait_for(lambda: proxy.app.upstream.pools["main"].complaint == "", "the other is back")
    for i in range(8):
        ask(proxy, f"r{i}")
    assert two[1].app.requests, "runs go back to their engine"
    assert [call.status for i in range(8) for call in store.trace(f"r{i}").calls] == ["complete"] * 16


def test_a_publish_drains_every_engine(
    start_proxy: Callable[..., SimpleNamespace],
    store: Store,
    pool: ThreadPoolExecutor,
    two: tuple[Restartable, Restartable],
) -> None:
    proxy = with_replicas(start_proxy, two)
    gates = [threading.Event(), threading.Event()]
    for each, gate in zip(two, gates, strict=True):
        each.app.gate = gate
    futures = [pool.submit(proxy.client.post, "/v1/chat/completions", json=ASK) for _ in range(2)]
    wait_for(lambda: [each.app.in_flight for each in two] == [1, 1], "one call is with each engine")
    publish_id = store.request_publish(next_version(store)).publish_id
    store.advance_publish(publish_id, "draining")
    gates[0].set()
    wait_for(lambda: proxy.app.hold.gates["main"].in_flight == 1, "one has finished")
    time.sleep(0.05)
    assert store.waiting_proxies(publish_id, 10) == [proxy.app.proxy_id]
    gates[1].set()
    wait_for(lambda: not store.waiting_proxies(publish_id, 10), "both have finished")
    store.advance_publish(publish_id, "failed")
    assert [future.result(10).status_code for future in futures] == [200] * 2
