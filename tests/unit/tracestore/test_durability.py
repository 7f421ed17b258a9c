"""The store as it is really run: settings of connections, concurrent writers and trainers, a full disk, kill -9.

PostgreSQL on a full disk, and killed: tests/wire/test_store_faults.py.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tracegrad.tracestore import checkpointer
from tracegrad.tracestore.errors import InvalidRecord, NotFound, StoreUnavailable
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import JOB, MODEL, finish_run, make_call, ready_group, sql

WRITER = """
import sys
from tracegrad.tracestore.group_commit import GroupCommitter
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import make_call
committer = GroupCommitter(open_store(sys.argv[1]))
number = 0
while True:
    calls = [make_call(f"{sys.argv[2]}-{number + i}", f"r{number}", tokens=[range(50)]) for i in range(4)]
    for call, future in [(call, committer.submit(call)) for call in calls]:
        future.result()
        print(call.call_id, flush=True)
    number += 4
"""

LEASER = """
import sys
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import JOB, make_rule
store = open_store(sys.argv[1], create=False)
print("ready", flush=True)
sys.stdin.readline()
while (lease := store.lease(JOB, make_rule(), groups=1, lease_s=60, step=0, epoch=0, seed=0)) is not None:
    print(*lease.plan.run_ids, flush=True)
"""


def test_pragmas_of_every_connection(store_url: str) -> None:
    store = open_store(store_url)
    with store._db.write() as first, store._db.read() as second:
        for connection in (first, second):
            pragmas = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
            assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
            sizes = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("page_size", "wal_autocheckpoint")
            ]
            assert sizes == [4096, 16384]
    store.close()


def test_the_log_is_copied_while_no_commit_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When much was written, and then the log begins anew; little is left to whoever closes the file last. Closed, no
    thread is left."""
    monkeypatch.setattr(checkpointer, "PAGES", 400)

    def copier() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "tracegrad-checkpointer"]

    before = copier()
    path = tmp_path / "store.db"
    store = open_store(f"sqlite:///{path}")
    store.append_calls([make_call("first", "r")])
    assert copier() == before
    size = path.stat().st_size

    def begun() -> int:
        """How often the log has begun anew: its header counts."""
        with Path(f"{path}-wal").open("rb") as log:
            return int.from_bytes(log.read(16)[12:], "big")

    before_all, until, number = begun(), time.monotonic() + 20, 0
    while begun() < before_all + 2 and time.monotonic() < until:
        store.append_calls([make_call(f"c{number}-{n}", "r") for n in range(20)])
        number += 1
    assert begun() >= before_all + 2 and path.stat().st_size > size
    store.close()
    assert copier() == before


