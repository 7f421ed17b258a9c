"""The LangSmith doors: bodies as clients compress them, what is refused, and trees that come in any order."""

import gzip
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import kill_load
import pytest
import zstandard
from away_store import AwayStore
from langsmith_trees import TRACE, form, tree
from waits import wait_for

from tracegrad.adapters.proxy import langsmith, langsmith_wire
from tracegrad.adapters.proxy.langsmith_wire import read_multipart
from tracegrad.tracestore.store import Store

ASK = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}


def post(proxy: SimpleNamespace, body: bytes, **headers: str) -> int:
    headers = {"content-type": "multipart/form-data; boundary=B", **headers}
    return int(proxy.client.post("/langsmith/runs/multipart", content=body, headers=headers).status_code)


def call(proxy: SimpleNamespace) -> str:
    return str(proxy.client.post("/v1/chat/completions", json=ASK).json()["id"])


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "identity": lambda body: body,
    "gzip": gzip.compress,
    "GZIP": lambda body: gzip.compress(body[:50]) + gzip.compress(body[50:]),
    "deflate": zlib.compress,
    "zstd": lambda body: zstandard.ZstdCompressor().compress(body),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_tree_in_each_encoding(proxy: SimpleNamespace, store: Store, encoding: str) -> None:
    completion_id = call(proxy)
    body = ENCODINGS[encoding](form(tree(completion_id)))
    assert post(proxy, body, **{"content-encoding": encoding}) == 202
    trace = store.trace(TRACE)
    assert trace.run.status == "closed"
    (found,) = trace.calls
    assert (found.attribution.role, found.attribution.run_source) == ("writer", "langsmith")
    assert [(span.kind, span.name, span.output) for span in trace.spans] == [
        ("graph", "LangGraph", {"a": "LangGraph"}), ("node", "writer", {"a": "writer"}),
    ]  # fmt: skip


def test_a_batch_and_single_runs_say_the_same(proxy: SimpleNamespace, store: Store) -> None:
    starts, ends = tree(ended=False), tree(call(proxy))
    assert proxy.client.post("/langsmith/runs/batch", json={"post": starts, "patch": ends}).status_code == 202
    expected = store.trace(TRACE)
    assert expected.run.status == "closed" and len(expected.calls) == 1
    for run in starts:
        assert proxy.client.post("/langsmith/runs", json=run).status_code == 202
    for run in ends:
        body = {name: value for name, value in run.items() if name != "id"}
        assert proxy.client.patch(f"/langsmith/runs/{run['id']}", json=body).status_code == 202
    assert store.trace(TRACE) == expected, "told again it is the same"


def test_what_a_client_asks_first(proxy: SimpleNamespace) -> None:
    said = proxy.client.get("/langsmith/info").json()
    assert said["batch_ingest_config"]["use_multipart_endpoint"] is True
    assert said["instance_flags"] == {"zstd_compression_enabled": True, "gzip_body_enabled": True}
    assert proxy.client.post("/langsmith/info").status_code == 405
    assert proxy.client.get("/langsmith/settings").status_code == 404


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
def test_a_bomb_is_refused(start_proxy: Callable[..., SimpleNamespace], encoding: str) -> None:
    proxy = start_proxy(proxy={"limits": {"max_body_bytes": 1_000_000}})
    bomb = ENCODINGS[encoding](bytes(5_000_000))
    assert len(bomb) < 20_000
    assert post(proxy, bomb, **{"content-encoding": encoding}) == 413


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"not gzip", {"content-encoding": "gzip"}, 400),
        (gzip.compress(b"x" * 1000, mtime=0)[:-20], {"content-encoding": "gzip"}, 400),
        (b"not zstd", {"content-encoding": "zstd"}, 400),
        (b"x", {"content-encoding": "br"}, 400),
        (b"x", {"content-type": "application/json"}, 400),
        (b"", {}, 202),
    ],
)
def test_what_is_no_form_is_refused(proxy: SimpleNamespace, body: bytes, headers: dict[str, str], status: int) -> None:
    assert post(proxy, body, **headers) == status


def test_zstd_is_offered_only_where_it_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert langsmith.info()["instance_flags"] == {"zstd_compression_enabled": False, "gzip_body_enabled": True}


