"""Calls that go on while weights are exchanged: every token knows its version, or the call is quarantined."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_swaps import save_answers
from versions import add_version
from waits import wait_for

from tracegrad.adapters.proxy import engines, hold
from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishFailed
from tracegrad.trainer.publish import Publisher

ASK = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}
IN_FLIGHT = {"trainer": {"publish": {"mode": "in_flight"}}}
WAYS: dict[str, dict[str, Any]] = {
    "chat": {},
    "chat stream": {"stream": True},
    "two choices": {"stream": True, "n": 2},
    "completion stream": {"stream": True, "prompt": "hello"},
}


class House:
    """A proxy, an engine in development mode that holds each call before its last token, and a real publisher."""

    def __init__(
        self, start: Callable[..., SimpleNamespace], store: Store, engine: Any, url: str, folder: Path
    ) -> None:
        engine.version = "default"
        self.store, self.engine, self.folder = store, engine, folder
        client, settings = EngineClient(url, "main", timeout_s=5), PublishConfig(mode="in_flight", drain_timeout_s=5)
        self.publisher = Publisher(store, "main", [client], settings)
        self.versions: list[int] = []
        self.publish("old weights")
        self.proxy = start(**IN_FLIGHT)

    def version(self, answer: str) -> int:
        live = self.store.live_version("main")
        path = save_answers(self.folder / answer, answer)
        parent_id = None if live is None else live.version_id
        step = len(self.versions)
        return add_version(self.store, path, step, model="main", kind="step", parent_id=parent_id).version_id

    def publish(self, answer: str) -> int:
        self.versions.append(self.version(answer))
        self.publisher.publish(self.versions[-1])
        return self.versions[-1]

    def ask(self, run_id: str, **extra: Any) -> httpx.Response:
        path = "completions" if "prompt" in extra else "chat/completions"
        body = {"model": "main", **extra} if "prompt" in extra else {**ASK, **extra}
        answer: httpx.Response = self.proxy.client.post(f"/run/{run_id}/v1/{path}", json=body)
        return answer

    def call(self, run_id: str) -> Call:
        (call,) = self.store.trace(run_id).calls
        return call


@pytest.fixture
def house(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, engine_url: str, tmp_path: Path
) -> House:
    return House(start_proxy, store, engine_app, engine_url, tmp_path)


def under_way(house: House, pool: ThreadPoolExecutor, ways: dict[str, dict[str, Any]]) -> dict[str, Future[Any]]:
    house.engine.gate = threading.Event()
    asked = {name: pool.submit(house.ask, name.replace(" ", "-"), **extra) for name, extra in ways.items()}
    wait_for(lambda: house.engine.at_gate == len(ways), "the calls are where the engine holds them")
    return asked


def release(house: House) -> None:
    house.engine.gate.set()
    house.engine.gate = None


def test_calls_go_on_through_a_publish_and_every_token_knows_its_version(
    house: House, pool: ThreadPoolExecutor
) -> None:
    asked = under_way(house, pool, WAYS)
    (old,) = house.versions
    new = house.publish("new weights")  # nothing was waited for: all calls are still there
    assert house.engine.in_flight == len(WAYS) and house.engine.swapped_under_calls == 0
    last = house.store.last_publish("main")
    assert last is not None and last.in_flight and last.state == "live"
    release(house)
    for name, future in asked.items():
        answer = future.result(10)
        assert answer.status_code == 200
        assert "x-tracegrad-versions" not in answer.headers and "tracegrad-versions" not in answer.text
        call = house.call(name.replace(" ", "-"))
        assert (call.quarantine, call.version_dispatched, call.version_completed) == (None, old, new), name
        for choice in call.choices:
            ends = len(choice.token_ids) - 1 if "stream" in WAYS[name] else 1  # where the fake's gate stands
            assert choice.version_spans == ((0, old), (ends, new)), name
    house.ask("after")
    after = house.call("after")
    assert (after.version_dispatched, after.version_completed, after.choices[0].version_spans) == (new, new, ())
    assert all(headers["x-tracegrad-versions"] == "1" for headers in house.engine.headers)


def test_what_weights_sampled_that_did_not_go_live_is_quarantined(
    house: House, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on with them until the probe refuses them; a call that ends before waits for that."""
    asked = under_way(house, pool, {"ends before": {"stream": True}, "ends after": {"stream": True}})
    gates, began = house.proxy.app.hold.gates["main"], house.engine.gate
    fleet = house.publisher.fleet
    serve = fleet.serve

    def probed(version: Any, *, in_flight: bool = False) -> None:
        serve(version, in_flight=in_flight)
        if version.version_id not in house.versions:
            began.set()  # both calls end under the new weights
            wait_for(lambda: house.engine.in_flight == 0, "the engine has finished them")
            assert not any(future.done() for future in asked.values()), "recorded before anybody knew"
            raise PublishFailed("the probe says no")

    monkeypatch.setattr(fleet, "serve", probed)
    with pytest.raises(PublishFailed, match=f"the probe says no.*version {house.versions[0]} is back"):
        house.publisher.publish(house.version("bad weights"))
    house.engine.gate = None
    for name, future in asked.items():
        assert future.result(10).status_code == 200
        call = house.call(name.replace(" ", "-"))
        assert (call.quarantine, call.choices[0].version_spans) == ("version changed", ())
    assert gates.live_version == house.versions[0]
    assert (house.engine.version, house.engine.paused) == (str(house.versions[0]), False)


