"""A publisher that is killed or stopped, and nobody starts another: as long as nothing was swapped, calls go on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_swaps import save_answers
from versions import add_version
from waits import wait_for

from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.publishes import SILENT_LIVES
from tracegrad.tracestore.records import Publish
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.publish import Publisher

PROGRAM = str(Path(__file__).parents[2] / "support" / "one_publish.py")
EXPIRES_S = 1.0
SILENT_S = SILENT_LIVES * EXPIRES_S


class House:
    """A proxy, an engine that serves a live version, and a publisher of the next one in a process of its own."""

    def __init__(
        self, start: Callable[..., SimpleNamespace], store: Store, engine: Any, url: str, folder: Path
    ) -> None:
        self.store, self.engine, self.url, self.folder = store, engine, url, folder
        engine.version = "default"
        self.live = self.version("old weights", 0)
        self.publisher = Publisher(store, "main", [EngineClient(url, "main", timeout_s=5)], PublishConfig())
        self.publisher.publish(self.live)
        engine.swapped_in.clear()
        self.proxy = start(proxy={"heartbeat_expires_s": EXPIRES_S})
        self.process: subprocess.Popen[str] | None = None

    def version(self, answer: str, step: int) -> int:
        path = save_answers(self.folder / answer, answer)
        return add_version(self.store, path, step, model="main", kind="step").version_id

    def publish(self, *, waits_in: str) -> "subprocess.Popen[str]":
        """Let the next version be published by another process, until it is in a state."""
        version = self.version("new weights", 1)
        command = [sys.executable, PROGRAM, self.store.url, self.url, str(version), str(EXPIRES_S), waits_in]
        self.process = process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while (line := process.stdout.readline().strip()) != waits_in:
            assert line, f"the publisher ended with status {process.wait()}"
        return process

    def ask(self, run_id: str) -> httpx.Response:
        body = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}
        answer: httpx.Response = self.proxy.client.post(f"/run/{run_id}/v1/chat/completions", json=body)
        return answer

    def was_answered_by_the_live_version(self, run_id: str) -> bool:
        (call,) = self.store.trace(run_id).calls
        return (call.version_dispatched, call.version_completed, call.quarantine) == (self.live, self.live, None)

    def last(self) -> Publish:
        last = self.store.last_publish("main")
        assert last is not None
        return last


@pytest.fixture
def house(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, engine_url: str, tmp_path: Path
) -> Iterator[House]:
    house = House(start_proxy, store, engine_app, engine_url, tmp_path)
    yield house
    if house.process is not None:
        house.process.kill()
        house.process.wait()


def test_calls_held_for_a_publisher_that_was_killed_are_answered_by_what_serves(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """It waited for a call; nobody starts a trainer again, and no call of its clients gets an error."""
    house.engine.gate = threading.Event()
    before = pool.submit(house.ask, "before")
    wait_for(lambda: house.engine.in_flight == 1, "the first call is with the engine")
    publisher = house.publish(waits_in="draining")
    wait_for(lambda: house.proxy.app.hold.gates["main"].holding, "the proxy holds")
    held = pool.submit(house.ask, "held")
    os.kill(publisher.pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: house.engine.in_flight == 2, "the held call is with the engine", limit_s=SILENT_S + 10)
    assert time.monotonic() - killed > SILENT_S / 2, "it had been heard of a moment ago"
    house.engine.gate.set()
    assert [held.result(10).status_code, before.result(10).status_code] == [200, 200]
    assert house.was_answered_by_the_live_version("held") and house.was_answered_by_the_live_version("before")
    last = house.last()
    assert last.state == "failed" and last.error is not None
    assert last.error.startswith("its publisher was silent for ") and last.error.endswith("; nothing was swapped")
    house.engine.gate = None
    house.publisher.publish(house.version("newer weights", 2))
    assert house.ask("after").status_code == 200, "and the next publish is not in its way"


def test_a_publisher_that_was_stopped_wakes_and_is_refused(house: House, pool: ThreadPoolExecutor) -> None:
    publisher = house.publish(waits_in="draining")
    assert publisher.stdin is not None and publisher.stdout is not None
    wait_for(lambda: not house.store.waiting_proxies(house.last().publish_id, 10), "the drain is acknowledged")
    held = pool.submit(house.ask, "held")
    time.sleep(SILENT_S + 0.5)
    assert (house.last().state, held.done()) == ("draining", False), "it waits, and is heard of"
    os.kill(publisher.pid, signal.SIGSTOP)
    assert held.result(SILENT_S + 10).status_code == 200
    assert house.was_answered_by_the_live_version("held")
    ended = house.last()
    os.kill(publisher.pid, signal.SIGCONT)
    said, _ = publisher.communicate("\n", timeout=20)
    assert said.splitlines()[-1] == f"publish {ended.publish_id} of version {ended.version_id} failed: {ended.error}"
    assert (house.last(), publisher.returncode, house.engine.swapped_in) == (ended, 0, [])
    assert house.engine.version == str(house.live)


def test_what_a_killed_publisher_may_have_swapped_stays_held(house: House, pool: ThreadPoolExecutor) -> None:
    """Until somebody puts back what serves: nobody knows what the engine has."""
    publisher = house.publish(waits_in="swapping")
    os.kill(publisher.pid, signal.SIGKILL)
    held = pool.submit(house.ask, "held")
    time.sleep(SILENT_S + 1.0)
    assert (house.last().state, held.done()) == ("swapping", False)
    house.publisher.recover()
    assert held.result(10).status_code == 200
    assert house.was_answered_by_the_live_version("held")
