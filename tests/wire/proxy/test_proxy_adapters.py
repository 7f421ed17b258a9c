"""Roles whose models are adapters: each is answered by its own, on the engine of their base, and by the base before."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from versions import add_version
from waits import wait_for

from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def engine_app(served_engine: Any, fake: ModuleType) -> Any:
    served_engine.app.__init__("base")
    served_engine.app.answer_text = "base"
    return served_engine.app


@pytest.fixture
def proxy(start_proxy: Callable[..., SimpleNamespace], engine_url: str) -> SimpleNamespace:
    models = {
        "base": {"checkpoint": "none", "trained": False, "engine": {"url": engine_url}},
        "p": {"adapter": {"of": "base"}},
        "w": {"adapter": {"of": "base"}},
    }
    return start_proxy(models=models, roles={"planner": "p", "writer": "w", "critic": "base"})


@pytest.fixture
def publish(store: Store, engine_app: Any, tmp_path: Path) -> Callable[..., PolicyVersion]:
    """Make a version of an adapter live, as a publisher would, and let the engine serve it (`load`)."""
    from fake_swaps import save_answers

    def live(model: str, *, load: bool = True) -> PolicyVersion:
        step = len(store.list_versions(model))
        folder = save_answers(tmp_path / f"{model}{step}", f"{model}{step}")
        version = add_version(store, folder, step, model=model, kind="initial")
        publish_id = store.request_publish(version.version_id).publish_id
        store.advance_publish(publish_id, "draining")
        wait_for(lambda: not store.waiting_proxies(publish_id, 10.0), "it is acknowledged")
        store.advance_publish(publish_id, "swapping")
        if load:
            engine_app.adapters[model] = str(folder)
        store.advance_publish(publish_id, "live")
        return version

    return live


def ask(proxy: SimpleNamespace, role: str, **fields: Any) -> Any:
    answer = proxy.client.post(
        f"/run/r/role/{role}/v1/chat/completions", json={"messages": MESSAGES, "model": "gpt-4o", **fields}
    )
    assert answer.status_code == 200, answer.text
    return answer


def said(proxy: SimpleNamespace, role: str) -> str:
    answer = ask(proxy, role).json()
    assert answer["model"] == "gpt-4o"
    return str(answer["choices"][0]["message"]["content"])


def test_each_role_is_answered_by_its_adapter(
    proxy: SimpleNamespace, store: Store, publish: Callable[..., PolicyVersion], engine_app: Any
) -> None:
    """Before a first version by the base, which computes the same; such calls know no version. Streams alike."""
    assert [said(proxy, role) for role in ("planner", "writer", "critic")] == ["base"] * 3
    live = publish("p")
    wait_for(lambda: proxy.app.hold.gates["p"].live_version == live.version_id, "the proxy sees it")
    assert [said(proxy, role) for role in ("planner", "writer", "critic")] == ["p0", "base", "base"]
    publish("w")
    newer = publish("p")
    wait_for(lambda: proxy.app.hold.gates["p"].live_version == newer.version_id, "the proxy sees it")
    assert [said(proxy, role) for role in ("planner", "writer", "critic")] == ["p1", "w0", "base"]
    assert b'"model":"gpt-4o"' in ask(proxy, "planner", stream=True).content
    assert [body["model"] for body in engine_app.requests][-4:] == ["p", "w", "base", "p"]
    calls = store.trace("r").calls
    planners = [(call.model, call.version_dispatched) for call in calls if call.attribution.role == "planner"]
    assert planners == [("p", None), ("p", live.version_id), ("p", newer.version_id), ("p", newer.version_id)]
    assert {call.model for call in calls if call.attribution.role == "critic"} == {"base"}
    assert all(call.quarantine is None for call in calls)


def test_who_asks_for_an_adapter_by_name_sees_that_name(proxy: SimpleNamespace, store: Store) -> None:
    """Also while its base answers."""
    answer = proxy.client.post("/v1/chat/completions", json={"messages": MESSAGES, "model": "p"}).json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("p", "base")


def test_an_engine_that_lost_the_adapter_gets_no_calls_of_it(
    proxy: SimpleNamespace, publish: Callable[..., PolicyVersion], engine_app: Any, monkeypatch: Any
) -> None:
    """It restarted on something else: its other models are served on, and the adapter's calls wait."""
    from tracegrad.adapters.proxy import engines

    monkeypatch.setattr(engines, "CONTACT_S", 0.0)
    live = publish("p")
    publish("w")
    wait_for(lambda: proxy.app.hold.gates["p"].live_version == live.version_id, "the proxy sees it")
    assert said(proxy, "planner") == "p0"
    there = engine_app.adapters.pop("p")
    waiting = proxy.client.post(
        "/run/r/role/planner/v1/chat/completions",
        json={"messages": MESSAGES},
        headers={"x-stainless-timeout": "2"},
    )
    assert waiting.status_code == 503 and "serves 'p' from nowhere" in waiting.text
    assert said(proxy, "writer") == "w0"
    engine_app.adapters["p"] = there
    assert said(proxy, "planner") == "p0"


def test_the_list_of_models_has_each_once_and_nothing_that_is_only_probed(
    proxy: SimpleNamespace, engine_app: Any, publish: Callable[..., PolicyVersion]
) -> None:
    publish("p")
    engine_app.adapters["p~next"] = "/rehearsed"
    listed = proxy.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["base", "p"]
    assert proxy.client.get("/v1/models/p").json()["parent"] == "base"