def test_a_call_that_spans_a_failed_swap_and_back_is_quarantined(house: House, pool: ThreadPoolExecutor) -> None:
    """All of its tokens may be of the old weights by their marks: nobody proved those of the time between."""
    asked = under_way(house, pool, {"call": {"stream": True}})
    publish_id = house.store.request_publish(house.version("other"), in_flight=True).publish_id
    house.store.advance_publish(publish_id, "draining")
    wait_for(lambda: not house.store.waiting_proxies(publish_id, 10), "acknowledged with a call in flight")
    house.store.advance_publish(publish_id, "swapping")
    gate = house.proxy.app.hold.gates["main"]
    wait_for(lambda: gate.view.state == "swapping", "the proxy sees it")
    house.store.advance_publish(publish_id, "failed")
    wait_for(lambda: gate.view.state == "failed", "the proxy sees it")
    release(house)
    assert asked["call"].result(10).status_code == 200
    assert house.call("call").quarantine == "version changed"


def test_a_call_the_engine_tells_nothing_of_is_quarantined(house: House, pool: ThreadPoolExecutor) -> None:
    house.engine.tells_versions = False
    asked = under_way(house, pool, {"call": {"stream": True}})
    house.publish("new weights")
    release(house)
    assert asked["call"].result(10).status_code == 200
    assert house.call("call").quarantine == "version changed"


def test_a_publisher_that_dies_lets_the_call_end_in_quarantine_and_the_next_start_resumes(
    house: House, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "SETTLES_S", 0.3)
    asked = under_way(house, pool, {"call": {"stream": True}})
    lost = house.version("lost")
    publish_id = house.store.request_publish(lost, in_flight=True).publish_id
    for state in ("draining", "swapping"):
        house.store.advance_publish(publish_id, state)  # type: ignore[arg-type]
    (client,) = house.publisher.fleet
    client.pause()
    client.set_version(str(lost))
    client.resume()
    release(house)
    assert asked["call"].result(10).status_code == 200
    assert house.call("call").quarantine == "version changed"
    client.pause()  # it died while the engine stood still
    ended = house.publisher.recover()
    assert ended is not None and ended.state == "failed"
    assert (house.engine.version, house.engine.paused) == (str(house.versions[0]), False)
    assert house.ask("after").status_code == 200


def test_a_proxy_that_does_not_ask_drains(
    start_proxy: Callable[..., SimpleNamespace], house: House, pool: ThreadPoolExecutor
) -> None:
    """Its configuration says so; the publisher's says otherwise: it is waited for, as ever."""
    house.proxy.server.server.should_exit = True
    house.proxy.server._thread.join(10)
    house.proxy = start_proxy()
    asked = under_way(house, pool, {"call": {}})
    publish_id = house.store.request_publish(house.version("other"), in_flight=True).publish_id
    house.store.advance_publish(publish_id, "draining")
    wait_for(lambda: house.proxy.app.hold.gates["main"].holding, "the proxy holds")
    assert house.store.waiting_proxies(publish_id, 10)
    release(house)
    assert asked["call"].result(10).status_code == 200
    wait_for(lambda: not house.store.waiting_proxies(publish_id, 10), "the drain is acknowledged")


def swapping(house: House, *, in_flight: bool) -> tuple[int, int]:
    """Bring a publish to where the engine serves other weights and nobody has said `live`; return publish, version."""
    version = house.version("other")
    publish_id = house.store.request_publish(version, in_flight=in_flight).publish_id
    house.store.advance_publish(publish_id, "draining")
    wait_for(lambda: not house.store.waiting_proxies(publish_id, 10), "acknowledged")
    house.engine.version = str(version)
    return publish_id, version


@pytest.mark.parametrize("in_flight", [True, False], ids=["in flight", "drain"])
def test_an_engine_that_is_being_swapped_is_not_behind(
    start_proxy: Callable[..., SimpleNamespace], house: House, in_flight: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asks for its health in the middle; what it says once the publish is over counts again."""
    proxy = house.proxy if in_flight else start_proxy()
    engine = proxy.app.upstream.pools["main"].engines[0]
    with caplog.at_level(logging.WARNING, "tracegrad.proxy"):
        publish_id, _ = swapping(house, in_flight=in_flight)
        for state in (None, "swapping"):
            if state is not None:
                house.store.advance_publish(publish_id, state)  # type: ignore[arg-type]
            answer = proxy.client.get("/health")
            assert (answer.status_code, engine.state) == (200, "up"), answer.text
        assert not caplog.messages
        house.store.advance_publish(publish_id, "failed")  # and nobody put the old weights back
        wait_for(lambda: not proxy.app.hold.gates["main"].holding, "the proxy sees it")
        assert proxy.client.get("/health").status_code == 503
    assert "is behind: serves the weights" in caplog.text


def test_a_call_that_asks_the_engine_as_a_publish_begins_waits_for_its_end(
    house: House, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It had passed the gate, the proxy acknowledged without it being at the engine, and the engine was swapped."""
    monkeypatch.setattr(engines, "CONTACT_S", 0.0)
    models = house.proxy.app.upstream.pools["main"]
    compare, begun = models._compare, []

    async def too_late(*asked: Any) -> Any:
        if not begun:
            begun.append(await asyncio.to_thread(swapping, house, in_flight=True))
        return await compare(*asked)

    monkeypatch.setattr(models, "_compare", too_late)
    asked = pool.submit(house.ask, "call")
    gate = house.proxy.app.hold.gates["main"]
    wait_for(lambda: gate.line, "it waits in line")
    assert models.engines[0].state == "up" and gate.in_flight == 0 and not caplog.messages
    ((publish_id, version),) = begun
    for state in ("swapping", "live"):
        house.store.advance_publish(publish_id, state)  # type: ignore[arg-type]
    assert asked.result(10).status_code == 200
    call = house.call("call")
    assert (call.quarantine, call.version_dispatched, call.version_completed) == (None, version, version)