def test_a_part_that_cannot_be_read_does_not_take_the_others_with_it() -> None:
    runs = tree()
    body = form(runs).replace(b'{"q": "writer"}', b"{broken}")
    body = body.replace(b"--B--", b'--B\r\ncontent-disposition: form-data; name="post.no-uuid"\r\n\r\n{}\r\n--B--')
    body = body.replace(b"--B--", b'--B\r\nContent-Disposition: form-data; name="attachment.1.x"\r\n\r\n\0\r\n--B--')
    posted = read_multipart(body, b"multipart/form-data; boundary=B")
    assert [part.name for part in posted.parts] == ["LangGraph", "writer", "ChatOpenAI"]
    assert posted.unread == 2
    graph, node, model = posted.parts
    assert (node.inputs, node.outputs, node.parent_id) == (None, {"a": "writer"}, graph.run_id)
    assert model.ancestors == (graph.run_id, node.run_id) and graph.is_root and not node.is_root
    assert graph.started_at == pytest.approx(1795371677.050231)
    assert langsmith_wire._seconds(1795371677050) == pytest.approx(1795371677.05)
    assert langsmith_wire._seconds("2026-11-22T18:21:17") == 1795371677.0


def test_parts_wait_until_the_trace_has_a_run(proxy: SimpleNamespace, store: Store) -> None:
    assert post(proxy, form(tree(ended=False))) == 202
    assert store.list_runs() == []
    assert post(proxy, form(tree(call(proxy))[2:], "patch")) == 202
    trace = store.trace(TRACE)
    assert (trace.run.status, len(trace.calls), [span.output for span in trace.spans]) == ("open", 1, [None, None])
    assert post(proxy, form(tree()[:2], "patch")) == 202
    assert store.trace(TRACE).run.status == "closed"


