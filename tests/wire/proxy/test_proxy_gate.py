"""While a candidate is judged: who is dispatched to it, who waits, and that every call knows its version (law 8)."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from versions import go_live, next_version
from waits import wait_for

from tracegrad.adapters.proxy.courses import Caller, course_of
from tracegrad.tracestore.gating import GateTerms, run_prefix
from tracegrad.tracestore.records import Publish, PublishState
from tracegrad.tracestore.store import Store

PASSED = {"passed": True, "judged": True, "why": "good"}
REJECTED = {"passed": False, "judged": True, "why": "bad"}


class Gated:
    """A proxy with a live version, and a publisher that takes a candidate through the states by hand."""

    def __init__(self, proxy: SimpleNamespace, store: Store, live: int, engines: list[Any]) -> None:
        self.proxy, self.store, self.live, self.engines = proxy, store, live, engines
        self.pool = ThreadPoolExecutor(8)

    def request(self, *, share: float = 0.0, on: int = 1, timeout_s: float = 60.0) -> Publish:
        urls = tuple(engine.url for engine in self.engines[-on:])
        terms = GateTerms(share=share, engines=urls, timeout_s=timeout_s)
        return self.store.request_publish(next_version(self.store), gate=terms.as_json())

    def evaluating(self, **terms: Any) -> Publish:
        """Bring a candidate to be judged: its engines say its version."""
        publish = self.request(**terms)
        self.drain(publish, "draining")
        self.store.advance_publish(publish.publish_id, "swapping")
        self.serves(publish.version_id, *self.engines[-terms.get("on", 1) :])
        self.store.advance_publish(publish.publish_id, "evaluating")
        self.sees("evaluating")
        return publish

    def drain(self, publish: Publish, state: PublishState, decision: Any = None) -> None:
        self.store.advance_publish(publish.publish_id, state, decision=decision)
        wait_for(lambda: not self.store.waiting_proxies(publish.publish_id, 10), f"{state} is acknowledged")

    def serves(self, version: int, *engines: Any) -> None:
        for engine in engines or self.engines:
            engine.app.version = str(version)

    def sees(self, state: PublishState) -> None:
        wait_for(lambda: self.proxy.app.hold.gates["main"].view.state == state, f"the proxy sees {state}")

    def judge(self, publish: Publish, name: str) -> Future[httpx.Response]:
        """A call of the gate's evaluation."""
        run_id = f"{run_prefix(publish.publish_id)}_{name}"
        self.proxy.client.post("/tracegrad/v1/runs", json={"run_id": run_id, "purpose": "eval"})
        return self.ask(run_id)

    def ask(self, run_id: str) -> Future[httpx.Response]:
        body = {"model": "main", "messages": [{"role": "user", "content": run_id}]}
        return self.pool.submit(self.proxy.client.post, f"/run/{run_id}/v1/chat/completions", json=body)

    def answered(self, run_id: str) -> list[tuple[int | None, int | None, str | None]]:
        calls = self.store.trace(run_id).calls
        return [(call.version_dispatched, call.version_completed, call.quarantine) for call in calls]


@pytest.fixture
def start(
    start_proxy: Callable[..., SimpleNamespace], store: Store, stack: ExitStack, fake: ModuleType
) -> Callable[..., Gated]:
    def started(n_engines: int = 1, **overrides: Any) -> Gated:
        engines = [stack.enter_context(fake.ServerThread(fake.FakeEngine("main"))) for _ in range(n_engines)]
        live = go_live(store)
        model = {"checkpoint": "none", "engine": {"url": engines[0].url}, "replicas": [e.url for e in engines[1:]]}
        gated = Gated(start_proxy(models={"main": model}, **overrides), store, live, engines)
        gated.serves(live)
        stack.callback(gated.pool.shutdown, wait=False, cancel_futures=True)
        return gated

    return started


def requests(gated: Gated) -> list[list[str]]:
    """Who was sent to which engine."""
    return [[r["messages"][-1]["content"] for r in engine.app.requests] for engine in gated.engines]


def test_one_engine_takes_only_the_evaluation_and_the_rest_waits_for_what_passed(start: Callable[..., Gated]) -> None:
    gated = start()
    publish = gated.evaluating()
    held = gated.ask("user")
    waiting = gated.proxy.app.hold.gates["main"].line
    wait_for(lambda: len(waiting) == 1, "the user's call waits")
    # A later number, and it goes first: who may not go yet is passed by.
    assert gated.judge(publish, "a").result(10).status_code == 200
    assert gated.judge(publish, "b").result(10).status_code == 200
    assert not held.done()
    health = gated.proxy.client.get("/health").json()["models"]["main"]
    assert (health["candidate"], health["holding"], health["waiting"]) == (publish.version_id, True, 1)
    assert gated.answered("gate2_a") == [(publish.version_id, publish.version_id, None)]
    gated.store.advance_publish(publish.publish_id, "live", decision=PASSED)
    assert held.result(10).status_code == 200
    assert gated.answered("user") == [(publish.version_id, publish.version_id, None)]


