"""Group commit: durable before done, together when waiting, one bad call fails alone."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import pytest

from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound, StoreUnavailable
from tracegrad.tracestore.group_commit import GroupCommitter
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import make_call, make_choice, sql


class GatedStore(Store):
    """A real store whose first append waits at a gate, so that the following calls gather behind it."""

    def __init__(self, store: Store) -> None:
        super().__init__(store._db)
        self.entered, self.gate = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def append_calls(self, calls: Sequence[Call]) -> None:
        self.batches.append([call.call_id for call in calls])
        self.entered.set()
        assert self.gate.wait(20)
        super().append_calls(calls)


@pytest.fixture
def store(store_url: str) -> Iterator[GatedStore]:
    gated = GatedStore(open_store(store_url))
    yield gated
    gated.close()


def submit_behind_a_gate(store: GatedStore, committer: GroupCommitter, calls: Sequence[Call]) -> list["Future[None]"]:
    first = committer.submit(make_call("first", "r"))
    assert store.entered.wait(20)
    futures = [first, *(committer.submit(call) for call in calls)]
    store.gate.set()
    return futures


def test_whoever_waits_goes_together(store: GatedStore) -> None:
    with GroupCommitter(store) as committer:
        for future in submit_behind_a_gate(store, committer, [make_call(f"c{i}", f"r{i}") for i in range(5)]):
            assert future.result(20) is None
    assert store.batches == [["first"], ["c0", "c1", "c2", "c3", "c4"]]


def test_a_batch_has_a_bound(store: GatedStore) -> None:
    with GroupCommitter(store, max_batch=2) as committer:
        submit_behind_a_gate(store, committer, [make_call(f"c{i}", "r") for i in range(3)])[-1].result(20)
    assert store.batches == [["first"], ["c0", "c1"], ["c2"]]


def test_the_backlog_counts_what_waits_and_what_is_being_written(store: GatedStore) -> None:
    with GroupCommitter(store) as committer:
        assert (committer.backlog, committer.commits) == (0, 0)
        first = committer.submit(make_call("first", "r"))
        assert store.entered.wait(20)
        last = [committer.submit(make_call(f"c{i}", "r")) for i in range(3)][-1]
        assert committer.backlog == 4
        store.gate.set()
        first.result(20)
        last.result(20)
    assert (committer.backlog, committer.commits) == (0, 2)


def test_a_call_is_stored_when_its_future_is_done(store: GatedStore) -> None:
    store.gate.set()
    with GroupCommitter(store) as committer:
        for index in range(20):
            committer.submit(make_call(f"c{index}", "r")).result(20)
            assert store.find_call(f"c{index}") == (f"c{index}", "r")


def test_one_bad_call_fails_alone(store: GatedStore) -> None:
    good = make_call("good", "r")
    broken = replace(make_call("broken", "r"), choices=(make_choice(0, (1, 2), (-0.5,)),))
    with GroupCommitter(store) as committer:
        calls = [good, broken, make_call("other", "r"), replace(make_call("first", "r"), model="changed")]
        first, ok, bad, other, changed = submit_behind_a_gate(store, committer, calls)
        assert [future.result(20) for future in (first, ok, other)] == [None] * 3
        with pytest.raises(InvalidRecord, match="'broken'"):
            bad.result(20)
        with pytest.raises(Conflict, match="'first'"):
            changed.result(20)
    assert {call.call_id for call in store.trace("r").calls} == {"first", "good", "other"}


def test_an_unavailable_store_fails_everyone_and_the_thread_lives(store: GatedStore) -> None:
    sql(store, "ALTER TABLE calls RENAME TO away")
    with GroupCommitter(store) as committer:
        for future in submit_behind_a_gate(store, committer, [make_call("c", "r")]):
            with pytest.raises(StoreUnavailable, match="no such table"):
                future.result(20)
        sql(store, "ALTER TABLE away RENAME TO calls")
        committer.submit(make_call("later", "r")).result(20)
    with pytest.raises(NotFound):
        store.find_call("c")


def test_closing_writes_what_waits_and_refuses_what_comes(store: GatedStore) -> None:
    committer = GroupCommitter(store)
    futures = submit_behind_a_gate(store, committer, [make_call(f"c{i}", "r") for i in range(3)])
    committer.close()
    committer.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(StoreUnavailable, match="'after'"):
        committer.submit(make_call("after", "r"))


def test_a_submitted_call_cannot_be_cancelled(store: GatedStore) -> None:
    with GroupCommitter(store) as committer:
        futures = submit_behind_a_gate(store, committer, [make_call("c", "r")])
        assert not futures[1].cancel()
        futures[1].result(20)
