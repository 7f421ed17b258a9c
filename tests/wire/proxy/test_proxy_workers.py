"""`tracegrad proxy --workers 2`: one port, two proxies; the dead come back, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import kill_load
import pytest
from click.testing import CliRunner
from waits import gone, wait_for

from tracegrad.adapters.proxy.command import proxy as command
from tracegrad.adapters.proxy.worker_sockets import WorkerSockets
from tracegrad.adapters.proxy.workers import listen, reserve
from tracegrad.tracestore.store import Store

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def metrics(url: str) -> str:
    try:
        return httpx.get(f"{url}/metrics").text
    except httpx.TransportError:
        return ""


def in_flight(page: str) -> str:
    return "".join(line for line in page.splitlines() if line.startswith("tracegrad_calls_in_flight{"))


def test_two_workers_share_a_port_and_the_dead_come_back(
    tmp_path: Path, engine_url: str, engine_app: Any, store_url: str, store: Store
) -> None:
    config = kill_load.write_config(tmp_path, engine_url, store_url)
    process, url = kill_load.start_proxy(config, "--workers", "2")
    try:
        pids = kill_load.worker_pids(url)
        assert sorted(pids) == ["0", "1"]
        assert len(store.list_proxies()) == 2
        for number in range(12):  # a connection each, so that both are reached
            answer = httpx.post(f"{url}/run/r{number % 2}/v1/chat/completions", json=HELLO, timeout=20)
            assert answer.status_code == 200
        counted = [
            line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("tracegrad_calls_total{")
        ]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in counted) == 12
        assert {line.split('worker="')[1][0] for line in counted} == {"0", "1"}, "the kernel spread nothing"
        os.kill(pids["1"], signal.SIGKILL)
        wait_for(lambda: kill_load.worker_pids(url).get("1", pids["1"]) != pids["1"], "it is started again", 20)
        assert kill_load.worker_pids(url)["0"] == pids["0"]
        engine_app.gate = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(httpx.post, f"{url}/run/r0/v1/chat/completions", json=HELLO, timeout=20)
            wait_for(lambda: "} 1.0" in in_flight(metrics(url)), "the call is counted", 20)
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            engine_app.gate.set()
            assert last.result().status_code == 200, "a call that runs when the proxy is stopped is finished"
        assert process.wait(15) == 0
        wait_for(lambda: all(gone(pid) for pid in pids.values()), "no worker runs", 20)
    finally:
        process.kill()
    assert len(store.list_proxies()) == 1, "those that stop take their row away; the killed one's row expires"
    assert [len(store.trace(f"r{number}").calls) for number in range(2)] == [7, 6]


def test_while_the_first_worker_is_away_langsmith_is_asked_to_send_again(
    start_proxy: Callable[..., Any], tmp_path: Path
) -> None:
    proxy = start_proxy(sockets=WorkerSockets(tmp_path, own=1, count=2))
    answer = proxy.client.post("/run/r/langsmith/runs/multipart", content=b"x")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "worker_unavailable"
    assert proxy.client.post("/v1/chat/completions", json=HELLO).status_code == 200


def test_no_worker_outlives_a_parent_that_is_killed(tmp_path: Path, engine_url: str, store_url: str) -> None:
    process, url = kill_load.start_proxy(kill_load.write_config(tmp_path, engine_url, store_url), "--workers", "2")
    pids = kill_load.worker_pids(url)
    process.kill()
    process.wait(10)
    wait_for(lambda: all(gone(pid) for pid in pids.values()), "no worker runs", 20)


def test_a_worker_that_never_serves_ends_all_of_them_and_says_why(tmp_path: Path) -> None:
    """The store's folder vanishes after the parent looked: each start fails."""
    script = (
        "import sys; from tracegrad.adapters.proxy import workers; "
        "from tracegrad.adapters.supervisor import RestartPolicy; "
        "workers.POLICY = RestartPolicy(max_restarts=1, first_wait_s=0.01); workers._MODULE = 'no.such.module'; "
        "from tracegrad.adapters.proxy.command import proxy; proxy()"
    )
    config = kill_load.write_config(tmp_path, "http://127.0.0.1:9", f"sqlite:///{tmp_path / 's.db'}")
    arguments = ["--config", str(config), "--port", "0", "--workers", "2", "--log-format", "json"]
    argv = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    last = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")][-1]
    assert "gave up" in last["message"] and "times in a row; its messages are above" in last["message"]
    assert last["worker"] in ("0", "1") and last["level"] == "error"
    assert "No module named" in done.stderr


def test_a_reserved_port_takes_no_connection_and_is_refused_where_somebody_listens() -> None:
    with reserve("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")
        with listen("127.0.0.1", port, shared=True, backlog=1):
            with pytest.raises(OSError, match="in use"):
                reserve("127.0.0.1", port)
            listen("127.0.0.1", port, shared=True, backlog=1).close()


def test_workers_of_a_taken_port_are_refused(tmp_path: Path, engine_url: str, store_url: str) -> None:
    port = engine_url.rsplit(":", 1)[1]
    config = kill_load.write_config(tmp_path, engine_url, store_url)
    result = CliRunner().invoke(command, ["--config", str(config), "--port", port, "--workers", "2"])
    assert result.exit_code == 1 and f"cannot listen on 127.0.0.1:{port}" in result.output
