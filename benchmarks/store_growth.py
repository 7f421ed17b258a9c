"""A store that has served for long: leasing and reading from it, opening it, and the memory that takes.

A few groups are written through the product's own methods and trained; then their rows are copied inside the database
under other names, until there are as many calls as wanted (10^6 take one to three minutes so; the rows are those that
the product wrote, with all their indexes, but their calls are small). What waits to be leased is written last, as
large as the goals say. A process of its own opens that store, leases and reads, so that its memory is the reader's.
Called by `store_speed`; refuses a table that it does not know and that holds rows.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, inspect, text
from store_calls import PROMPT, SAMPLED, large_calls, sample

from tracegrad.tracestore.database import parse_url
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import (
    JOB,
    account,
    add_group,
    live_version,
    make_call,
    make_commit,
    make_reward,
    make_rule,
    take,
)

GROUP, CALLS_PER_RUN, LEASED_RUNS, SEED_GROUPS = 8, 4, 64, 16
COPIED = {
    "tasks": ["task_id"],
    "groups": ["group_id", "task_id"],
    "runs": ["run_id", "task_id", "group_id"],
    "spans": ["run_id", "span_id"],
    "calls": ["call_id", "run_id", "span_id", "completion_id"],
    "call_payloads": ["seq"],
    "choices": ["seq"],
    "choice_payloads": ["seq"],
    "rewards": ["reward_id", "run_id"],
    "ledger": ["run_id"],
    "consumption": ["seq", "run_id"],
}
"""The tables that grow with what was served, parents first, and their columns that name something."""
KEPT = {
    "alembic_version",
    "blocks",
    "jobs",
    "job_models",
    "policy_versions",
    "publishes",
    "leases",
    "checkpoints",
    "step_versions",
}
"""The tables that do not."""


def small_calls(run: str, version: int) -> list[Call]:
    ids = sample(24, hash(run) % 10_000)
    return [
        replace(make_call(f"{run}-{n}", run, tokens=(ids[:8],), version=version), prompt_ids=ids)
        for n in range(CALLS_PER_RUN)
    ]


def whole_calls(run: str, version: int) -> list[Call]:
    made = large_calls(CALLS_PER_RUN, run, hash(run) % 1_000_000)
    return [replace(call, version_dispatched=version, version_completed=version) for call in made]


def grow(store: Store, groups: Sequence[str], version: int, calls_of: Callable[[str, int], list[Call]]) -> None:
    """Add closed, rewarded groups."""
    for group in groups:
        for run in add_group(store, group, size=GROUP):
            store.append_calls(calls_of(run, version))
            store.add_rewards([make_reward(f"reward-{run}", run, 1.0)])
            store.end_run(run, status="closed", ended_by="explicit")


def multiply(url: str, factor: int) -> None:
    """Copy every group of a store `factor` - 1 times under other names: what appending would make, only faster."""
    engine = create_engine(parse_url(url))
    sqlite = engine.dialect.name == "sqlite"
    with engine.connect() as connection:
        # What is copied refers to what is copied with it; the next transaction is checked again.
        off = "PRAGMA foreign_keys=OFF" if sqlite else "SET session_replication_role = replica"
        connection.execute(text(off))
        connection.execute(text("CREATE TEMP TABLE copies (n INTEGER)"))
        if factor > 1:
            connection.execute(text("INSERT INTO copies VALUES (:n)"), [{"n": n} for n in range(1, factor)])
        for table, columns in _columns(connection).items():
            _copy(connection, table, columns)
        connection.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    engine.dispose()


def _columns(connection: Connection) -> dict[str, list[str]]:
    found = inspect(connection)
    known = {*COPIED, *KEPT}
    for table in set(found.get_table_names()) - known:
        if connection.execute(text(f"SELECT 1 FROM {table} LIMIT 1")).first() is not None:
            raise RuntimeError(f"table {table} has rows: say in {__file__} whether it grows (COPIED) or not (KEPT)")
    return {table: [column["name"] for column in found.get_columns(table)] for table in COPIED}


def _copy(connection: Connection, table: str, columns: Sequence[str]) -> None:
    keys = COPIED[table]
    rest = [column for column in columns if column not in (*keys, "seq")]
    into = ", ".join([*sorted(keys, key="seq".__ne__), *rest])
    names = [key for key in keys if key != "seq"]
    renamed = [f"{table}_seed.{key} || '.' || n" for key in names] + [f"{table}_seed.{one}" for one in rest]
    connection.execute(text(f"CREATE TEMP TABLE {table}_seed AS SELECT * FROM {table}"))
    source = f"copies, {table}_seed"
    if "seq" in keys:  # the number that the copied call was given
        renamed.insert(0, "copied.seq")
        source = f"copies CROSS JOIN {table}_seed JOIN calls ON calls.seq = {table}_seed.seq"
        source += " JOIN calls AS copied ON copied.call_id = calls.call_id || '.' || n"
    # Copy by copy, as they would have come: an index on a name must not find its values in order.
    connection.execute(text(f"INSERT INTO {table} ({into}) SELECT {', '.join(renamed)} FROM {source} ORDER BY n"))
    connection.execute(text(f"DROP TABLE {table}_seed"))


def fill(url: str, n_calls: int) -> None:
    """Make a store of `n_calls` trained calls, in which twice the runs that one lease takes are waiting."""
    store = open_store(url)
    version = live_version(store).version_id
    grow(store, [f"old{number}" for number in range(SEED_GROUPS)], version, small_calls)
    lease = take(store, groups=SEED_GROUPS)
    store.commit_step(lease, make_commit(account(store, lease)))
    version = live_version(store, step=10).version_id  # what is stored by then is trained, and long stale
    multiply(url, max(n_calls // (SEED_GROUPS * GROUP * CALLS_PER_RUN), 1))
    grow(store, [f"new{number}" for number in range(2 * LEASED_RUNS // GROUP)], version, whole_calls)
    store.close()


def read(url: str, rounds: int) -> dict[str, float]:
    """Open, then lease 64 runs and read their tokens; medians, and the peak memory of this process."""
    before = peak_mb()
    began = time.perf_counter()
    store = open_store(url, create=False)
    opened_s = time.perf_counter() - began
    took = [lease_and_read(store, number) for number in range(rounds)]
    store.close()
    return {
        "lease_ms": statistics.median(took),
        "first_lease_ms": took[0],
        "open_s": opened_s,
        "reader_peak_mb": peak_mb(),
        "reader_added_mb": peak_mb() - before,
    }


def lease_and_read(store: Store, number: int) -> float:
    """Milliseconds in which 64 runs are leased and their tokens read; they are given back."""
    began = time.perf_counter()
    held = store.lease(JOB, make_rule(), groups=LEASED_RUNS // GROUP, lease_s=600, step=2, epoch=0, seed=number)
    if held is None:
        raise RuntimeError("nothing is ready: the benchmark's store is not what it should be")
    n_tokens = sum(
        len(choice.token_ids) + len(call.prompt_ids or ())
        for trace in store.lease_traces(held)
        for call in trace.calls
        for choice in call.choices
    )
    took = 1000 * (time.perf_counter() - began)
    if (len(held.plan.run_ids), n_tokens) != (LEASED_RUNS, LEASED_RUNS * CALLS_PER_RUN * (PROMPT + SAMPLED)):
        raise RuntimeError(f"leased {len(held.plan.run_ids)} runs with {n_tokens} tokens")
    store.release(held)
    return took


def peak_mb() -> float:
    """The most memory that this process had so far. Not `ru_maxrss`, which begins with the parent's."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(said["VmHWM"].split()[0]) / 1024