def test_a_rejected_candidate_is_drained_and_the_old_version_answers(start: Callable[..., Gated]) -> None:
    gated = start()
    publish = gated.evaluating()
    held = gated.ask("user")
    engine = gated.engines[0].app
    engine.gate = threading.Event()
    late = gated.judge(publish, "late")
    wait_for(lambda: engine.in_flight == 1, "a call of the evaluation is with the engine")
    gated.store.advance_publish(publish.publish_id, "settling", decision=REJECTED)
    gated.sees("settling")
    assert gated.store.waiting_proxies(publish.publish_id, 10), "not before the evaluation's call is over"
    engine.gate.set()
    engine.gate = None
    wait_for(lambda: not gated.store.waiting_proxies(publish.publish_id, 10), "it is acknowledged")
    assert late.result(10).status_code == 200
    assert gated.answered("gate2_late") == [(publish.version_id, publish.version_id, None)]
    gated.serves(gated.live)
    gated.store.advance_publish(publish.publish_id, "rejected")
    assert held.result(10).status_code == 200
    assert gated.answered("user") == [(gated.live, gated.live, None)]
    assert requests(gated) == [["gate2_late", "user"]]


def test_only_this_evaluation_passes(start: Callable[..., Gated]) -> None:
    """Not a run that names itself like one, not another evaluation, not that of an earlier publish."""
    gated = start()
    publish = gated.evaluating()
    stale = gated.judge(SimpleNamespace(publish_id=1), "stale")  # type: ignore[arg-type]
    gated.proxy.client.post("/tracegrad/v1/runs", json={"run_id": "other", "purpose": "eval"})
    others = [stale, gated.ask("other"), gated.ask(f"{run_prefix(publish.publish_id)}_pretender")]
    wait_for(lambda: len(gated.proxy.app.hold.gates["main"].line) == 3, "all of them wait")
    assert gated.judge(publish, "mine").result(10).status_code == 200
    assert requests(gated) == [["gate2_mine"]]
    gated.store.advance_publish(publish.publish_id, "live", decision=PASSED)
    assert [future.result(10).status_code for future in others] == [200] * 3


def test_with_a_share_of_one_everybody_gets_the_candidate(start: Callable[..., Gated]) -> None:
    gated = start()
    publish = gated.evaluating(share=1.0)
    assert gated.ask("user").result(10).status_code == 200
    assert gated.answered("user") == [(publish.version_id, publish.version_id, None)]
    gated.drain(publish, "settling", REJECTED)
    gated.serves(gated.live)
    gated.store.advance_publish(publish.publish_id, "rejected")
    assert gated.ask("user").result(10).status_code == 200
    assert gated.answered("user") == [(v, v, None) for v in (publish.version_id, gated.live)]


def test_a_candidate_that_nobody_judged_in_time_gets_nobody_any_more(start: Callable[..., Gated]) -> None:
    """Whatever became of the publisher. The one engine has no other weights, so its users wait as long as they may."""
    gated = start(proxy={"hold_timeout_s": 0.3})
    publish = gated.evaluating(share=1.0, timeout_s=0.15)
    wait_for(lambda: gated.proxy.app.hold.gates["main"].view.overdue, "the time is over")
    refused = gated.ask("user").result(10)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "held")
    assert "new weights are being judged" in refused.json()["error"]["message"]
    assert gated.judge(publish, "late").result(10).status_code == 503
    assert requests(gated) == [[]]


