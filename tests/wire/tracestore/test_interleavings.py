"""Any interleaving of append, reward, lease, expire, commit, crash, delete and restore keeps the promises of the store.

A few hundred steps that are always the same here; TRACEGRAD_LONG=1 takes new ones for ten minutes a backend.
"""

import itertools
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import text
from store_machine import Interleavings

from tracegrad.tracestore.schema import metadata
from tracegrad.tracestore.store import open_store

QUIET = list(HealthCheck)
SHORT = settings(
    phases=[Phase.generate],  # to shrink what fails takes minutes; TRACEGRAD_LONG=1 does
    derandomize=True,
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=QUIET,
)
LONG = settings(
    max_examples=50,
    stateful_step_count=60,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=QUIET,
)
LONG_S = 600
long = (
    pytest.mark.long,
    pytest.mark.timeout(3600),  # to shrink what fails takes its time
    pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long"),
)
SHORTER = settings(SHORT, max_examples=4)
"""Where a round trip to a server is what costs."""
HOW_LONG = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=long)]


@pytest.mark.parametrize("how_long", HOW_LONG)
def test_any_interleaving_on_sqlite(tmp_path: Path, empty_file: Path, how_long: settings) -> None:
    numbers = itertools.count()

    def fresh() -> str:
        folder = tmp_path / str(next(numbers))
        shutil.rmtree(tmp_path / str(int(folder.name) - 1), ignore_errors=True)
        folder.mkdir()
        shutil.copy(empty_file, folder / "store.db")
        return f"sqlite:///{folder}/store.db"

    run(type("OnSqlite", (Interleavings,), {"open_first": staticmethod(fresh)}), how_long)


@pytest.mark.parametrize("how_long", [pytest.param(SHORTER, id="short"), HOW_LONG[1]])
def test_any_interleaving_on_postgresql(postgres_url: str, how_long: settings) -> None:
    store = open_store(postgres_url)

    def emptied() -> str:
        """Take every row away: quicker than a new schema."""
        names = ", ".join(table.name for table in metadata.sorted_tables)
        with store._db.write() as connection:
            connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
        return postgres_url

    run(type("OnPostgres", (Interleavings,), {"open_first": staticmethod(emptied)}), how_long)
    store.close()


def run(machine: type[Interleavings], how_long: settings) -> None:
    """One round, or new ones until their time is over."""
    began = time.monotonic()
    for rounds in itertools.count(1):
        run_state_machine_as_test(machine, settings=how_long)
        if how_long is not LONG or time.monotonic() - began > LONG_S:
            print(f"{rounds * how_long.max_examples} interleavings in {time.monotonic() - began:.0f} s")
            return
