"""`/metrics`: what happened to calls, with bounded labels; and the log lines that name them."""

import asyncio
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from tracegrad.adapters.proxy.log_lines import JsonLines, TextLines, facts
from tracegrad.adapters.proxy.metrics import MOST_REASONS, ProxyMetrics
from tracegrad.adapters.proxy.metrics_page import MetricsPage, joined
from tracegrad.adapters.proxy.worker_sockets import WorkerSockets
from tracegrad.tracestore.config import RoleRule, parse_config
from tracegrad.tracestore.errors import StoreUnavailable
from tracegrad.tracestore.records import Attribution
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import make_call, sql

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
CONFIG = parse_config({"models": {"main": {"checkpoint": "none"}}, "roles": {"planner": "main", "*": "main"}})
RULED = structs.replace(CONFIG, role_rules=(RoleRule(role="judge", node="grade"),))


def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The page as Prometheus reads it; a series that stands twice fails."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "worker")))
            assert key not in found or sample.labels.get("worker") is not None, f"{key} stands twice"
            found[key] = found.get(key, 0.0) + sample.value
    return found


def value(page: str, name: str, **labels: str) -> float | None:
    return samples(page).get((name, tuple(sorted(labels.items()))))


def call_count(page: str, **changed: str) -> float | None:
    labels = {"model": "main", "role": "other", "endpoint": "chat", "status": "complete", "quarantine": ""}
    return value(page, "tracegrad_calls_total", **{**labels, **changed})


def test_calls_are_counted_by_how_they_ended(proxy: SimpleNamespace, engine_app: Any, engine_url: str) -> None:
    for _ in range(2):
        assert proxy.client.post("/run/r/role/a/v1/chat/completions", json=HELLO).status_code == 200
    proxy.client.post("/v1/chat/completions", json={**HELLO, "stream": True}).read()
    engine_app.fault = "no_token_ids"
    proxy.client.post("/run/r/role/a/v1/chat/completions", json=HELLO)
    assert proxy.client.get("/elsewhere").status_code == 404
    answer = proxy.client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    page = answer.text
    assert call_count(page) == 2
    assert call_count(page, role="none") == 1
    quarantined = {k: v for k, v in samples(page).items() if k[0] == "tracegrad_calls_total" and v == 1}
    assert sorted(dict(labels)["quarantine"] for _, labels in quarantined) == ["", "no prompt ids"]
    assert value(page, "tracegrad_call_seconds_count", model="main", role="other") == 3
    assert value(page, "tracegrad_first_token_seconds_count", model="main", role="none") == 1
    assert value(page, "tracegrad_first_token_seconds_count", model="main", role="other") is None
    assert value(page, "tracegrad_hold_seconds_count", model="main") == 4
    assert value(page, "tracegrad_commit_seconds_count") == 4
    assert value(page, "tracegrad_store_commits_total") == 4
    assert value(page, "tracegrad_commit_backlog") == 0
    assert value(page, "tracegrad_calls_in_flight", model="main") == 0
    assert value(page, "tracegrad_model_holding", model="main") == 0
    assert value(page, "tracegrad_calls_waiting", model="main") == 0
    assert value(page, "tracegrad_engine_up", model="main", engine=engine_url) == 1
    assert value(page, "tracegrad_runs_open") == 1
    assert value(page, "tracegrad_store_up") == 1
    assert value(page, "tracegrad_worker_up") == 1
    assert value(page, "tracegrad_proxy_info", proxy_id=proxy.app.proxy_id, pid=str(os.getpid())) == 1
    assert value(page, "tracegrad_http_answers_total", path="/v1/chat/completions", code="200") == 4
    assert value(page, "tracegrad_http_answers_total", path="other", code="404") == 1
    assert value(page, "tracegrad_live_version", model="main") is None, "no version is live: absent, not 0"
    assert '"r"' not in page, "a run id must never be a label"


