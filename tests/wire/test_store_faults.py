"""Law 3 while the store fails under load: a full disk, and a database that crashes and comes back.

Whoever cannot be recorded is refused with a 503 that says what to do; nothing that was answered is lost, nothing is
stored twice, and the same proxy goes on once there is room, or the database, again. With the fake engine.
"""

import asyncio
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import kill_load
import pytest
from own_postgres import OwnPostgres, is_installed

from tracegrad.tracestore.store import open_store

PATIENCE_S = 60.0
DISK_MB = 8
SEEN = 30
"""Answers that are read before, and again after; and refusals in between."""


class SmallDisk:
    """A disk of a few megabytes (tmpfs), and what fills it. Needs the right to mount."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a tmpfs")
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
        self.filler = folder / "filler"

    def fill(self, _proxy: int) -> None:
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def free(self, _proxy: int) -> None:
        self.filler.unlink()


class SmallFiles:
    """Where nobody may mount: the proxy's files may not grow any more. SQLite calls that an I/O error."""

    def __init__(self, folder: Path, _stack: ExitStack) -> None:
        self.folder = folder

    def fill(self, proxy: int) -> None:
        hard = resource.prlimit(proxy, resource.RLIMIT_FSIZE)[1]
        largest = max(path.stat().st_size for path in self.folder.iterdir())
        resource.prlimit(proxy, resource.RLIMIT_FSIZE, (largest, hard))

    def free(self, proxy: int) -> None:
        hard = resource.prlimit(proxy, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(proxy, resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


@contextmanager
def served(folder: Path, store_url: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A proxy in a process of its own, and its URL."""
    open_store(store_url).close()
    engine, engine_url = kill_load.start_engine(0.002)
    try:
        proxy, url = kill_load.start_proxy(kill_load.write_config(folder, engine_url, store_url))
        try:
            yield proxy, url
            proxy.terminate()
            assert proxy.wait(30) in (0, -signal.SIGTERM)
        finally:
            proxy.kill()
            proxy.wait()
    finally:
        engine.kill()
        engine.wait()


async def until(true: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.02)
    assert true(), what


async def fail_under_load(url: str, fail: Callable[[], None], mend: Callable[[], None]) -> kill_load.Finished:
    """Answers, then refusals while it fails, then answers again."""
    finished, stop = kill_load.Finished(), asyncio.Event()
    loading = asyncio.create_task(kill_load.load(url, finished, stop, clients=8))
    answered = finished.completion_ids
    await until(lambda: len(answered) >= SEEN, "answers")
    await asyncio.to_thread(fail)
    await until(lambda: len(finished.refused) >= SEEN, "refusals")
    await asyncio.to_thread(mend)
    mended = len(answered)
    await until(lambda: len(answered) >= mended + SEEN, "answers again")
    stop.set()
    await asyncio.wait_for(loading, 30)
    return finished


def check(store_url: str, finished: kill_load.Finished, advice: str) -> None:
    statuses = {status for status, _ in finished.refused}
    assert statuses <= {200, 503}, finished.refused[:3]  # 200: the stream had begun, its error came in the stream
    assert 503 in statuses
    unclear = [text for _, text in finished.refused if advice not in text]
    assert unclear == [], unclear[:3]
    first = next(text for status, text in finished.refused if status == 503)
    assert set(json.loads(first)["error"]) >= {"message", "code"}
    kill_load.compare(store_url, finished.completion_ids, finished.broken, seed=0, moments=1)
    store = open_store(store_url)
    assert store.check() == []
    store.close()


@pytest.mark.parametrize("small", [SmallDisk, SmallFiles])
def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, stack: ExitStack, small: Callable[[Path, ExitStack], SmallDisk | SmallFiles]
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = small(folder, stack)
    store_url = f"sqlite:///{folder}/store.db"
    with served(tmp_path, store_url) as (proxy, url):
        finished = asyncio.run(fail_under_load(url, lambda: disk.fill(proxy.pid), lambda: disk.free(proxy.pid)))
    check(store_url, finished, "has room")


@pytest.mark.skipif(not is_installed(), reason="PostgreSQL's packages are not installed")
def test_a_database_that_crashes_and_comes_back(tmp_path: Path, stack: ExitStack) -> None:
    database = stack.enter_context(OwnPostgres())
    with served(tmp_path, database.url) as (_, url):
        finished = asyncio.run(fail_under_load(url, database.crash, database.revive))
    check(database.url, finished, "check that it is reachable")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ or not is_installed(), reason="make test-long")
def test_a_database_that_crashes_ten_times(tmp_path: Path, stack: ExitStack) -> None:
    database = stack.enter_context(OwnPostgres())
    with served(tmp_path, database.url) as (_, url):
        for _ in range(10):
            finished = asyncio.run(fail_under_load(url, database.crash, database.revive))
            check(database.url, finished, "check that it is reachable")
