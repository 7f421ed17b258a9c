"""Runs that come, are trained and are deleted, for long: memory and the time of a lease do not grow with their number.

The store's file does: of a trained run a stub stays (see `removal`). 10^5 runs on each backend in `make test-long`; on
PostgreSQL, where a commit goes to a server and back, they take twice as long as on SQLite or more.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import JOB

PROGRAM = Path(__file__).parents[1] / "support" / "soak.py"
GROWTH_BYTES = 24 * 1024 * 1024
"""What either process may have grown by, from its first fifth to its last."""
LEASE_FACTOR, LEASE_MS = 2.0, 50.0
"""What a lease and its reading may take at the end: so many times what it took at first, and so much more."""
long = (
    pytest.mark.long,
    pytest.mark.timeout(7200),
    pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long"),
)


@pytest.mark.parametrize(
    ("runs", "keep_s"), [pytest.param(512, 0.5, id="short"), pytest.param(100_032, 20.0, id="long", marks=long)]
)
def test_memory_and_leases_stay_as_they_are(either_url: str, runs: int, keep_s: float) -> None:
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), either_url, str(runs), str(keep_s)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    for who in ("writer", "trainer"):
        early, late = fifths([line["resident_bytes"] for line in lines if line["who"] == who])
        print(f"{who}: {early / 2**20:.0f} MB at first, {late / 2**20:.0f} MB at last")
        assert late - early < GROWTH_BYTES, who
    early, late = fifths([line["lease_ms"] for line in lines if line["who"] == "trainer"])
    print(f"a lease and its reading: {early:.0f} ms at first, {late:.0f} ms at last")
    if runs > 10_000:
        assert late < LEASE_FACTOR * early + LEASE_MS
    check(either_url, runs)


def fifths(values: list[Any]) -> tuple[float, float]:
    """The medians of the first fifth and of the last."""
    some = max(1, len(values) // 5)
    return statistics.median(values[:some]), statistics.median(values[-some:])


def check(url: str, runs: int) -> None:
    """Each run is in the ledger once, and most of them are stubs by now."""
    store = open_store(url)
    with store._db.read() as connection:
        ledger = connection.execute(text("SELECT count(*), count(DISTINCT run_id) FROM ledger")).one()
        whole = connection.execute(text("SELECT count(*) FROM call_payloads")).scalar_one()
    assert ledger[0] == ledger[1] == runs
    assert whole < runs
    report = store.consumption(JOB)
    assert (report.conserved, report.trained) == (True, report.stored)
    assert store.check() == []
    store.close()
