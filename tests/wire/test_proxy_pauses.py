"""What an app notices of a publish or of an engine that is away: nothing, for 5, 60 and 100 s. With the fake engine.

The app is LangChain's `ChatOpenAI` as people use it: sync, async and streaming, with no time-out of its own, and with
one that is shorter than the pause (then the SDK's two retries have to carry it over).
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kill_load
import openai
import pytest
from langchain_openai import ChatOpenAI
from versions import next_version
from waits import wait_for

from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.heartbeat import Pulse

LONG = (pytest.mark.long, pytest.mark.timeout(900))
PAUSES = [
    pytest.param(5.0, None),
    pytest.param(5.0, 2.0),
    *(pytest.param(pause_s, timeout_s, marks=LONG) for pause_s in (60.0, 100.0) for timeout_s in (None, 20.0)),
]


class Engine:
    """The fake engine as a process that can be killed and started again at its address."""

    def __init__(self, token_delay_s: float = 0.02) -> None:
        self._delay_s = token_delay_s
        self.process, self.url = kill_load.start_engine(token_delay_s)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def start(self) -> None:
        command = [sys.executable, str(kill_load.SUPPORT / "fake_vllm.py"), "--name", "main"]
        command += ["--port", self.url.rpartition(":")[2], "--token-delay-s", str(self._delay_s)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == self.url


class House:
    """One engine, one proxy, one store."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine()
        self.store: Store = open_store(f"sqlite:///{folder}/store.db")
        self.proxy, self.url = kill_load.start_proxy(kill_load.write_config(folder, self.engine.url, self.store.url))

    def close(self) -> None:
        self.proxy.terminate()
        self.proxy.wait(20)
        self.engine.kill()
        self.store.close()

    def model(self, run_id: str, timeout_s: float | None = None) -> ChatOpenAI:
        url = f"{self.url}/run/{run_id}/v1"
        return ChatOpenAI(base_url=url, api_key="none", model="main", timeout=timeout_s)  # type: ignore[arg-type]

    @contextmanager
    def paused(self, cause: str) -> Iterator[None]:
        if cause == "engine":
            self.engine.kill()
            yield
            self.engine.start()
            return
        publish_id = self.store.request_publish(next_version(self.store)).publish_id
        self.store.advance_publish(publish_id, "draining")
        wait_for(lambda: not self.store.waiting_proxies(publish_id, 10.0), "it is acknowledged")
        with Pulse(lambda: self.store.beat_publishes([publish_id]), name="publish"):
            yield
        self.store.advance_publish(publish_id, "swapping")
        self.store.advance_publish(publish_id, "live")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    opened = House(tmp_path)
    yield opened
    opened.close()


def sync_plain(model: ChatOpenAI, text: str) -> Any:
    return model.invoke(text).content


def sync_stream(model: ChatOpenAI, text: str) -> Any:
    return "".join(str(chunk.content) for chunk in model.stream(text))


def async_plain(model: ChatOpenAI, text: str) -> Any:
    return asyncio.run(model.ainvoke(text)).content  # type: ignore[arg-type]


def async_stream(model: ChatOpenAI, text: str) -> Any:
    async def read() -> str:
        return "".join([str(chunk.content) async for chunk in model.astream(text)])

    return asyncio.run(read())


WAYS: list[Callable[[ChatOpenAI, str], Any]] = [sync_plain, sync_stream, async_plain, async_stream]


@pytest.mark.parametrize("cause", ["publish", "engine"])
@pytest.mark.parametrize(("pause_s", "timeout_s"), PAUSES)
def test_an_app_does_not_notice_a_pause(house: House, cause: str, pause_s: float, timeout_s: float | None) -> None:
    answers: dict[str, Future[Any]] = {}
    with ThreadPoolExecutor(8) as pool:
        with house.paused(cause):
            for way in WAYS:
                run_id = way.__name__
                answers[run_id] = pool.submit(way, house.model(run_id, timeout_s), f"who? {run_id}")
            time.sleep(pause_s)
            assert not any(answer.done() for answer in answers.values()), "each of them is held"
        for run_id, answer in answers.items():
            assert answer.result(120) == f"0: who? {run_id}"
    live = house.store.live_version("main")
    for run_id in answers:
        (call,) = house.store.trace(run_id).calls
        assert (call.status, call.quarantine, call.retry_of) == ("complete", None, None)
        assert call.version_dispatched == (live.version_id if live else None)


def test_an_engine_killed_in_the_middle(house: House) -> None:
    """A stream that has begun ends in the SDK's error; a plain call is sent again, held, and answered."""
    text = "a long question " * 8
    with ThreadPoolExecutor(4) as pool:
        stream = pool.submit(lambda: list(house.model("stream").stream(text)))
        plain = pool.submit(sync_plain, house.model("plain"), text)
        time.sleep(0.8)
        house.engine.kill()
        with pytest.raises(openai.APIError, match="engine of model 'main'"):
            stream.result(20)
        assert not plain.done()
        time.sleep(1.0)
        house.engine.start()
        assert plain.result(30) == f"0: {text}"
    (broken,) = house.store.trace("stream").calls
    assert broken.status == "failed" and 0 < len(broken.choices[0].token_ids) < len(text)
    failed, complete = house.store.trace("plain").calls
    assert (failed.status, complete.status, complete.retry_of) == ("failed", "complete", failed.call_id)
    assert sync_stream(house.model("stream"), "again") == "0: again"
