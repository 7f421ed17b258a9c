"""A SQLite file: broken pages and keys are found, a copy is made while others write, space is given back."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import event

from tracegrad.tracestore.errors import ConfigError, Conflict, StoreUnavailable
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import make_call
from tracegrad.tracestore.upkeep import Upkeep

WRITER = """
import sys
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import make_call
store = open_store(sys.argv[1])
store._db.engine.dispose()
number = 0
while True:
    store.append_calls([make_call(f"w-{number}-{i}", f"run-{number}", tokens=[range(500)]) for i in range(4)])
    print(f"run-{number}", flush=True)
    number += 1
"""


def file_of(store: Store) -> Path:
    return Path(str(store._db.url.database))


def fill(store: Store, runs: int) -> None:
    store._db.engine.dispose()
    event.listen(store._db.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    for number in range(runs):
        calls = [make_call(f"c-{number}-{i}", f"r-{number}", tokens=[range(2_000)]) for i in range(4)]
        store.append_calls(calls)
        store.end_run(f"r-{number}", status="closed", ended_by="explicit")


def test_a_copy_under_a_writing_load_is_whole(store_url: str, tmp_path: Path) -> None:
    store = open_store(store_url)
    fill(store, 100)  # more than one step of the copy
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store_url], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    committed = [writer.stdout.readline().strip() for _ in range(5)]
    told: list[tuple[int, int]] = []
    during: list[str] = []
    reader = threading.Thread(target=lambda: during.extend(line.strip() for line in writer.stdout or ()))
    reader.start()
    try:
        size = store.backup(tmp_path / "copy.db", lambda done, total: told.append((done, total)))
    finally:
        writer.kill()
        writer.wait()
        reader.join()
    assert size == (tmp_path / "copy.db").stat().st_size and not (tmp_path / "copy.db.part").exists()
    assert len(told) > 1 and told[-1][0] == told[-1][1]
    assert not list(tmp_path.glob("copy.db-*")), "the copy is one file"
    copy = open_store(f"sqlite:///{tmp_path}/copy.db", create=False)
    assert copy.check() == []
    for run_id in committed:
        trace = copy.trace(run_id)
        assert [len(call.choices[0].token_ids) for call in trace.calls] == [500] * 4
    assert copy.trace("r-99") == store.trace("r-99")
    copied = {summary.run.run_id: summary.n_calls for summary in copy.list_runs(limit=10_000)}
    assert set(copied.values()) == {4}, "a transaction is in it whole or not at all"
    copy.append_calls([make_call("goes on", "r")])
    copy.close()
    store.close()


def test_a_writer_does_not_wait_for_the_copy(store_url: str, tmp_path: Path) -> None:
    store = open_store(store_url)
    fill(store, 100)
    number = iter(range(1_000))
    store.backup(tmp_path / "copy.db", lambda *_: store.append_calls([make_call(f"x-{next(number)}", "during")]))
    assert next(number) > 2  # each step of the copy saw a commit, and it came to its end
    copy = open_store(f"sqlite:///{tmp_path}/copy.db")
    assert "during" not in {summary.run.run_id for summary in copy.list_runs(limit=200)}
    copy.close()
    store.close()


def test_a_file_is_never_written_over_and_no_half_copy_is_left(store_url: str, tmp_path: Path) -> None:
    store = open_store(store_url)
    taken = tmp_path / "taken.db"
    taken.write_text("precious")
    with pytest.raises(Conflict, match="exists: name a new file"):
        store.backup(taken)
    assert taken.read_text() == "precious"
    with pytest.raises(StoreUnavailable, match="cannot back the store up"):
        store.backup(tmp_path / "nowhere" / "copy.db")
    store.close()


def test_postgres_is_backed_up_by_pg_dump() -> None:
    class Elsewhere:
        is_sqlite = False

        class url:
            @staticmethod
            def set(drivername: str) -> object:
                from sqlalchemy.engine import make_url

                return make_url(f"{drivername}://someone:secret@db/traces")

    upkeep = Upkeep()
    upkeep._db = Elsewhere()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="pg_dump --format=custom --file copy") as refused:
        upkeep.backup(Path("copy"))
    assert "secret" not in str(refused.value)


def test_rows_without_their_parents_are_found(store_url: str) -> None:
    store = open_store(store_url)
    store.append_calls([make_call("c", "r")])
    store.close()
    with sqlite3.connect(store_url.removeprefix("sqlite:///")) as past:  # foreign keys are off unless asked for
        past.execute("DELETE FROM runs")
    store = open_store(store_url)
    found = {fault.what: fault.count for fault in store.check()}
    assert found["calls without their runs"] == found["spans without their runs"] == 1
    assert found["calls of unknown runs"] == found["spans of unknown runs"] == 1
    store.close()


def test_a_broken_page_is_found(store_url: str, tmp_path: Path) -> None:
    store = open_store(store_url)
    fill(store, 20)
    store.close()
    broken = tmp_path / "broken.db"
    shutil.copy(store_url.removeprefix("sqlite:///"), broken)
    with sqlite3.connect(broken) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'ix_calls_run_id_model'"
        ).fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    with broken.open("r+b") as file:
        file.seek((root - 1) * page_bytes + 8)
        file.write(bytes(200))
    damaged = open_store(f"sqlite:///{broken}")
    (fault,) = [fault for fault in damaged.check() if "integrity check" in fault.what]
    assert fault.count >= 1 and fault.examples
    damaged.close()


def test_the_space_of_deleted_runs_is_given_back_at_once_or_in_steps(store_url: str) -> None:
    store = open_store(store_url)
    fill(store, 60)
    full = store.space()
    store.delete_runs([f"r-{number}" for number in range(30)])
    free = store.space().free_bytes
    assert free and free > full.size_bytes / 4 and not store.gives_back()
    store.vacuum(incremental=True)
    assert store.space().free_bytes == 0 and file_of(store).stat().st_size < full.size_bytes * 0.75
    store.delete_runs([f"r-{number}" for number in range(30, 60)])
    assert store.gives_back()
    left = store.give_back(10)
    assert left > 0
    assert store.give_back(100_000) == 0
    assert store.check() == []
    store.close()