def test_an_answer_that_is_withheld_is_counted_and_logged_with_its_ids(
    start_proxy: Callable[..., SimpleNamespace], blocked_store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start_proxy(store_object=blocked_store)
    blocked_store.error = StoreUnavailable("the disk is full")
    blocked_store.let_go.set()
    assert proxy.client.post("/run/r7/role/planner/v1/chat/completions", json=HELLO).status_code == 503
    page = proxy.client.get("/metrics").text
    assert value(page, "tracegrad_calls_not_recorded_total", model="main") == 1
    assert call_count(page) is None
    (record,) = [record for record in caplog.records if "could not be recorded" in record.message]
    known = record.__dict__["facts"]
    assert (known["run_id"], known["role"], known["model"]) == ("r7", "planner", "main")
    assert known["call_id"] in record.message


def test_a_store_that_is_away_is_said_and_its_counts_are_absent(proxy: SimpleNamespace, store: Store) -> None:
    sql(store, "ALTER TABLE runs RENAME TO away")
    page = proxy.client.get("/metrics").text
    assert value(page, "tracegrad_store_up") == 0
    assert value(page, "tracegrad_runs_open") is None


def test_labels_are_bounded() -> None:
    metrics = ProxyMetrics(RULED, proxy_id="p")
    for number in range(MOST_REASONS + 20):
        call = make_call(f"c{number}", "r", role=f"role{number}", model=f"model{number}", quarantine=f"why {number}")
        metrics.recorded(call, 0.001)
    for role in ("planner", "judge"):
        metrics.recorded(make_call("c", "r", role=role), 0.001)
    counted = [k for k in samples(metrics.render()) if k[0] == "tracegrad_calls_total"]
    assert len(counted) == MOST_REASONS + 3
    assert {dict(labels)["role"] for _, labels in counted} == {"planner", "judge", "other"}
    assert {dict(labels)["model"] for _, labels in counted} == {"main", "other"}


def test_the_pages_of_workers_are_put_together(store: Store, tmp_path: Path) -> None:
    """Worker 1 answers over its socket, worker 2 is dead; each family's head stands once."""

    async def ask() -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            body = other.render().encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
            writer.close()

        sockets = WorkerSockets(tmp_path, own=0, count=3)
        sockets.path(2).touch()
        async with await asyncio.start_unix_server(serve, str(sockets.path(1))):
            return (await MetricsPage(own, store, "default", sockets).render()).decode()

    own, other = (ProxyMetrics(CONFIG, proxy_id=f"p{n}", worker=str(n)) for n in range(2))
    own.recorded(make_call("a", "r"), 0.001)
    for _ in range(2):
        other.recorded(make_call("b", "r"), 0.001)
    page = asyncio.run(ask())
    assert call_count(page) == 3
    assert page.count("# TYPE tracegrad_calls_total ") == 1
    up = [line for line in page.splitlines() if line.startswith("tracegrad_worker_up")]
    assert up == [f'tracegrad_worker_up{{worker="{n}"}} {int(n < 2)}' for n in range(3)]
    assert joined([page]) == page


@pytest.fixture
def lines() -> Iterator[Callable[[logging.Formatter], io.StringIO]]:
    """Attach a formatter to a logger of ours; returns what is written."""
    logger = logging.getLogger("tracegrad.test")
    logger.setLevel(logging.INFO)
    added: list[logging.Handler] = []

    def attach(formatter: logging.Formatter) -> io.StringIO:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        added.append(handler)
        return stream

    yield attach
    for handler in added:
        logger.removeHandler(handler)


def test_lines_are_text_or_json_with_the_facts(lines: Callable[[logging.Formatter], io.StringIO]) -> None:
    json_lines, text_lines = lines(JsonLines(worker="1")), lines(TextLines(worker="1"))
    logger = logging.getLogger("tracegrad.test")
    logger.info("call %s", "complete", extra=facts(run_id="r1", role=None, seconds=0.5))
    try:
        raise ValueError("odd\nvalue")
    except ValueError:
        logger.exception("broken")
    first, second = map(json.loads, json_lines.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info", "logger": "tracegrad.test", "message": "call complete", "worker": "1", "run_id": "r1",
        "seconds": 0.5,
    }  # fmt: skip
    assert "ValueError: odd\nvalue" in second["exception"]
    assert text_lines.getvalue().splitlines()[0].endswith(" INFO call complete worker=1 run_id=r1 seconds=0.5")
    assert "Traceback" in text_lines.getvalue()


def test_each_call_has_a_line_when_asked_for(proxy: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    proxy.client.post("/run/r/role/planner/v1/chat/completions", json=HELLO)
    assert [record for record in caplog.records if record.name == "tracegrad.proxy.access"] == []
    with caplog.at_level(logging.INFO, logger="tracegrad.proxy.access"):
        answer = proxy.client.post("/run/r/role/planner/v1/chat/completions", json=HELLO)
    (record,) = [record for record in caplog.records if record.name == "tracegrad.proxy.access"]
    known = record.__dict__["facts"]
    assert record.message == "call complete"
    assert known["call_id"] == answer.headers["x-tracegrad-call"]
    assert (known["run_id"], known["role"], known["model"], known["stream"]) == ("r", "planner", "main", False)
    assert known["sampled_tokens"] > 0
    assert "hello" not in str(known)


def test_a_call_without_a_run_has_a_line_too() -> None:
    call = replace(make_call("c", None), attribution=Attribution())
    metrics = ProxyMetrics(CONFIG, proxy_id="p")
    metrics.recorded(call, 0.001)
    assert call_count(metrics.render(), role="none") == 1
