"""Role rules, inference, and sources that disagree."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waits import wait_for

from tracegrad.adapters.fingerprint import fingerprint_of
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.errors import ConfigError, StoreUnavailable
from tracegrad.tracestore.records import AttributionConflict, Call
from tracegrad.tracestore.store import Store

CHAT = "/v1/chat/completions"
HOOK = {"x-tracegrad-source": "hook"}
SPAN = {"span_id": "s", "name": "model", "namespace": "planner:1f|2|model:2e"}


def chat(system: str | None = None, *tools: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    body: dict[str, Any] = {"messages": [*messages, {"role": "user", "content": "hello"}], **more}
    if tools:
        body["tools"] = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in tools]
    return body


def ask(proxy: SimpleNamespace, store: Store, body: dict[str, Any], path: str = "/run/r", **headers: str) -> Call:
    answer = proxy.client.post(path + CHAT, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    (call,) = [c for c in store.trace("r").calls if c.call_id == answer.headers["x-tracegrad-call"]]
    return call


def who(call: Call) -> tuple[str | None, str | None]:
    return call.attribution.role, call.attribution.role_source


def hooked(role: str | None = None, span: dict[str, Any] | None = None) -> dict[str, str]:
    headers = {**HOOK, "x-tracegrad-run": "r"}
    if role is not None:
        headers["x-tracegrad-role"] = role
    if span is not None:
        headers["x-tracegrad-span"] = quote(str(span).replace("'", '"'))
    return headers


FINGERPRINT = fingerprint_of(chat("You plan.", "search"))
RULES = [
    {"role": "by_both", "agent": "agent_7", "model": "fast"},
    {"role": "by_agent", "agent": "agent_7"},
    {"role": "by_node", "node": "planner"},
    {"role": "by_header", "header": {"X-Team": "blue", "x-app": "shop"}},
    {"role": "by_model", "model": "writer-alias"},
    {"role": "by_fingerprint", "fingerprint": FINGERPRINT},
]


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        (hooked("agent_7"), chat(model="fast"), ("by_both", "rule")),
        (hooked("agent_7"), chat(model="slow"), ("by_agent", "rule")),
        (hooked("agent_8", SPAN), chat(), ("by_node", "rule")),
        (hooked("agent_8"), chat(), ("agent_8", "hook")),
        ({"x-team": "blue", "x-app": "shop"}, chat(), ("by_header", "rule")),
        ({"x-team": "blue"}, chat(), (None, None)),
        ({"x-team": "Blue", "x-app": "shop"}, chat(), (None, None)),
        ({}, chat(model="writer-alias"), ("by_model", "rule")),
        ({}, chat("You plan.", "search"), ("by_fingerprint", "rule")),
        ({"x-tracegrad-role": "said"}, chat(model="writer-alias"), ("said", "header")),
    ],
)
def test_the_first_rule_all_of_whose_conditions_hold_gives_the_role(
    start_proxy: Callable[..., SimpleNamespace], store: Store, headers: Any, body: Any, expected: Any
) -> None:
    proxy = start_proxy(role_rules=RULES)
    assert who(ask(proxy, store, body, **headers)) == expected
    assert store.attribution_conflicts() == []  # a rule replaces what the hook says: that is no disagreement


def test_a_role_in_the_path_or_of_the_key_needs_no_rule(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    proxy = start_proxy(role_rules=RULES)
    text, _ = store.create_key(scopes=("call",), role="keyed")
    assert who(ask(proxy, store, chat(model="writer-alias"), "/run/r/role/pathed")) == ("pathed", "path")
    keyed = ask(proxy, store, chat(model="writer-alias"), authorization=f"Bearer {text}")
    assert who(keyed) == ("keyed", "key")


def test_a_rule_decides_which_model_serves(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    proxy = start_proxy(
        role_rules=[{"role": "writer", "model": "writer-alias"}],
        roles={"writer": "main"},
        proxy={"sampling": {"writer": {"temperature": 0.7}}},
    )
    call = ask(proxy, store, chat(model="writer-alias"))
    assert (call.model, call.requested_model, call.attribution.role) == ("main", "writer-alias", "writer")


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"role": "planer", "node": "x"}, "did you mean planner"),
        ({"role": "planner"}, "has no condition"),
        ({"role": "planner", "fingerprint": "abc"}, "is no fingerprint"),
        ({"role": "planner", "nod": "x"}, "did you mean node"),
        ({"node": "x"}, "role"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(rule: dict[str, Any], says: str) -> None:
    raw = {"models": {"main": {"checkpoint": "x"}}, "roles": {"planner": "main"}, "role_rules": [rule]}
    with pytest.raises(ConfigError, match=says):
        parse_config(raw)


def test_the_fingerprint_is_of_system_prompt_and_tool_names() -> None:
    one = fingerprint_of(chat("You plan.", "search", "read"))
    assert one is not None and one == fingerprint_of(chat("You plan.", "read", "search", temperature=0.3))
    parts = chat("You plan.", "search", "read")
    parts["messages"][0] = {"role": "developer", "content": [{"type": "text", "text": "You plan."}]}
    parts["messages"][1]["content"] = "something else"
    assert fingerprint_of(parts) == one
    others = [chat("You write.", "search", "read"), chat("You plan.", "search"), chat(None, "search", "read")]
    assert len({one, *map(fingerprint_of, others)}) == 4
    late = {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "You plan."}]}
    assert fingerprint_of(chat()) is None and fingerprint_of(late) is None


_KEYS = st.sampled_from(["messages", "tools", "role", "content", "function", "name", "text", "system"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(_KEYS, v, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # slow where others work too
@given(st.dictionaries(_KEYS, _JSON))
def test_no_request_breaks_the_fingerprint(body: dict[str, Any]) -> None:
    found = fingerprint_of(body)
    assert found is None or (found.startswith("fp_") and len(found) == 19)


def test_a_role_is_inferred_only_where_one_was_seen(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    proxy = start_proxy(infer_roles=True)
    prompt = chat("You plan.")
    assert who(ask(proxy, store, prompt)) == (None, None)
    ask(proxy, store, prompt, "/run/r/role/planner")
    assert who(ask(proxy, store, prompt)) == ("planner", "inferred")
    assert who(ask(proxy, store, chat("You write."))) == (None, None)
    assert who(ask(proxy, store, chat())) == (None, None)
    ask(proxy, store, prompt, "/run/r/role/critic")
    assert who(ask(proxy, store, prompt)) == (None, None)  # two roles share it now
    text, _ = store.create_key(scopes=("call",), project="other", run_id="elsewhere")
    ask(proxy, store, chat("You judge."), "/run/r/role/judge")
    proxy.client.post(CHAT, json=chat("You judge."), headers={"authorization": f"Bearer {text}"})
    assert who(store.trace("elsewhere").calls[0]) == (None, None)  # what one project said teaches no other


def test_nothing_is_inferred_unless_it_was_asked_for(proxy: SimpleNamespace, store: Store) -> None:
    ask(proxy, store, chat("You plan."), "/run/r/role/planner")
    assert who(ask(proxy, store, chat("You plan."))) == (None, None)


def conflicts_of(store: Store, count: int) -> list[AttributionConflict]:
    wait_for(lambda: len(store.attribution_conflicts()) >= count, f"there are {count} conflicts")
    return store.attribution_conflicts()


def test_a_second_source_that_disagrees_is_recorded(proxy: SimpleNamespace, store: Store) -> None:
    text, _ = store.create_key(scopes=("call",), role="keyed", run_id="r")
    headers = {"x-tracegrad-role": "said", "x-tracegrad-run": "r", "authorization": f"Bearer {text}"}
    call = ask(proxy, store, chat(), "/run/other/role/pathed", **headers)
    found = {(c.field, c.kept, c.kept_source, c.said, c.said_source) for c in conflicts_of(store, 3)}
    assert found == {
        ("run", "r", "header", "other", "path"),
        ("role", "said", "header", "pathed", "path"),
        ("role", "said", "header", "keyed", "key"),
    }
    assert who(call) == ("said", "header")
    hook = {**hooked("node"), "authorization": f"Bearer {text}"}
    assert who(ask(proxy, store, chat(), "", **hook)) == ("keyed", "key")
    assert ("node", "hook") in {(c.said, c.said_source) for c in conflicts_of(store, 4)}


def test_sources_that_agree_are_no_conflict(proxy: SimpleNamespace, store: Store) -> None:
    ask(proxy, store, chat(), "/run/r/role/a", **{"x-tracegrad-role": "a", "x-tracegrad-run": "r"})
    proxy.app.dissents._note((), "default")
    assert store.attribution_conflicts() == [] and not proxy.app.dissents._waiting


def test_a_conflict_waits_for_the_call_and_for_the_store_but_the_client_does_not(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    let_go = threading.Event()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def append_calls(self, calls: Any) -> None:
            store.append_calls(calls)
            events.append("call")

        def attribute_late(self, facts: Any, project: str) -> None:
            events.append("conflict")
            if not let_go.wait(0.01):
                raise StoreUnavailable("not now")
            store.attribute_late(facts, project)

    monkeypatch.setattr("tracegrad.adapters.proxy.dissents.RETRY_S", 0.01)
    proxy = start_proxy(store_object=Slow())
    ask(proxy, store, chat(), "/run/r/role/pathed", **{"x-tracegrad-role": "said"})  # answered, whatever becomes of it
    assert store.attribution_conflicts() == []
    let_go.set()
    assert len(conflicts_of(store, 1)) == 1
    assert events[:2] == ["call", "conflict"] and len(events) >= 2


def test_conflicts_that_wait_are_written_when_the_proxy_stops(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    proxy = start_proxy()
    for _ in range(20):
        ask(proxy, store, chat(), "/run/r/role/pathed", **{"x-tracegrad-role": "said"})
    proxy.server.__exit__()
    assert len(store.attribution_conflicts()) == 20