def test_with_replicas_a_share_of_the_runs_goes_to_the_candidate_and_stays_there(start: Callable[..., Gated]) -> None:
    gated = start(n_engines=2)
    assert gated.ask("early").result(10).status_code == 200
    before = requests(gated)
    publish = gated.evaluating(share=0.5)
    runs = [f"run {i}".replace(" ", "-") for i in range(24)]
    asked = [gated.ask(run_id) for run_id in runs for _ in range(2)] + [gated.ask("early"), gated.judge(publish, "x")]
    assert {future.result(10).status_code for future in asked} == {200}
    live, candidate = (sorted(now[len(then) :]) for now, then in zip(requests(gated), before, strict=True))
    chosen = {run_id for run_id in runs if run_id in candidate}
    assert 4 <= len(chosen) <= 20, "about half of them, by their ids"
    assert candidate == sorted([*chosen, *chosen, "gate2_x"]), "all calls of a run, and the evaluation"
    assert "early" in live, "a run that has begun with the live version goes on with it"
    for run_id in runs:
        version = publish.version_id if run_id in chosen else gated.live
        assert gated.answered(run_id) == [(version, version, None)] * 2
    gated.drain(publish, "settling", PASSED)
    gated.serves(publish.version_id)
    gated.store.advance_publish(publish.publish_id, "live")
    gated.sees("live")
    assert gated.ask("early").result(10).status_code == 200
    assert gated.answered("early")[-1] == (publish.version_id, publish.version_id, None)


def test_another_evaluation_is_of_the_version_that_serves(start: Callable[..., Gated]) -> None:
    """Were a share of its runs the candidate's, it would have measured neither."""
    gated = start(n_engines=2)
    gated.evaluating(share=0.99)
    for i in range(6):
        gated.proxy.client.post("/tracegrad/v1/runs", json={"run_id": f"eval-{i}", "purpose": "eval"})
        assert gated.ask(f"eval-{i}").result(10).status_code == 200
    assert requests(gated)[1] == []


def test_without_a_share_replicas_hold_nobody(start: Callable[..., Gated]) -> None:
    gated = start(n_engines=2)
    publish = gated.evaluating()
    asked = [gated.ask(f"user-{i}") for i in range(8)] + [gated.judge(publish, "x")]
    assert {future.result(10).status_code for future in asked} == {200}
    assert requests(gated)[1] == ["gate2_x"]
    assert gated.answered("user-3") == [(gated.live, gated.live, None)]
    wait_for(lambda: not gated.proxy.app.hold.gates["main"].holding, "nobody is held")
    gated.drain(publish, "settling", REJECTED)
    gated.serves(gated.live)
    gated.store.advance_publish(publish.publish_id, "rejected")
    gated.sees("rejected")
    assert gated.ask("after").result(10).status_code == 200
    assert gated.answered("after") == [(gated.live, gated.live, None)]


@pytest.mark.parametrize("end", ["live", "rejected"])
def test_a_second_swap_that_did_not_wait_for_us_quarantines_what_was_in_flight(
    start: Callable[..., Gated], end: PublishState
) -> None:
    gated = start(n_engines=2)
    publish = gated.evaluating()
    engine = gated.engines[1].app
    engine.gate = threading.Event()
    spanning = gated.judge(publish, "x")
    wait_for(lambda: engine.in_flight == 1, "a call is with the candidate")
    decision = PASSED if end == "live" else REJECTED
    for state in ("settling", end):
        gated.store.advance_publish(publish.publish_id, state, decision=decision if state == "settling" else None)
    gated.sees(end)
    engine.gate.set()
    engine.gate = None
    assert spanning.result(10).status_code == 200
    assert [found[2] for found in gated.answered("gate2_x")] == ["version changed"]


def test_a_proxy_that_starts_in_the_middle_serves_the_evaluation(start: Callable[..., Gated]) -> None:
    """It never acknowledged anything; that the candidate passes is no surprise to its calls."""
    gated = start()
    publish = gated.request()
    for state in ("draining", "swapping", "evaluating"):
        gated.store.advance_publish(publish.publish_id, state)
    gated.serves(publish.version_id)
    gated.sees("evaluating")
    gate = gated.proxy.app.hold.gates["main"]
    gate.acknowledged.clear()
    engine = gated.engines[0].app
    engine.gate = threading.Event()
    asked = gated.judge(publish, "x")
    wait_for(lambda: engine.in_flight == 1, "a call is with the candidate")
    gated.store.advance_publish(publish.publish_id, "live", decision=PASSED)
    gated.sees("live")
    engine.gate.set()
    engine.gate = None
    assert asked.result(10).status_code == 200
    assert gated.answered("gate2_x") == [(publish.version_id, publish.version_id, None)]


def test_engines_that_this_proxy_does_not_know_get_nobody(start: Callable[..., Gated]) -> None:
    """A publisher with another list of engines: which of ours has the candidate cannot be said."""
    gated = start(n_engines=2)
    publish = gated.evaluating()
    view = gated.proxy.app.hold.gates["main"].view
    assert course_of(view, frozenset({"http://elsewhere"}), Caller(number=1, judging=publish.publish_id)) is None
    assert course_of(view, frozenset({"http://elsewhere"}), Caller(number=1)) is None
