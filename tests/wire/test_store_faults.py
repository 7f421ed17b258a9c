"""Law 3 while the store fails under load: a full disk, and a database that is killed and comes back.

Whoever cannot be recorded is refused with a 503 that says what to do; nothing that was answered is lost, nothing is
stored twice, and the same proxy goes on once there is room, or the database, again. With the fake engine.

PostgreSQL has two disks to run full: where its tables are, a statement fails and the server goes on; where its
write-ahead log is, the server ends, and is started again once there is room.
"""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import kill_load
import pytest
from needs import lacking
from own_postgres import OwnPostgres, is_installed, user
from small_disks import SmallDisk, SmallFiles

from tracegrad.tracestore.store import open_store

PATIENCE_S = 60.0
SEEN = 30
"""Answers that are read before, and again after; and refusals in between."""
REACHABLE, ROOM = "check that it is reachable", "has room"


@dataclass(frozen=True, kw_only=True)
class Filling:
    """A store whose disk can be filled and freed; what clients, and the database's own log, then say of it."""

    store_url: str
    fill: Callable[[int], None]
    """Given the process of the proxy, as `free` is."""
    free: Callable[[int], None]
    said: str
    log: Callable[[], str] = str
    logged: str = ""


def sqlite_disk(stack: ExitStack, _folder: Path) -> Filling:
    disk = SmallDisk(stack, size_mb=8)
    return Filling(
        store_url=f"sqlite:///{disk.folder}/store.db",
        fill=lambda _: disk.fill(),
        free=lambda _: disk.free(),
        said="database or disk is full",
    )


def sqlite_files(_stack: ExitStack, folder: Path) -> Filling:
    """SQLite calls that an I/O error."""
    files = SmallFiles(lambda: max(path.stat().st_size for path in folder.glob("store.db*")))
    return Filling(
        store_url=f"sqlite:///{folder}/store.db",
        fill=lambda proxy: files.fill([proxy]),
        free=lambda proxy: files.free([proxy]),
        said="disk I/O error",
    )


def postgres_tables(stack: ExitStack, _folder: Path) -> Filling:
    disk = SmallDisk(stack, size_mb=64)
    database = own_postgres(stack, data=disk.folder / "data")
    return Filling(
        store_url=database.url,
        fill=lambda _: disk.fill(),
        free=lambda _: disk.free(),
        said="No space left on device",
        log=database.words,
        logged="ERROR:  could not extend file",
    )


def postgres_log(stack: ExitStack, _folder: Path) -> Filling:
    disk = SmallDisk(stack, size_mb=32)
    database = own_postgres(stack, log=disk.folder / "log")

    def fill(_proxy: int) -> None:
        disk.fill()
        database.use_up_log()

    def free(_proxy: int) -> None:
        disk.free()
        database.revive()

    return Filling(
        store_url=database.url,
        fill=fill,
        free=free,
        said=REACHABLE,
        log=database.words,
        logged="PANIC:  could not write to file",
    )


def postgres_files(stack: ExitStack, _folder: Path) -> Filling:
    """Half a segment of the log is allowed: the server ends."""
    database = own_postgres(stack)
    files = SmallFiles(lambda: 2**19, user=user())

    def free(_proxy: int) -> None:
        files.free(database.processes())
        database.revive()

    return Filling(
        store_url=database.url,
        fill=lambda _: files.fill(database.processes()),
        free=free,
        said=REACHABLE,
        log=database.words,
        logged="PANIC:  could not write to",
    )


def own_postgres(stack: ExitStack, data: Path | None = None, log: Path | None = None) -> OwnPostgres:
    if not is_installed():
        lacking("PostgreSQL's packages are not installed")
    return stack.enter_context(OwnPostgres(data, log))


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


@pytest.mark.parametrize("fillable", [sqlite_disk, sqlite_files, postgres_tables, postgres_log, postgres_files])
def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, stack: ExitStack, fillable: Callable[[ExitStack, Path], Filling]
) -> None:
    store = fillable(stack, tmp_path)
    with served(tmp_path, store.store_url) as (proxy, url):
        finished = asyncio.run(fail_under_load(url, lambda: store.fill(proxy.pid), lambda: store.free(proxy.pid)))
    check(store.store_url, finished, ROOM)
    assert any(store.said in text for _, text in finished.refused), finished.refused[:3]
    assert store.logged in store.log()


def test_a_database_that_is_killed_and_comes_back(tmp_path: Path, stack: ExitStack) -> None:
    database = own_postgres(stack)
    with served(tmp_path, database.url) as (_, url):
        finished = asyncio.run(fail_under_load(url, database.crash, database.revive))
    check(database.url, finished, REACHABLE)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long")
def test_a_database_that_is_killed_ten_times(tmp_path: Path, stack: ExitStack) -> None:
    database = own_postgres(stack)
    with served(tmp_path, database.url) as (_, url):
        for _ in range(10):
            finished = asyncio.run(fail_under_load(url, database.crash, database.revive))
            check(database.url, finished, REACHABLE)
