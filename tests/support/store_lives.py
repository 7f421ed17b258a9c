"""A store, the model beside it (`store_model`), and how the process that writes to it dies and comes back.

"cut" stops a transaction right before its commit (on SQLite the files are copied in that moment and the copy is opened,
which is what a killed process leaves), "unheard" loses the answer after it. What is done to the store is in
`store_recording` and `store_leases`; all of it is for `store_machine`.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hypothesis.stateful import RuleBasedStateMachine
from sqlalchemy import Connection, event, text
from store_model import StoreModel

from tracegrad.tracestore.records import Call, Lease, LeaseRule, Purpose
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import Clock, make_rule

PROJECT = "default"
GROUPS: dict[str, tuple[int, Purpose]] = {
    "one": (1, "train"),
    "pair": (2, "train"),
    "three": (3, "train"),
    "exam": (2, "eval"),
}
ALONE: tuple[Purpose, ...] = ("live", "train", "eval")
RULES: dict[str, LeaseRule] = {
    "first": make_rule(min_group=1),
    "second": make_rule(
        min_group=2, reward_names=("em",), roles=("answerer",), purposes=("train",), max_staleness=0, grace_s=4.0
    ),
}
"""Training job -> what it leases."""


class Cut(Exception):
    """The process died in this moment."""


class Lives(RuleBasedStateMachine):
    """Subclassed with `open_first`, which gives the URL of an empty store of the newest schema."""

    open_first: ClassVar[Callable[[], str]]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.url = type(self).open_first()
        self.store = self._opened()
        self.model = StoreModel({})
        self.numbers: Counter[str] = Counter()
        self.appended: dict[str, Call] = {}
        self.handles: list[Lease] = []
        """Every lease that somebody was ever given, fenced ones included."""
        self.commits: dict[tuple[int, int], Any] = {}
        self.backup: tuple[Path, StoreModel] | None = None
        self.dying = False

    # -- the store and its deaths

    def _opened(self) -> Store:
        store = open_store(self.url, create=False, clock=self.clock)
        if store._db.is_sqlite:  # this is about interleavings; test_durability is about the disk
            event.listen(store._db.engine, "connect", lambda driver, _: driver.execute("PRAGMA synchronous=OFF"))
            store._db.engine.dispose()
        event.listen(store._db.engine, "commit", self._at_commit)
        return store

    def _at_commit(self, connection: Connection) -> None:
        if self.dying and connection.get_execution_options().get("tracegrad_writes"):
            self.dying = False
            self._keep_what_is_on_the_disk()
            raise Cut

    def _keep_what_is_on_the_disk(self) -> None:
        if self.store._db.is_sqlite:
            now = Path(str(self.store._db.url.database))
            following = now.with_name(f"{self.new_id('life')}.db")
            for suffix in ("", "-wal"):
                if now.with_name(now.name + suffix).exists():
                    shutil.copy(now.with_name(now.name + suffix), following.with_name(following.name + suffix))
            self.url = f"sqlite:///{following}"

    def _open_again(self) -> None:
        self.store.close()
        self.store = self._opened()

    def do(self, fate: str, work: Callable[[], Any]) -> Any:
        """Return what `work` gives; Cut where it never happened. But for the fate "heard" the process dies."""
        self.dying = fate == "cut"
        try:
            found = work()
        except Cut:
            found = Cut
        finally:
            self.dying = False
        if fate == "unheard" or found is Cut:
            self._open_again()
        return found

    # -- choosing

    def new_id(self, kind: str) -> str:
        self.numbers[kind] += 1
        return f"{kind}{self.numbers[kind]}"

    def any_run(self, number: int) -> str | None:
        """One of the newest runs, or None where there is none; every third time one that a lease holds, if any is."""
        held = [run_id for lease in self.model.leases.values() if lease.state == "held" for run_id in lease.run_ids]
        among = held if held and number % 3 == 2 else list(self.model.runs)[-12:]
        return pick(number, among) if among else None

    # -- what must be true

    def _adds_up(self, job_id: str, epoch: int) -> None:
        report = self.store.consumption(job_id, epoch)
        expected = self.model.account(job_id, epoch, self.clock.now)
        same((report.stored, report.trained, dict(report.excluded)), expected)
        assert report.conserved

    def _queue_adds_up(self, job_id: str) -> None:
        expected = self.model.account(job_id, 0, self.clock.now)
        queue = self.store.queue(job_id, epoch=0)
        told: Counter[str] = Counter()
        for one in queue.reasons:
            told[one.reason] += one.tokens
        same({reason: tokens for reason, tokens in told.items() if tokens and reason != "trained"}, expected[2])
        same((queue.stored, queue.tokens("trained"), queue.conserved), (expected[0], expected[1], True))

    def _has_what_it_should(self) -> None:
        with self.store._db.read() as connection:
            ledger = connection.execute(text("SELECT job_id, run_id, epoch FROM ledger")).all()
            holds = connection.execute(text("SELECT job_id, run_id FROM holds")).all()
            runs = connection.execute(text("SELECT run_id, purpose, status FROM runs")).all()
        same(sorted(map(tuple, ledger)), sorted(self.model.ledger))
        held = [lease for lease in self.model.leases.values() if lease.state == "held"]
        same(sorted(map(tuple, holds)), sorted((lease.job_id, run_id) for lease in held for run_id in lease.run_ids))
        same(set(map(tuple, runs)), {(run.run_id, run.purpose, run.status) for run in self.model.runs.values()})
        assert "eval" not in {self.model.runs[run_id].purpose for _, run_id in holds}


def same(stored: Any, expected: Any) -> None:
    assert stored == expected, f"the store says {stored}, the model {expected}"


def pick(number: int, among: Sequence[Any]) -> Any:
    return among[number % len(among)]


def refused(kind: type[Exception], work: Callable[[], Any]) -> None:
    try:
        work()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was to be raised")
