"""Law 8: a publish holds new calls, waits for the old ones, is acknowledged, and every call knows its versions."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from versions import go_live, next_version
from waits import wait_for

from tracegrad.adapters.proxy import exchange
from tracegrad.tracestore.errors import StoreUnavailable
from tracegrad.tracestore.store import Store

ASK = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}


def ask(proxy: SimpleNamespace, run_id: str, **extra: Any) -> httpx.Response:
    answer: httpx.Response = proxy.client.post(f"/run/{run_id}/v1/chat/completions", json={**ASK, **extra})
    return answer


def test_a_publish_under_way_holds_drains_acknowledges_and_releases(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, pool: ThreadPoolExecutor
) -> None:
    old = go_live(store)
    proxy = start_proxy()
    engine_app.gate = threading.Event()
    before: Future[httpx.Response] = pool.submit(ask, proxy, "before", stream=True)
    wait_for(lambda: engine_app.in_flight == 1, "the first call is with the engine")

    new = next_version(store)
    publish_id = store.request_publish(new).publish_id
    time.sleep(0.05)
    assert proxy.client.get("/health").json()["models"]["main"]["holding"] is False, "requested does not hold yet"
    store.advance_publish(publish_id, "draining")
    wait_for(lambda: proxy.app.hold.gates["main"].holding, "the proxy holds")
    during = pool.submit(ask, proxy, "during")
    time.sleep(0.1)
    assert len(engine_app.requests) == 1, "a held call must not reach the engine"
    assert store.waiting_proxies(publish_id, 10) == [proxy.app.proxy_id], "not acknowledged while a call is in flight"

    engine_app.gate.set()
    engine_app.gate = None
    assert before.result(10).status_code == 200
    wait_for(lambda: not store.waiting_proxies(publish_id, 10), "the publish is acknowledged")
    store.advance_publish(publish_id, "swapping")
    time.sleep(0.05)
    assert len(engine_app.requests) == 1
    store.advance_publish(publish_id, "live")
    assert during.result(10).status_code == 200

    for run_id, version in (("before", old), ("during", new)):
        (call,) = store.trace(run_id).calls
        assert (call.version_dispatched, call.version_completed, call.quarantine) == (version, version, None), run_id


def test_a_failed_publish_releases_under_the_old_version(
    start_proxy: Callable[..., SimpleNamespace], store: Store, pool: ThreadPoolExecutor
) -> None:
    old = go_live(store)
    proxy = start_proxy()
    publish_id = store.request_publish(next_version(store)).publish_id
    store.advance_publish(publish_id, "draining")
    wait_for(lambda: not store.waiting_proxies(publish_id, 10), "an idle proxy acknowledges at once")
    held = pool.submit(ask, proxy, "held")
    time.sleep(0.05)
    assert not held.done()
    store.advance_publish(publish_id, "failed", error="the probe said no")
    assert held.result(10).status_code == 200
    (call,) = store.trace("held").calls
    assert (call.version_dispatched, call.version_completed, call.quarantine) == (old, old, None)


@pytest.mark.parametrize("seen", ["swapping", "live"])
def test_a_swap_that_did_not_wait_for_us_quarantines_what_was_in_flight(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, pool: ThreadPoolExecutor, seen: str
) -> None:
    go_live(store)
    proxy = start_proxy()
    engine_app.gate = threading.Event()
    spanning = pool.submit(ask, proxy, "spanning")
    wait_for(lambda: engine_app.in_flight == 1, "the call is with the engine")
    publish_id = store.request_publish(next_version(store)).publish_id
    store.advance_publish(publish_id, "draining")
    store.advance_publish(publish_id, "swapping")
    if seen == "live":
        store.advance_publish(publish_id, "live")
    gate = proxy.app.hold.gates["main"]
    wait_for(lambda: (gate.view.publish_id, gate.view.state) == (publish_id, seen), "the proxy sees it")
    engine_app.gate.set()
    engine_app.gate = None
    assert spanning.result(10).status_code == 200, "the app is answered all the same"
    (call,) = store.trace("spanning").calls
    assert (call.status, call.quarantine) == ("complete", "version changed")


def test_without_any_publish_the_version_is_unknown(proxy: SimpleNamespace, store: Store) -> None:
    ask(proxy, "r")
    (call,) = store.trace("r").calls
    assert (call.version_dispatched, call.version_completed, call.quarantine) == (None, None, None)


def test_a_held_stream_is_kept_alive_with_empty_chunks(
    start_proxy: Callable[..., SimpleNamespace],
    store: Store,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.05)
    proxy = start_proxy()
    publish_id = store.request_publish(next_version(store)).publish_id
    store.advance_publish(publish_id, "draining")
    wait_for(lambda: proxy.app.hold.gates["main"].holding, "the proxy holds")
    streamed = pool.submit(ask, proxy, "stream", stream=True, model="alias")
    refused = pool.submit(ask, proxy, "refused", stream=True, tools=[])
    time.sleep(0.2)
    store.advance_publish(publish_id, "swapping")
    store.advance_publish(publish_id, "live")
    text = streamed.result(10).text
    assert 2 <= text.count('"model":"alias","choices":[]}') <= 6
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"stop"' in text
    late = refused.result(10)
    assert late.status_code == 200, "the heartbeats had gone out"
    assert late.text.rstrip().splitlines()[-1].startswith('data: {"error":{"message":"`tools` must not be empty'[:30])


def test_a_client_that_leaves_while_held_is_forgotten(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    proxy = start_proxy()
    publish_id = store.request_publish(next_version(store)).publish_id
    store.advance_publish(publish_id, "draining")
    wait_for(lambda: proxy.app.hold.gates["main"].holding, "the proxy holds")
    with pytest.raises(httpx.ReadTimeout):
        proxy.client.post("/v1/chat/completions", json=ASK, timeout=0.1)
    store.advance_publish(publish_id, "failed")
    wait_for(lambda: not proxy.app.hold.gates["main"].holding, "the proxy goes on")
    time.sleep(0.05)
    assert (engine_app.requests, proxy.app.hold.gates["main"].in_flight) == ([], 0)


class DarkStore:
    """A store whose polling side can be cut off; its row may be taken away meanwhile."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.dark = False
        self.order: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in ("publish_view", "beat_proxy", "register_proxy"):
            return method

        def polled(*arguments: Any) -> Any:
            if self.dark:
                raise StoreUnavailable("the network is gone")
            self.order.append(name)
            return method(*arguments)

        return polled


