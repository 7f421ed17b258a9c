"""While candidates of two models are judged as one: each run meets the candidates of both, or of neither (law 8)."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_swaps import save_answers
from versions import add_version, go_live
from waits import wait_for

from tracegrad.adapters.proxy import engines
from tracegrad.tracestore.gating import GateTerms, run_prefix
from tracegrad.tracestore.publishes import REHEARSED
from tracegrad.tracestore.records import Publish
from tracegrad.tracestore.store import Store

MODELS = ("planner", "writer")


class House:
    """A proxy before two models, each with `n_engines` engines and a live version; publishing is done by hand.

    With `adapters` both lie on the engines of one base, which say the number of an adapter's version to everything: one
    of them that has a candidate for a share of runs has it beside what is live.
    """

    def __init__(
        self,
        start_proxy: Callable[..., SimpleNamespace],
        start_engine: Callable[[str], Any],
        store: Store,
        stack: ExitStack,
        folder: Path,
        *,
        n_engines: int,
        adapters: bool,
    ) -> None:
        self.store, self.adapters, self.folder = store, adapters, folder
        bases = ("base",) if adapters else MODELS
        running = {name: [start_engine(name) for _ in range(n_engines)] for name in bases}
        self.engines = {name: running["base" if adapters else name] for name in MODELS}
        self.live = {name: self.version(name) for name in MODELS}
        for name, version in self.live.items():
            go_live(store, version)
            self.serve(name, version, self.engines[name])
        urls = {name: [engine.url for engine in engines] for name, engines in running.items()}
        models: dict[str, Any] = {
            name: {"checkpoint": "none", "engine": {"url": url}, "replicas": rest, "trained": not adapters}
            for name, (url, *rest) in urls.items()
        }
        if adapters:
            models |= {name: {"adapter": {"of": "base"}} for name in MODELS}
        self.proxy = start_proxy(models=models, roles={name: name for name in MODELS})
        self.pool = ThreadPoolExecutor(8)
        stack.callback(self.pool.shutdown, wait=False, cancel_futures=True)

    def version(self, model: str) -> int:
        path = self.folder / f"{len(self.store.list_versions())}"
        version = add_version(self.store, path, model=model, kind="step")
        save_answers(path, str(version.version_id))
        return version.version_id

    def serve(self, model: str, version: int, engines: list[Any]) -> None:
        for engine in engines:
            if self.adapters:
                engine.app.adapters[model] = self.store.get_version(version).checkpoint_path
            else:
                engine.app.version = str(version)

    def evaluating(self, share: float) -> list[Publish]:
        """Bring a candidate of each model to its last engine, and both to be judged."""
        last = {name: engines[-1:] for name, engines in self.engines.items()}
        candidates = {name: self.version(name) for name in MODELS}
        self.beside = self.adapters and 0 < share < 1 and len(self.engines["planner"]) == 1
        terms = {
            candidates[name]: GateTerms(
                share=share, engines=(last[name][0].url,), timeout_s=60.0, beside=self.beside
            ).as_json()
            for name in MODELS
        }
        opened = self.store.request_together(terms)
        for publish in opened:
            self.store.advance_publish(publish.publish_id, "draining")
            wait_for(lambda p=publish: not self.store.waiting_proxies(p.publish_id, 10), "it is acknowledged")
            self.store.advance_publish(publish.publish_id, "swapping")
            self.serve(publish.model + REHEARSED * self.beside, publish.version_id, last[publish.model])
        self.advance(opened, "evaluating")
        return opened

    def advance(self, opened: list[Publish], state: Any, decision: Any = None) -> None:
        self.store.advance_together(opened[0].publish_id, state, decision=decision)
        gates = self.proxy.app.hold.gates
        wait_for(lambda: all(gates[name].view.state == state for name in MODELS), f"the proxy sees {state}")

    def ask(self, run_id: str, model: str) -> Future[httpx.Response]:
        body = {"model": model, "messages": [{"role": "user", "content": run_id}]}
        return self.pool.submit(self.proxy.client.post, f"/run/{run_id}/v1/chat/completions", json=body)

    def answered(self, run_id: str) -> list[int | None]:
        """The versions that answered a run, in the order in which it asked."""
        calls = sorted(self.store.trace(run_id).calls, key=lambda call: call.timing.dispatched_at or 0.0)
        assert all(call.version_dispatched == call.version_completed and not call.quarantine for call in calls)
        return [call.version_dispatched for call in calls]


@pytest.fixture
def make_house(
    start_proxy: Callable[..., SimpleNamespace], store: Store, stack: ExitStack, fake: ModuleType, tmp_path: Path
) -> Callable[..., House]:
    def start_engine(name: str) -> Any:
        return stack.enter_context(fake.ServerThread(fake.FakeEngine(name)))

    def made(n_engines: int, *, adapters: bool = False) -> House:
        return House(start_proxy, start_engine, store, stack, tmp_path, n_engines=n_engines, adapters=adapters)

    return made


def test_with_one_engine_each_only_the_evaluation_meets_both_and_others_wait(
    make_house: Callable[..., House],
) -> None:
    house = make_house(1)
    opened = house.evaluating(share=0.0)
    judging = f"{run_prefix(opened[0].publish_id)}_x"
    second = f"{run_prefix(opened[1].publish_id)}_x"
    for run_id in (judging, second):
        house.proxy.client.post("/tracegrad/v1/runs", json={"run_id": run_id, "purpose": "eval"})
    held = [house.ask(run_id, name) for run_id in ("user", second) for name in MODELS]
    for name in MODELS:
        assert house.ask(judging, name).result(10).status_code == 200
    assert house.answered(judging) == [publish.version_id for publish in opened]
    lines = [house.proxy.app.hold.gates[name].line for name in MODELS]
    wait_for(lambda: all(len(line) == 2 for line in lines), "the others wait for both models")
    assert not any(future.done() for future in held)
    house.advance(opened, "live", {"passed": True, "judged": True, "why": "good"})
    assert {future.result(10).status_code for future in held} == {200}
    assert set(house.answered("user")) == {publish.version_id for publish in opened}


@pytest.mark.parametrize(("n_engines", "adapters"), [(2, False), (2, True), (1, True)])
def test_a_share_of_the_runs_meets_the_candidates_of_both_and_no_run_a_mixture(
    make_house: Callable[..., House], n_engines: int, adapters: bool
) -> None:
    house = make_house(n_engines, adapters=adapters)
    runs = [f"run-{i}" for i in range(16)]
    early = [f"early-{i}" for i in range(6)]
    for run_id in early:
        assert house.ask(run_id, "planner").result(10).status_code == 200
    opened = house.evaluating(share=0.5)
    candidates, live = [publish.version_id for publish in opened], list(house.live.values())
    begun = [house.ask(run_id, "writer") for run_id in early]
    assert {future.result(10).status_code for future in begun} == {200}
    for name in MODELS:
        asked = {run_id: house.ask(run_id, name) for run_id in runs}
        for run_id, future in asked.items():
            answer = future.result(10).json()
            said = answer["choices"][0]["message"]["content"]
            assert not adapters or said == str(house.answered(run_id)[-1]), "the version that is written down spoke"
            assert answer["model"] == name, "whatever its name on the engine"
    met = [house.answered(run_id) for run_id in runs]
    assert all(each in (candidates, live) for each in met)
    assert 3 <= met.count(candidates) <= 13
    assert all(house.answered(run_id) == live for run_id in early), "who began with what is live meets no candidate"


def test_one_engine_has_the_candidates_of_adapters_beside_what_is_live_and_nobody_waits(
    make_house: Callable[..., House],
) -> None:
    """The evaluation is of the candidates, users have both; what the name of a candidate answers is never a user's."""
    house = make_house(1, adapters=True)
    opened = house.evaluating(share=0.01)
    candidates, live = [publish.version_id for publish in opened], list(house.live.values())
    judging = f"{run_prefix(opened[0].publish_id)}_x"
    house.proxy.client.post("/tracegrad/v1/runs", json={"run_id": judging, "purpose": "eval"})
    for run_id in ("user", judging):
        for name in MODELS:
            assert house.ask(run_id, name).result(10).status_code == 200
    assert (house.answered("user"), house.answered(judging)) == (live, candidates)
    report = house.proxy.client.get("/health").json()["models"]
    assert [(report[name]["engine"], report[name]["candidate"]) for name in MODELS] == [("ok", v) for v in candidates]
    house.advance(opened, "settling", {"passed": True, "judged": True, "why": "good"})
    held = [house.ask("user", name) for name in MODELS]
    wait_for(
        lambda: all(len(house.proxy.app.hold.gates[name].line) == 1 for name in MODELS), "they wait for the switch"
    )
    for publish in opened:
        wait_for(lambda p=publish: not house.store.waiting_proxies(p.publish_id, 10), "it is acknowledged")
        (engine,) = house.engines[publish.model]
        engine.app.adapters[publish.model] = engine.app.adapters.pop(publish.model + REHEARSED)
    house.advance(opened, "live")
    assert {future.result(10).status_code for future in held} == {200}
    assert set(house.answered("user")) == {*live, *candidates}


