"""Calls that go on from an earlier call of their run: which one that is, and why their prompts drift."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conversations import TOOL, Chat, begins_as_sampled, calls_of, rewritten, user

from tracegrad.adapters.proxy import continuing, rendering
from tracegrad.tracestore.records import Continues
from tracegrad.tracestore.store import Store

# -- which call a call goes on from


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_goes_on_as_sampled_has_no_drift(proxy: SimpleNamespace, store: Store, stream: bool) -> None:
    chat = Chat(proxy)
    for text in ("one", "two", "three"):
        chat.say(user(text), stream=stream)
    first, second, third = calls_of(store)
    assert first.continues is None
    assert second.continues == Continues(call_id=first.call_id, choice=0)
    assert third.continues == Continues(call_id=second.call_id, choice=0)
    assert begins_as_sampled(second, first) and begins_as_sampled(third, second)


def test_the_answer_that_was_chosen_is_the_one(proxy: SimpleNamespace, store: Store) -> None:
    chat = Chat(proxy)
    chat.say(user("one"), n=3)
    chat.messages[-1]["content"] = "2: one"
    chat.say(user("two"))
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=2)


def test_two_conversations_of_a_run_do_not_mix(proxy: SimpleNamespace, store: Store) -> None:
    """Nor do two runs, even with the same words; what stands alone continues nothing."""
    planner, writer = Chat(proxy, role="planner"), Chat(proxy, role="writer")
    other = Chat(proxy, run="other")
    for text in ("one", "two"):
        planner.say(user(f"plan {text}"))
        writer.say(user(f"write {text}"))
        other.say(user(f"plan {text}"))
    a, b, c, d = calls_of(store)
    assert (a.continues, b.continues) == (None, None)
    assert c.continues == Continues(call_id=a.call_id, choice=0)
    assert d.continues == Continues(call_id=b.call_id, choice=0)
    e, f = calls_of(store, "other")
    assert (e.continues, f.continues) == (None, Continues(call_id=e.call_id, choice=0))


def test_a_call_of_no_run_continues_nothing(proxy: SimpleNamespace, store: Store) -> None:
    said = [user("one"), {"role": "assistant", "content": "0: one"}, user("two")]
    for messages in (said[:1], said):
        answer = proxy.client.post("/v1/chat/completions", json={"model": "main", "messages": messages})
        assert answer.status_code == 200
        assert store.find_call(answer.headers["x-tracegrad-call"])[1] is None
    assert store.drift_counts("default") == []


def test_pictures_are_not_looked_at(token_in: SimpleNamespace, store: Store) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    chat = Chat(token_in)
    chat.say({"role": "user", "content": [{"type": "text", "text": "one"}, picture]})
    chat.say(user("two"))
    assert [call.continues for call in calls_of(store)] == [None, None]


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_past_is_found_through_another_process(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    """And where this one has forgotten it."""
    if forgotten:
        monkeypatch.setattr(continuing, "CAPACITY_TOKENS", 0)
    first, second = start_proxy(), start_proxy()
    chat, again = Chat(first), Chat(first if forgotten else second)
    chat.say(user("one"))
    if forgotten:
        Chat(first, run="another").say(user("in between"))
    again.messages = chat.messages
    again.say(user("two"))
    chat.say(user("three"))
    a, b, c = calls_of(store)
    assert b.continues == Continues(call_id=a.call_id, choice=0)
    assert c.continues == Continues(call_id=b.call_id, choice=0)


def test_memory_is_bounded_within_a_run_too(
    proxy: SimpleNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is forgotten is read again where it is needed."""
    monkeypatch.setattr(continuing, "CAPACITY_TOKENS", 500)
    chat = Chat(proxy)
    chat.say(user("one"))
    for number in range(20):
        Chat(proxy).say(user(f"something else {number}"))
    kept = proxy.app.continuing
    assert kept._n_tokens <= 500
    assert {call_id for run in kept._runs.values() for call_id in run.calls} == {one[1] for one in kept._kept}
    chat.say(user("two"))
    first, *_, last = calls_of(store)
    assert last.continues == Continues(call_id=first.call_id, choice=0)
    monkeypatch.setattr(continuing, "CAPACITY_TOKENS", 0)
    Chat(proxy).say(user("the end"))
    assert (kept._n_tokens, len(kept._kept), [run for run in kept._runs.values() if run.calls]) == (0, 0, [])