def growth(url_of: Callable[[str], Any], sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure at each size; `url_of` gives an empty database of that name for the time of a with block."""
    report: dict[str, Any] = {name: {} for name in ("lease_ms", "first_lease_ms", "reader_peak_mb", "reader_added_mb")}
    for n_calls in sizes:
        name = f"1e{len(str(n_calls)) - 1}"
        with url_of(f"bench_lease_{name}") as url:
            began = time.perf_counter()
            fill(url, n_calls)
            report[f"fill_s_{name}"] = time.perf_counter() - began
            command = [sys.executable, __file__, url, str(rounds)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        report[f"open_s_{name}"] = found.pop("open_s")
        for what, figure in found.items():
            report[what][name] = figure
    return report


@contextmanager
def sqlite_file(folder: Path, name: str) -> Iterator[str]:
    """The URL of a file that is gone afterwards."""
    path = folder / f"{name}.db"
    yield f"sqlite:///{path}"
    for left in folder.glob(f"{path.name}*"):
        left.unlink()


@contextmanager
def postgres_database(server: str, name: str) -> Iterator[str]:
    """The URL of a database on a server, which is gone afterwards."""
    engine = create_engine(parse_url(server), isolation_level="AUTOCOMMIT")
    name = f"{name}_{os.getpid()}"
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield engine.url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1], int(sys.argv[2]))))