def test_an_engine_that_lost_a_candidate_beside_answers_with_what_is_live(
    make_house: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the candidates waits: with the other candidate it would meet a mixture. Nobody is told of a 404."""
    monkeypatch.setattr(engines, "CONTACT_S", 0.0)
    house = make_house(1, adapters=True)
    opened = house.evaluating(share=0.99)
    assert house.ask("run-1", "planner").result(10).status_code == 200
    (engine,) = house.engines["writer"]
    there = engine.app.adapters.pop("writer" + REHEARSED)
    gate = house.proxy.app.hold.gates["writer"]
    held = house.ask("run-1", "writer")
    wait_for(lambda: len(gate.line) == 1 and not house.proxy.app.upstream.beside["writer"].is_up(), "it waits")
    nobody = {"model": "writer", "messages": [{"role": "user", "content": "of no run"}]}
    answer = house.proxy.client.post("/v1/chat/completions", json=nobody).json()
    assert answer["choices"][0]["message"]["content"] == str(house.live["writer"])
    engine.app.adapters["writer" + REHEARSED] = there
    assert held.result(10).status_code == 200
    assert house.answered("run-1") == [publish.version_id for publish in opened]


def test_a_run_of_the_candidates_waits_where_one_of_them_is_down(make_house: Callable[..., House]) -> None:
    """The engine that is left serves the live version: with the other candidate that would be a mixture."""
    house = make_house(2)
    opened = house.evaluating(share=0.99)
    assert house.ask("run-1", "planner").result(10).status_code == 200
    assert house.answered("run-1") == [opened[0].version_id]
    gate, ready = house.proxy.app.hold.gates["writer"], house.proxy.app.hold.gates["writer"].ready
    gate.ready = lambda engines: engines is None or opened[1].gate["engines"][0] not in engines  # type: ignore[index]
    held = house.ask("run-1", "writer")
    wait_for(lambda: len(gate.line) == 1, "it waits")
    gate.ready = ready
    assert held.result(10).status_code == 200
    assert house.answered("run-1") == [publish.version_id for publish in opened]