# -- the causes of drift


def test_other_ids_for_the_same_text(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    engine_app.samples_pairs = True
    chat = Chat(proxy)
    chat.say(user("one"))
    chat.say(user("two"))
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="retokenised")
    assert not begins_as_sampled(second, first)


@pytest.mark.parametrize("how", ["trimmed", "thoughts", "a tool call in another form"])
def test_a_template_that_writes_something_else(proxy: SimpleNamespace, store: Store, engine_app: Any, how: str) -> None:
    chat = rewritten(proxy, engine_app, how)
    chat.say(user("two"))
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="template")


@pytest.mark.parametrize("how", ["another answer", "other tools", "an earlier message", "fewer messages"])
def test_an_app_that_changes_history(token_in: SimpleNamespace, store: Store, engine_app: Any, how: str) -> None:
    """Also with token-in: what the app says counts."""
    chat, changed = Chat(token_in, tools=[TOOL]), {}
    chat.say({"role": "system", "content": "be brief"}, user("one"))
    if how == "another answer":
        chat.messages[-1]["content"] = "0: something else"
    elif how == "other tools":
        engine_app.samples_pairs = True
        chat.messages[:] = []
        chat.say({"role": "system", "content": "be brief"}, user("one"))
        changed = {"tools": [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "subtract"}}]}
    elif how == "an earlier message":
        chat.messages[0]["content"] = "be verbose"
    else:
        del chat.messages[0]
    chat.say(user("two"), **changed)
    *_, first, second = calls_of(store)
    choice = 0 if how == "other tools" else None
    assert second.continues == Continues(call_id=first.call_id, choice=choice, drift="edited")
    assert list(second.prompt_ids or ()) == engine_app.render({"messages": chat.messages[:-1]})


def test_an_engine_that_cannot_say(
    proxy: SimpleNamespace, store: Store, engine_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_app.samples_pairs = True
    paths = engine_app._paths()
    monkeypatch.setattr(engine_app, "_paths", lambda: {path: how for path, how in paths.items() if "detok" not in path})
    chat = Chat(proxy)
    chat.say(user("one"))
    chat.say(user("two"))
    assert calls_of(store)[1].continues.drift == "unexplained"


@pytest.mark.parametrize("how", ["detokenize", "render"])
def test_an_engine_that_is_silent_keeps_no_answer_back(
    token_in: SimpleNamespace, store: Store, engine_app: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(rendering, "PATIENCE_S", 0.1)
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    chat.say(user("one"))

    async def silent(*_: Any) -> None:
        await asyncio.sleep(5)

    monkeypatch.setattr(engine_app, f"_{how}", silent)
    began = time.monotonic()
    chat.say(user("two"))
    assert time.monotonic() - began < 3
    drift = "unexplained" if how == "detokenize" else "retokenised"
    assert calls_of(store)[1].continues == Continues(call_id=calls_of(store)[0].call_id, choice=0, drift=drift)


def test_drift_is_counted(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    chat = Chat(proxy)
    chat.say(user("one"))
    chat.say(user("two"))
    engine_app.samples_pairs = True
    chat.say(user("three"))
    chat.say(user("four"))
    page = proxy.client.get("/metrics").text
    wanted = {
        'tracegrad_calls_continued_total{drift="",model="main",token_in="false",worker="0"} 2.0',
        'tracegrad_calls_continued_total{drift="retokenised",model="main",token_in="false",worker="0"} 1.0',
    }
    assert wanted <= set(page.splitlines())
    assert {one.drift: one.calls for one in store.drift_counts("default")} == {None: 2, "retokenised": 1}
