"""Eight processes on one store that lease, commit, release, meddle and die at random: each run is trained once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from tracegrad.tracestore.removal import CONTENT_DELETED
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import JOB, MODEL, ready_group

PROGRAM = Path(__file__).parents[2] / "support" / "leasing_crowd.py"
PROCESSES = 8
long = (
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long"),
)


@pytest.mark.parametrize("groups", [pytest.param(20, id="short"), pytest.param(2_000, id="long", marks=long)])
def test_eight_processes_train_each_run_once(either_url: str, groups: int) -> None:
    seed = os.environ.get("TRACEGRAD_SEED", str(time.time_ns() % 1_000_000))
    print(f"seed {seed}: TRACEGRAD_SEED={seed} repeats its choices")
    store = open_store(either_url)
    store.register_job(JOB, [MODEL], {})
    wanted = {run_id for number in range(groups) for run_id in ready_group(store, f"g{number}")}
    command = [sys.executable, str(PROGRAM), either_url, seed, str(PROCESSES), JOB]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line["error"] for line in lines if "error" in line] == [], ended.stderr
    assert ended.returncode == 0, ended.stderr
    check(store, wanted, [run_id for line in lines for run_id in line.get("committed", ())])
    print(f"{lines[-1]['lives']} lives of {PROCESSES} processes")
    store.close()


def check(store: Store, wanted: set[str], committed: list[str]) -> None:
    """What anybody was told to be committed is in the ledger, once; nothing is lost but what was deleted."""
    with store._db.read() as connection:
        ledger = list(connection.execute(text("SELECT run_id FROM ledger")).scalars())
        held = connection.execute(text("SELECT count(*) FROM holds")).scalar_one()
        kept = connection.execute(text("SELECT run_id, error FROM runs")).all()
    there = {row.run_id for row in kept if row.error != CONTENT_DELETED}
    assert len(committed) == len(set(committed)) > 0
    assert len(ledger) == len(set(ledger))
    assert set(committed) <= set(ledger) <= wanted
    missing = (wanted & there) - set(ledger)
    partners = {run_id.rpartition("-")[0] for run_id in wanted - there}
    assert {run_id for run_id in missing if run_id.rpartition("-")[0] not in partners} == set()
    assert held == 0
    assert store.consumption(JOB).conserved
    assert store.check() == []