@pytest.mark.parametrize(("default", "commits"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")])
def test_settings_of_every_connection_to_postgresql(postgres_url: str, default: str, commits: str) -> None:
    """Whoever turned waiting for the disk off did not think of law 3; whoever asked for more gets it."""
    store = open_store(postgres_url)
    sql(store, f"ALTER DATABASE {store._db.url.database} SET synchronous_commit = {default}")
    store.close()
    store = open_store(postgres_url)
    with store._db.write() as first, store._db.read() as second:
        for connection in (first, second):
            assert connection.exec_driver_sql("SHOW jit").scalar() == "off"
            assert connection.exec_driver_sql("SHOW default_toast_compression").scalar() == "lz4"
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == commits
    sql(store, f"ALTER DATABASE {store._db.url.database} RESET synchronous_commit")
    store.close()


def test_readers_do_not_wait_and_writers_take_turns(store_url: str) -> None:
    store, other = open_store(store_url), open_store(store_url)
    with store._db.write() as connection:
        connection.exec_driver_sql("INSERT INTO proxies VALUES ('p', 'u', 0, 0)")
        assert other.list_runs() == []
        late = threading.Thread(target=other.ensure_runs, args=(["r"], "p"))
        late.start()
        late.join(0.05)
        assert late.is_alive()
    late.join(20)
    assert store.get_run("r").project == "p"
    store.close()
    other.close()


def test_writers_hand_one_connection_on_and_none_that_an_error_left(store_url: str) -> None:
    store = open_store(store_url)
    used: list[object] = []
    for _ in range(3):
        with store._db.write() as connection:
            used.append(connection)
    assert used[0] is used[1] is used[2]
    with pytest.raises(ZeroDivisionError), store._db.write() as connection:
        connection.exec_driver_sql("INSERT INTO proxies VALUES ('undone', 'u', 0, 0)")
        raise ZeroDivisionError
    with store._db.write() as connection:
        assert connection is not used[0]
        assert connection.exec_driver_sql("SELECT count(*) FROM proxies").scalar() == 0
    store.close()
    store.append_calls([make_call("c", "r")])  # whoever closed it may still hold it
    assert store.find_call("c") == ("c", "r")
    store.close()


def test_a_wait_that_is_too_long_is_store_unavailable(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracegrad.tracestore.database.BUSY_TIMEOUT_S", 0.05)
    store, other = open_store(store_url), open_store(store_url)
    with store._db.write(), pytest.raises(StoreUnavailable, match="locked"):
        other.append_calls([make_call("c", "r")])
    other.append_calls([make_call("c", "r")])
    for each in (store, other):
        each.close()


def test_threads_append_at_once(either_url: str) -> None:
    store = open_store(either_url)
    threads = [
        threading.Thread(target=lambda n=n: [store.append_calls([make_call(f"{n}-{i}", "r")]) for i in range(8)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(store.trace("r").calls) == 64
    store.close()


def test_processes_never_lease_the_same_run(either_url: str) -> None:
    store = open_store(either_url)
    expected = [run_id for index in range(10) for run_id in ready_group(store, f"g{index}")]
    store.register_job(JOB, [MODEL], {})
    leasers = [
        subprocess.Popen(
            [sys.executable, "-c", LEASER, either_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for leaser in leasers:
        assert leaser.stdout is not None
        assert leaser.stdout.readline() == "ready\n"
    for leaser in leasers:
        assert leaser.stdin is not None
        leaser.stdin.write("go\n")
        leaser.stdin.flush()
    outputs = [leaser.communicate(timeout=60)[0] for leaser in leasers]
    assert [leaser.returncode for leaser in leasers] == [0, 0]
    assert sorted(" ".join(outputs).split()) == sorted(expected)
    store.close()


def test_a_full_disk_is_store_unavailable_and_commits_nothing(store_url: str) -> None:
    store = open_store(store_url)
    finish_run(store, "before")
    with store._db.write() as connection:  # the bound is the connection's, and this one is handed on
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreUnavailable, match="full"):
        store.append_calls([make_call("big", "r", tokens=[range(100_000)])])
    with pytest.raises(NotFound):
        store.find_call("big")
    with pytest.raises(NotFound):
        store.get_run("r")
    assert store.find_call("call-before") == ("call-before", "before")
    store.close()


def test_errors_do_not_quote_what_was_being_written(either_url: str) -> None:
    store = open_store(either_url)
    sql(store, "DROP TABLE choice_payloads")
    with pytest.raises(StoreUnavailable) as caught:
        store.append_calls([make_call("c", "r", request={"messages": "SECRET"})])
    assert "SECRET" not in str(caught.value)
    assert "INSERT" not in str(caught.value)
    with pytest.raises(InvalidRecord, match=r"proxies.*url|url.*proxies") as refused:
        sql(store, "INSERT INTO proxies VALUES ('SECRET', NULL, 0, 0)")
    assert "SECRET" not in str(refused.value)
    store.close()


def test_kill_9_loses_no_acknowledged_call(either_url: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    acknowledged: list[str] = []
    for life in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, either_url, str(life)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged.append(writer.stdout.readline().strip())
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.communicate(timeout=20)[0]
        acknowledged += [line for line in rest.split("\n")[:-1] if line]
    store = open_store(either_url)
    stored = [call for summary in store.list_runs(limit=100_000) for call in store.trace(summary.run.run_id).calls]
    assert set(acknowledged) <= {call.call_id for call in stored}
    assert len(stored) == len({call.call_id for call in stored})
    assert {tuple(choice.token_ids for choice in call.choices) for call in stored} == {(tuple(range(50)),)}
    assert store.check() == []
    store.close()