def test_the_row_is_registered_before_the_state_is_read(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    dark = DarkStore(store)
    start_proxy(store_object=dark)
    assert dark.order[:2] == ["register_proxy", "publish_view"]


def test_a_proxy_out_of_touch_dispatches_nothing_and_reads_again_first(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    """Half of the heartbeat's life is the fence: within it nobody can have counted us as dead."""
    go_live(store)
    dark = DarkStore(store)
    proxy = start_proxy(store_object=dark, proxy={"heartbeat_expires_s": 0.4})
    assert ask(proxy, "before").status_code == 200
    dark.dark = True
    time.sleep(0.3)
    refused = ask(proxy, "refused")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert len(engine_app.requests) == 1, "nothing may be dispatched"
    store.remove_proxy(proxy.app.proxy_id)
    new = go_live(store)
    dark.dark = False
    dark.order.clear()
    assert ask(proxy, "after").status_code == 200
    assert dark.order[:2] == ["register_proxy", "publish_view"]
    (call,) = store.trace("after").calls
    assert call.version_dispatched == new


def test_a_call_that_outlived_our_heartbeat_is_checked_against_the_store(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, pool: ThreadPoolExecutor
) -> None:
    old = go_live(store)
    dark = DarkStore(store)
    proxy = start_proxy(store_object=dark, proxy={"heartbeat_expires_s": 0.4, "poll_s": 30})
    engine_app.gate = threading.Event()
    spanning = pool.submit(ask, proxy, "spanning")
    wait_for(lambda: engine_app.in_flight == 1, "the call is with the engine")
    time.sleep(0.3)  # the next poll is 30 s away: we are out of touch, as after a suspended machine
    new = go_live(store)
    engine_app.gate.set()
    engine_app.gate = None
    assert spanning.result(10).status_code == 200
    (call,) = store.trace("spanning").calls
    assert (call.version_dispatched, call.version_completed, call.quarantine) == (old, new, "version changed")


def test_a_proxy_that_stops_takes_its_row_away(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    proxy = start_proxy()
    publish_id = store.request_publish(next_version(store)).publish_id
    proxy.server.server.should_exit = True
    proxy.server._thread.join(10)
    store.advance_publish(publish_id, "draining")
    assert store.waiting_proxies(publish_id, 100) == []