def test_parts_that_nobody_claims_get_a_run_in_the_end(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(langsmith, "HOLD_S", 0.05)
    monkeypatch.setattr("tracegrad.adapters.proxy.app.JOIN_S", 0.02)
    assert post(start_proxy(), form(tree(ended=False))) == 202
    wait_for(store.list_runs, "there is a run")
    assert [span.name for span in store.trace(TRACE).spans] == ["LangGraph", "writer"]


def test_what_waits_is_written_when_the_proxy_stops(proxy: SimpleNamespace, store: Store, stack: Any) -> None:
    assert post(proxy, form(tree(ended=False))) == 202
    assert store.list_runs() == []
    stack.close()
    assert [span.name for span in store.trace(TRACE).spans] == ["LangGraph", "writer"]


def test_two_proxies_that_get_parts_of_one_trace_make_one_run_of_it(
    start_proxy: Callable[..., SimpleNamespace], store: Store, stack: Any
) -> None:
    one, other = start_proxy(), start_proxy()
    ends = [{name: value for name, value in run.items() if name != "inputs"} for run in tree(call(one))]
    assert post(one, form(tree(ended=False))) == 202
    assert post(other, form(ends, "patch")) == 202
    assert store.trace(TRACE).run.status == "closed"
    stack.close()
    (summary,) = store.list_runs()
    trace = store.trace(summary.run.run_id)
    assert [(span.name, span.input, span.output) for span in trace.spans] == [
        ("LangGraph", {"q": "LangGraph"}, {"a": "LangGraph"}), ("writer", {"q": "writer"}, {"a": "writer"}),
    ]  # fmt: skip
    assert trace.calls[0].attribution.span is not None and trace.calls[0].attribution.span.name == "writer"


def test_a_fact_that_comes_before_its_call_is_joined(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracegrad.adapters.proxy.app.JOIN_S", 0.02)
    proxy = start_proxy()
    assert post(proxy, form(tree("chatcmpl-early"))) == 202
    assert store.trace(TRACE).calls == ()
    headers = {"x-request-id": "early"}
    assert proxy.client.post("/v1/chat/completions", json=ASK, headers=headers).json()["id"] == "chatcmpl-early"
    wait_for(lambda: store.trace(TRACE).calls, "the call is joined")
    assert store.trace(TRACE).calls[0].attribution.role == "writer"


def test_a_store_that_is_away_is_a_503_and_the_client_sends_again(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    away = AwayStore(store, "put_spans", "attribute_late")
    proxy = start_proxy(store_object=away)
    body = form(tree(call(proxy)))
    assert post(proxy, body) == 503
    away.away = False
    assert post(proxy, body) == 202
    trace = store.trace(TRACE)
    assert (trace.run.status, len(trace.calls), len(trace.spans)) == ("closed", 1, 2)


def test_a_key_posts_into_its_own_project_and_into_no_other(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    proxy = start_proxy(proxy={"access": {"keys": "on"}})
    ours, theirs, reader = (
        {"x-api-key": store.create_key(scopes=(scope,), project=project)[0]}
        for scope, project in (("call", "ours"), ("call", "theirs"), ("read", "ours"))
    )
    body = form(tree())
    assert post(proxy, body) == 401
    assert post(proxy, body, **reader) == 403
    assert post(proxy, body, **ours) == 202
    assert store.get_run(TRACE).project == "ours"
    told = store.trace(TRACE)
    assert post(proxy, body.replace(b'"writer"', b'"forged"'), **theirs) == 202
    assert post(proxy, body, **theirs, **{"x-tracegrad-run": TRACE}) == 404
    span = {"spans": [{"span_id": told.spans[0].span_id, "name": "forged"}]}
    for key, status in ((theirs, 404), (reader, 403)):
        answer = proxy.client.post(f"/tracegrad/v1/runs/{TRACE}/spans", json=span, headers=key)
        assert answer.status_code == status
    assert store.trace(TRACE) == told


def test_many_traces_do_not_stay_in_memory(
    proxy: SimpleNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(langsmith, "MAX_TRACES", 3)
    for number in range(10, 16):
        run = {**tree(ended=False)[0], "id": str(uuid.UUID(int=number)), "trace_id": str(uuid.UUID(int=number))}
        run["dotted_order"] = f"20261122T182117036547Z{run['id']}"
        assert post(proxy, form([run])) == 202
    assert len(proxy.app.langsmith._traces) == 3


def test_what_a_tree_tells_is_redacted(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    proxy = start_proxy(redact=[{"pattern": "writer", "with": "[name]"}])
    assert post(proxy, form(tree(call(proxy)))) == 202
    told = {span.span_id: (span.input, span.output) for span in store.trace(TRACE).spans}
    assert ({"q": "[name]"}, {"a": "[name]"}) in told.values() and "writer" not in str(told)


def test_the_parts_of_a_langsmith_trace_meet_whichever_worker_gets_them(
    tmp_path: Path, engine_url: str, engine_app: Any, store_url: str, store: Store
) -> None:
    """Each part on a connection of its own: starts, then ends, as one process would get them."""
    process, url = kill_load.start_proxy(kill_load.write_config(tmp_path, engine_url, store_url), "--workers", "2")
    try:
        for run in tree(ended=False):
            assert httpx.post(f"{url}/langsmith/runs", json=run, timeout=20).status_code == 202
        completion_id = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=20).json()["id"]
        for run in reversed(tree(completion_id)):
            body = {name: value for name, value in run.items() if name != "id"}
            answer = httpx.patch(f"{url}/langsmith/runs/{run['id']}", json=body, timeout=20)
            assert (answer.status_code, answer.json()) == (202, {})
        assert httpx.get(f"{url}/langsmith/info", timeout=20).status_code == 200
        assert httpx.get(f"{url}/langsmith/elsewhere?a=b", timeout=20).status_code == 404
        page = httpx.get(f"{url}/metrics", timeout=20).text
        counted = [line for line in page.splitlines() if 'path="/langsmith/"' in line]
        assert counted and all('worker="0"' in line for line in counted)
    finally:
        process.kill()
    trace = store.trace(TRACE)
    assert trace.run.status == "closed"
    assert [(span.kind, span.name, span.output) for span in trace.spans] == [
        ("graph", "LangGraph", {"a": "LangGraph"}), ("node", "writer", {"a": "writer"}),
    ]  # fmt: skip
    assert [call.completion_id for call in trace.calls] == [completion_id]
