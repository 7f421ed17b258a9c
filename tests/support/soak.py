"""A soak: one process writes runs as a proxy does, another leases, commits and deletes old ones, until N are trained.

    python soak.py STORE_URL RUNS KEEP_S

Both print what they used, as JSON lines: the writer its resident memory now and then, the trainer that, and how long
each lease and its reading took. Used by tests/wire/test_soak.py.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing import Value
from pathlib import Path
from typing import Any

from tracegrad.tracestore.group_commit import GroupCommitter
from tracegrad.tracestore.retention import Retired
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    account,
    add_group,
    live_version,
    make_call,
    make_commit,
    make_reward,
    make_rule,
)

BATCH = 64
"""Runs that are open at once; every fourth batch is of groups of four."""
AHEAD = 512
"""Runs that may wait for the trainer."""
UNITS = 64
STEPS_PER_PUBLISH = 4
MAX_STALENESS = 64
"""In steps: more than what waits, and far fewer than there are in all, so that a lease looks at a bounded number."""
GIVE_UP_S = 7_000.0


def say(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def batches(store: Store, runs: int) -> Iterator[list[str]]:
    """Run ids, opened where somebody has to: the first call opens a live run itself."""
    for number in range(-(-runs // BATCH)):
        if number % 4 == 3:
            groups = [add_group(store, f"g{number}-{group}", size=4) for group in range(BATCH // 4)]
            yield [run_id for group in groups for run_id in group]
        else:
            yield [f"r{number}-{member}" for member in range(BATCH)]


def write(url: str, runs: int, written: Any, trained: Any) -> None:
    store = open_store(url, create=False)
    tokens = [range(100)]
    with GroupCommitter(store) as committer:
        for number, run_ids in enumerate(batches(store, runs)):
            while written.value - trained.value > AHEAD:
                time.sleep(0.01)
            live = store.live_version(MODEL)
            assert live is not None
            calls = [
                make_call(
                    f"call-{run_id}", run_id, version=live.version_id, tokens=tokens, prompt_ids=tuple(range(300))
                )
                for run_id in run_ids
            ]
            for future in [committer.submit(call) for call in calls]:
                future.result()
            store.add_rewards([make_reward(f"reward-{run_id}", run_id) for run_id in run_ids])
            for run_id in run_ids:
                store.end_run(run_id, status="closed", ended_by="explicit")
            written.value += len(run_ids)
            if number % 4 == 0:
                say(who="writer", runs=written.value, resident_bytes=resident_bytes())


def train(url: str, runs: int, keep_s: float, written: Any, trained: Any) -> None:
    store = open_store(url, create=False)
    rule = make_rule(min_group=1, max_staleness=MAX_STALENESS)
    deadline = time.monotonic() + GIVE_UP_S
    step = deleted = 0
    kept: set[str] = set()
    """Trained and not deleted yet: what waits for training is not this soak's to delete."""
    while trained.value < runs and time.monotonic() < deadline:
        last = written.value >= runs
        if not last and written.value - trained.value < UNITS:
            time.sleep(0.02)
            continue
        wanted = min(UNITS, max(1, store.backlog(JOB, rule).ready_groups)) if last else UNITS
        began = time.perf_counter()
        lease = store.lease(JOB, rule, groups=wanted, lease_s=600.0, step=step + 1, epoch=0, seed=step)
        if lease is None:
            time.sleep(0.02)
            continue
        consumption = account(store, lease)
        lease_ms = 1e3 * (time.perf_counter() - began)
        step += 1
        store.commit_step(lease, make_commit(consumption, hash_=f"sha-{step}"))
        trained.value += len(lease.plan.run_ids)
        kept.update(lease.plan.run_ids)
        if step % STEPS_PER_PUBLISH == 0:
            live_version(store, step)
        old = store.retired_runs(Retired(project="default", ended_before=store.now() - keep_s))
        trained_ones = [run.place.run_id for run in old if run.place.run_id in kept]
        if trained_ones:
            deletion = store.delete_runs(trained_ones, busy="skip")
            deleted += len(deletion.stubs)
            kept.difference_update(trained_ones)
        if step % 2 == 0:
            say(who="trainer", runs=trained.value, resident_bytes=resident_bytes(), lease_ms=lease_ms, deleted=deleted)
    assert trained.value >= runs, "the soak did not come to its end"


def main(url: str, runs: int, keep_s: float) -> int:
    store = open_store(url)
    store.register_job(JOB, [MODEL], {})
    live_version(store)
    store.close()
    written, trained = Value("q", 0), Value("q", 0)
    pids = []
    for work in (lambda: write(url, runs, written, trained), lambda: train(url, runs, keep_s, written, trained)):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
