"""The store contract on SQLite, and in a database of its own on the PostgreSQL that TRACEGRAD_TEST_POSTGRES names."""

import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from tracegrad.tracestore import attributions, calls, tasks, versions
from tracegrad.tracestore.errors import LeaseLost, StoreUnavailable, TransactionRollback
from tracegrad.tracestore.interchange import CARRIED, Chosen
from tracegrad.tracestore.records import Group, LateAttribution, Task
from tracegrad.tracestore.runs import lock_runs, open_or_touch
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.contract import StoreContract
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    Clock,
    account,
    first_version,
    make_call,
    make_commit,
    make_rule,
    ready_group,
    take,
)

POSTGRES = os.environ.get("TRACEGRAD_TEST_POSTGRES")


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestSqlite(StoreContract):
    @pytest.fixture
    def store(self, store_url: str, clock: Clock) -> Iterator[Store]:
        store = open_store(store_url, clock=clock)
        store._db.engine.dispose()  # the contract is about rows; test_durability is about the disk
        event.listen(store._db.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
        yield store
        store.close()


if POSTGRES:

    class TestPostgres(StoreContract):
        @pytest.fixture
        def store(self, postgres_url: str, clock: Clock) -> Iterator[Store]:
            store = open_store(postgres_url, clock=clock)
            yield store
            store.close()

        def test_connections_that_the_server_ended_are_replaced(
            self, store: Store, postgres_url: str, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            """A restart of the server costs the write that it hits, and no other; what was answered is there."""
            store.append_calls([make_call("before", "r")])
            end_all(postgres_url)
            store.append_calls([make_call("between", "r")])
            opened = calls.open_or_touch
            monkeypatch.setattr(calls, "open_or_touch", lambda *given: (end_all(postgres_url), opened(*given)))
            with pytest.raises(StoreUnavailable, match="check that it is reachable"):
                store.append_calls([make_call("hit", "r")])
            monkeypatch.undo()
            store.append_calls([make_call("after", "r")])
            assert [call.call_id for call in store.trace("r").calls] == ["before", "between", "after"]

        def test_a_commit_does_not_wait_for_who_writes_to_its_runs(self, store: Store) -> None:
            """It names its runs in no order, so waiting for them could be waiting in a ring."""
            ready_group(store)
            lease = take(store)
            commit = make_commit(account(store, lease))
            with store._db.write() as connection:
                lock_runs(connection, lease.plan.run_ids)
                committing = threading.Thread(target=store.commit_step, args=(lease, commit))
                committing.start()
                committing.join(20)
                assert not committing.is_alive()
            assert store.last_checkpoint(lease.job_id) is not None

        def test_a_step_that_commits_first_is_not_released_by_a_deletion(self, store: Store) -> None:
            """The deletion has read that the lease holds its run, and waits for the commit."""
            run, _ = ready_group(store)
            lease = take(store)
            entries = account(store, lease)
            with store._db.write() as connection:
                connection.execute(text("SELECT 1 FROM leases FOR UPDATE"))
                deleting = threading.Thread(target=store.delete_runs, args=([run],), kwargs={"busy": "force"})
                deleting.start()
                deleting.join(0.2)
                assert deleting.is_alive()
                connection.execute(text("UPDATE leases SET state = 'acknowledged'"))
            deleting.join(20)
            with pytest.raises(LeaseLost, match="acknowledged"):
                store.commit_step(lease, make_commit(entries))

        def test_closing_idle_runs_and_appending_to_them_wait_in_no_ring(self, store: Store, clock: Clock) -> None:
            """The idle ones lie in the order of their last calls, "b" first."""
            for run_id in ("b", "a"):
                store.append_calls([make_call(f"c-{run_id}", run_id)])
                clock.advance(10)
            clock.advance(100)
            with ThreadPoolExecutor() as threads:
                with store._db.write() as connection:
                    lock_runs(connection, ["a"])
                    idle = threads.submit(store.close_idle_runs, "default", 50.0)
                    wait([idle], timeout=0.3)
                    lock_runs(connection, ["b"])
                    open_or_touch(connection, {"b": "default"}, clock.now)
                assert idle.result(20) == 1
            assert (store.get_run("a").status, store.get_run("b").status) == ("closed", "open")

        @pytest.mark.parametrize("kind", ["tasks", "groups", "facts"])
        def test_two_that_write_the_same_in_opposite_orders_wait_in_no_ring(self, store: Store, kind: str) -> None:
            """Two rollouts of one task file, two proxies that are told of one trace."""
            tasks_ = [Task(task_id=name, input={}) for name in ("a", "b")]
            groups = [Group(group_id=name, task_id=name, planned_size=1, purpose="train") for name in ("a", "b")]
            facts = [LateAttribution(source="langsmith", completion_id=name, role="x") for name in ("a", "b")]
            if kind == "groups":
                store.put_tasks(tasks_)
            given, put_one, put_all = {
                "tasks": (tasks_, tasks._put_task, store.put_tasks),
                "groups": (groups, tasks._put_group, store.put_groups),
                "facts": (
                    facts,
                    lambda connection, fact, now: attributions._append(connection, fact, "default", now),
                    store.attribute_late,
                ),
            }[kind]
            with ThreadPoolExecutor() as threads:
                with store._db.write() as connection:
                    put_one(connection, given[0], 1.0)
                    putting = threads.submit(put_all, given[::-1])
                    wait([putting], timeout=0.3)
                    put_one(connection, given[1], 1.0)
                assert putting.result(20) is None

        @pytest.mark.parametrize("state", ["40P01", "40001"])
        def test_calls_that_the_server_rolled_back_are_appended_again(
            self, store: Store, monkeypatch: pytest.MonkeyPatch, state: str
        ) -> None:
            """Whoever waits for them hears nothing of it, unless it happens again and again."""
            opened, ended = calls.open_or_touch, []

            def end(connection: Any, *given: Any) -> None:
                opened(connection, *given)
                if len(ended) < most:
                    ended.append(state)
                    connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$")

            monkeypatch.setattr(calls, "open_or_touch", end)
            most = 3
            store.append_calls([make_call("c", "r")])
            assert [call.call_id for call in store.trace("r").calls] == ["c"] and len(ended) == 3
            most = 1_000
            with pytest.raises(TransactionRollback, match="ended a transaction: x; try again"):
                store.append_calls([make_call("d", "r")])
            assert len(ended) < 20

        def test_an_import_takes_no_number_of_a_version_from_who_has_it(self, store: Store, tmp_path: Path) -> None:
            """A step is being committed meanwhile, and another comes next."""
            version = {"model": MODEL, "checkpoint_path": "p", "checkpoint_hash": "h", "job_id": None}
            with closing(open_store(f"sqlite:///{tmp_path}/other.db")) as other:
                first = [first_version(one) for one in (other, store)]
                carried = [row for page in other.pages("policy_versions", Chosen()) for row in page]
            with store._db.write() as connection:
                made = versions.add(connection, **version, kind="step", parent_id=first[1], step=1, now=1.0)
                assert store.take_in("policy_versions", carried) == 0
            following = store.add_version(**version, kind="step", parent_id=first[1], step=2)
            assert (made.version_id, following.version_id) == (2, 3)
            store.take_in("policy_versions", [carried[0] | {"version_id": 7}])
            assert store.add_version(**version, kind="step", parent_id=first[1], step=2).version_id == 8

        @pytest.mark.parametrize("name", ["spans", "calls", "rewards"])
        def test_an_import_waits_for_who_holds_its_runs(self, store: Store, tmp_path: Path, name: str) -> None:
            """A lease, say, that counts what has a lower number than it."""
            with closing(open_store(f"sqlite:///{tmp_path}/other.db")) as other:
                ready_group(other)
                pages = {
                    one: [row | {"n_prompt": 3} for page in other.pages(one, Chosen()) for row in page]
                    for one in CARRIED
                }
            for before in itertools.takewhile(lambda one: one != name, CARRIED):
                store.take_in(before, pages[before])
            with ThreadPoolExecutor() as threads:
                with store._db.write() as connection:
                    lock_runs(connection, ["g-1"])
                    taking = threads.submit(store.take_in, name, pages[name])
                    assert wait([taking], timeout=0.5).not_done
                assert taking.result(20) == 2

        def test_a_call_that_is_being_placed_in_a_run_is_not_deleted_as_one_without(self, store: Store) -> None:
            """Its run would lack it, and nobody would be told."""
            store.append_calls([make_call("placed", None, at=10.0), make_call("alone", None, at=10.0)])
            store.ensure_runs(["r"], "default")
            with ThreadPoolExecutor() as threads:
                with store._db.write() as connection:
                    connection.execute(text("UPDATE calls SET run_id = 'r' WHERE call_id = 'placed'"))
                    deleting = threads.submit(store.delete_unplaced_calls, "default", 20.0)
                    wait([deleting], timeout=0.3)
                assert deleting.result(20) == 1
            assert [call.call_id for call in store.trace("r").calls] == ["placed"]

        @pytest.mark.parametrize("call", ["of the run", "placed meanwhile", "stored meanwhile", "resolved"])
        def test_a_fact_on_its_way_changes_no_lease(
            self, store: Store, monkeypatch: pytest.MonkeyPatch, call: str
        ) -> None:
            """It has its number and is not committed; a later number is, and the run of its call is leased."""
            run, _ = ready_group(store)
            version = first_version(store)
            late = make_call("late", None if call == "placed meanwhile" else run, role=None, version=version)
            role = LateAttribution(source="rule", completion_id="chatcmpl-late", role="x")
            if call == "resolved":
                store.attribute_late([role])
            if call != "stored meanwhile":
                store.append_calls([late])
            write = store.resolve_attributions if call == "resolved" else partial(store.attribute_late, [role])
            writing = threading.Thread(target=write)
            numbered, go = threading.Event(), threading.Event()
            apply = attributions._apply

            def apply_slowly(*given: Any) -> bool:
                if threading.current_thread() is writing:
                    numbered.set()
                    assert go.wait(20)
                return apply(*given)

            monkeypatch.setattr(attributions, "_apply", apply_slowly)
            writing.start()
            assert numbered.wait(20)
            if call == "stored meanwhile":
                store.append_calls([late])
            store.attribute_late([LateAttribution(source="rule", call_id="nobody", role="y")])
            place = LateAttribution(source="langsmith", call_id="late", run_id=run)
            placing = threading.Thread(target=store.attribute_late, args=([place],))
            if call == "placed meanwhile":
                placing.start()
                placing.join(0.3)
            store.register_job(JOB, [MODEL], {})
            lease = store.lease(JOB, make_rule(), groups=1, lease_s=60, step=1, epoch=0, seed=7)
            before = None if lease is None else store.lease_traces(lease)
            go.set()
            writing.join(20)
            if call == "placed meanwhile":
                placing.join(20)
            store.resolve_attributions()
            assert {one.call_id: one.attribution.role for one in store.trace(run).calls}["late"] == "x"
            assert lease is None or store.lease_traces(lease) == before
            assert lease is not None or take(store)


def end_all(url: str) -> None:
    """End every other connection to the database, as a server does that stops."""
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    engine.dispose()
