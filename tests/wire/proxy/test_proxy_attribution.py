"""Who is calling: headers before the path, the source recorded, and no guessing."""

from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from tracegrad.adapters.proxy.attribution import attribute, split_path
from tracegrad.adapters.proxy.errors import InvalidRequest
from tracegrad.adapters.proxy.routing import engine_of
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.records import Span
from tracegrad.tracestore.store import Store

ASK = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/v1/chat/completions", ("/v1/chat/completions", None, None)),
        (b"/run/r1/v1/models", ("/v1/models", "r1", None)),
        (b"/role/a%20b/v1/models", ("/v1/models", None, "a b")),
        (b"/run/x%2Fy/role/%C3%A9/v1/chat/completions", ("/v1/chat/completions", "x/y", "é")),
        (b"/role/a/run/r/v1/models", ("/run/r/v1/models", None, "a")),
        (b"/run/r", ("/run/r", None, None)),
        (b"/", ("/", None, None)),
    ],
)
def test_split_path(path: bytes, expected: tuple[str, str | None, str | None]) -> None:
    route = split_path(path)
    assert (route.path, route.run_id, route.role) == expected


@pytest.mark.parametrize("path", [b"/run//v1/models", b"/run/%00/v1/models", b"/role/" + b"x" * 300 + b"/v1/models"])
def test_ids_that_cannot_be_ids_are_refused(path: bytes) -> None:
    with pytest.raises(InvalidRequest):
        split_path(path)


def test_headers_win_over_the_path_each_for_itself() -> None:
    route = split_path(b"/run/path-run/role/path-role/v1/models")
    who = attribute({b"x-tracegrad-role": b"caf%C3%A9"}, route)
    assert (who.run_id, who.run_source, who.role, who.role_source) == ("path-run", "path", "café", "header")
    hook = {b"x-tracegrad-run": b"h", b"x-tracegrad-source": b"hook"}
    who = attribute(hook, split_path(b"/role/path-role/v1/models"))
    assert (who.run_id, who.run_source, who.role, who.role_source) == ("h", "hook", "path-role", "path")
    assert attribute(hook, route).run_source == "path"
    nobody = attribute({}, split_path(b"/v1/models"))
    assert (nobody.run_id, nobody.run_source, nobody.role, nobody.role_source) == (None, None, None, None)


def test_a_span_is_read_from_its_header_and_stored_with_the_run(proxy: SimpleNamespace, store: Store) -> None:
    span = '{"span_id":"s1","name":"writer é","namespace":"g:1|w:2","superstep":3,"triggers":["a","b"]}'
    headers = {"x-tracegrad-run": "r", "x-tracegrad-role": "writer", "x-tracegrad-source": "hook"}
    proxy.client.post("/v1/chat/completions", json=ASK, headers={**headers, "x-tracegrad-span": quote(span)})
    (call,) = store.trace("r").calls
    assert call.attribution.span == Span(
        span_id="s1", run_id="r", name="writer é", namespace="g:1|w:2", superstep=3, triggers=("a", "b")
    )
    assert (call.attribution.role_source, call.attribution.run_source) == ("hook", "hook")


@pytest.mark.parametrize("span", ["{", '{"name":"x"}', '{"span_id":"s","name":"n","run_id":"r"}', "%FF"])
def test_a_span_that_cannot_be_read_is_a_400(proxy: SimpleNamespace, engine_app: Any, span: str) -> None:
    headers = {"x-tracegrad-run": "r", "x-tracegrad-span": span}
    answer = proxy.client.post("/v1/chat/completions", json=ASK, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_attribution")
    assert engine_app.requests == []


def test_a_call_of_nobody_is_recorded_without_a_run(proxy: SimpleNamespace, store: Store) -> None:
    answer = proxy.client.post("/v1/chat/completions", json=ASK)
    assert store.find_call(answer.headers["x-tracegrad-call"]) == (answer.headers["x-tracegrad-call"], None)
    assert store.find_call(answer.json()["id"])[0] == answer.headers["x-tracegrad-call"]


def config_with(roles: dict[str, str], *models: str) -> Any:
    served = {
        name: {"checkpoint": "x", "engine": {"url": f"http://127.0.0.1:{8000 + number}"}}
        for number, name in enumerate(models)
    }
    return parse_config({"models": served, "roles": roles, "trainer": {"model": models[0]}})


def test_the_role_map_decides_then_the_name_then_the_only_model() -> None:
    two = config_with({"writer": "b"}, "a", "b")
    assert engine_of(two, "writer", "a") == "b"
    assert engine_of(two, None, "b") == "b"
    assert engine_of(two, "stranger", "a") == "a"
    assert engine_of(config_with({}, "a"), None, "gpt-4o") == "a"
    assert engine_of(config_with({"*": "b"}, "a", "b"), None, "gpt-4o") == "b"
    assert engine_of(config_with({"*": "b"}, "a", "b"), "anyone", "a") == "b"
