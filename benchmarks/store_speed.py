"""How fast the trace store is, how large, and whether it stays so as it grows. Writes out/bench/store.json.

Calls of 2,200 tokens (2,000 prompt, 200 sampled with logprobs), each transaction durable; a 20-turn conversation
against the JSON that vLLM sends for it; lease of 64 runs of 4 calls and read of their tokens in stores of 10^4, 10^5,
and 10^6 calls (SQLite; small calls, all but the newest trained already). PostgreSQL is measured where
TRACEGRAD_TEST_POSTGRES names a server (`source scripts/postgres.sh; start_postgres`).
Run it with nothing else on the machine: `python benchmarks/store_speed.py`.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, text

from tracegrad.tracestore.records import Call, Choice
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

OUT = Path(__file__).parent.parent / "out" / "bench"
GOALS = {
    "sqlite": {"append_batched_per_s": 5_000, "append_single_per_s": 1_500},
    "postgresql": {"append_batched_per_s": 2_000},
}
GOAL_LEASE_MS, GOAL_OPEN_S, GOAL_SHARE_OF_JSON = 100.0, 1.0, 0.1
PROMPT, SAMPLED, BATCH, VOCABULARY = 2_000, 200, 128, 50_000
TURNS, SYSTEM, ASKED, ANSWERED = 20, 300, 60, 80
GROUP, CALLS_PER_RUN, LEASED_RUNS = 8, 4, 64


def sample(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCABULARY), k=count))


def choice_of(ids: tuple[int, ...], text_: str, seed: int) -> Choice:
    generator = random.Random(seed)
    return Choice(
        index=0,
        token_ids=ids,
        logprobs=tuple(-generator.random() for _ in ids),
        finish_reason="stop",
        message={"role": "assistant", "content": text_},
    )


def large_calls(count: int, run: str, seed: int) -> list[Call]:
    """Different prompts and answers, as long as the goals say."""
    said = "A passage about something, of which there are many. " * 150
    return [
        make_call(
            f"{run}-{number}",
            run,
            prompt_ids=sample(PROMPT, seed + number),
            choices=(choice_of(sample(SAMPLED, -seed - number), "x" * 4 * SAMPLED, number),),
            request={"messages": [{"role": "user", "content": f"{number} {said}"}]},
        )
        for number in range(count)
    ]


def per_second(work: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def append_speed(store: Store, rounds: int) -> dict[str, float]:
    """Calls per second, many in a transaction and one in each; medians of alternating rounds."""
    batched, single = [], []
    for number in range(rounds):
        many = large_calls(8 * BATCH, f"many{number}", 10_000 * number)
        few = large_calls(200, f"few{number}", 5_000_000 + 10_000 * number)

        def all_together(many: list[Call] = many) -> None:
            for start in range(0, len(many), BATCH):
                store.append_calls(many[start : start + BATCH])

        def one_by_one(few: list[Call] = few) -> None:
            for call in few:
                store.append_calls([call])

        batched.append(per_second(all_together, len(many)))
        single.append(per_second(one_by_one, len(few)))
    return {
        "append_batched_per_s": statistics.median(batched),
        "append_single_per_s": statistics.median(single),
    }


def conversation(run: str) -> Iterator[Call]:
    """Twenty turns of an agent that sends its whole history each time; prompts go on as sampled."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "x" * 4 * SYSTEM}]
    ids = sample(SYSTEM, 1)
    for turn in range(TURNS):
        messages = [*messages, {"role": "user", "content": f"{turn} " + "y" * 4 * ASKED}]
        ids += sample(ASKED, 100 + turn)
        answer = choice_of(sample(ANSWERED, 200 + turn), f"{turn} " + "z" * 4 * ANSWERED, turn)
        yield make_call(f"{run}-{turn}", run, prompt_ids=ids, choices=(answer,), request={"messages": messages})
        messages, ids = [*messages, dict(answer.message)], ids + answer.token_ids


def wire_bytes(call: Call) -> int:
    """The request and vLLM's answer to it with ids and logprobs, as JSON. Source: vLLM 0.32, chat completions."""
    (choice,) = call.choices
    content = [
        {"token": "word", "logprob": logprob, "bytes": [119, 111, 114, 100], "top_logprobs": []}
        for logprob in choice.logprobs or ()
    ]
    answer = {
        "id": call.completion_id,
        "object": "chat.completion",
        "created": 1,
        "model": call.model,
        "choices": [
            {
                "index": 0,
                "message": choice.message,
                "logprobs": {"content": content},
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": choice.token_ids,
            }
        ],
        "usage": {"prompt_tokens": len(call.prompt_ids or ()), "completion_tokens": len(choice.token_ids)},
        "prompt_token_ids": call.prompt_ids,
    }
    return sum(len(json.dumps(one, separators=(",", ":"))) for one in (call.request, answer))


def conversation_size(store: Store, size: Callable[[], int]) -> dict[str, float]:
    """Bytes that a call of a 20-turn conversation adds to the store, and its JSON."""
    runs = [list(conversation(f"talk{number}")) for number in range(50)]
    store.append_calls(runs[0])
    before = size()
    for calls in runs[1:]:
        store.append_calls(calls)
    stored = (size() - before) / (TURNS * (len(runs) - 1))
    return {
        "bytes_per_call_20_turns": stored,
        "json_bytes_per_call_20_turns": statistics.mean(map(wire_bytes, runs[0])),
    }


def sqlite_size(path: Path) -> int:
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    engine.dispose()
    return path.stat().st_size


def postgres_size(url: str) -> int:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())
    engine.dispose()
    return found


def grow(store: Store, groups: Sequence[str], version: int) -> None:
    """Add closed, rewarded groups, of four small calls a run."""
    for group in groups:
        for run in add_group(store, group, size=GROUP):
            ids = sample(24, hash(run) % 10_000)
            store.append_calls(
                [
                    replace(make_call(f"{run}-{n}", run, tokens=(ids[:8],), version=version), prompt_ids=ids)
                    for n in range(CALLS_PER_RUN)
                ]
            )
            store.add_rewards([make_reward(f"reward-{run}", run, 1.0)])
            store.end_run(run, status="closed", ended_by="explicit")


def multiply(path: Path, factor: int) -> None:
    """Copy every group of a store `factor` - 1 times under other names: what appending would make, only faster."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("PRAGMA foreign_keys=OFF"))
        for table, keys, rest in _copied(connection):
            for number in range(1, factor):
                renamed = ", ".join(f"{key} || '.{number}'" for key in keys)
                columns = ", ".join([*keys, *rest])
                chosen = ", ".join(part for part in (renamed, ", ".join(rest)) if part)
                connection.execute(text(f"INSERT INTO {table} ({columns}) SELECT {chosen} FROM {table}_seed"))
            connection.execute(text(f"DROP TABLE {table}_seed"))
    with engine.connect() as connection:
        connection.execute(text("ANALYZE"))
    engine.dispose()


def _copied(connection: Any) -> Iterator[tuple[str, list[str], list[str]]]:
    """The tables that hold runs, with the columns that name something and the others; each is put aside first."""
    names = {
        "tasks": ["task_id"],
        "groups": ["group_id", "task_id"],
        "runs": ["run_id", "task_id", "group_id"],
        "spans": ["run_id", "span_id"],
        "calls": ["call_id", "run_id", "span_id", "completion_id"],
        "call_payloads": ["call_id"],
        "choices": ["call_id"],
        "choice_payloads": ["call_id"],
        "rewards": ["reward_id", "run_id"],
        "ledger": ["run_id"],
        "consumption": ["call_id", "run_id"],
    }
    for table, keys in names.items():
        connection.execute(text(f"CREATE TEMP TABLE {table}_seed AS SELECT * FROM {table}"))
        columns = [row[1] for row in connection.execute(text(f"PRAGMA table_info({table})"))]
        yield table, keys, [column for column in columns if column not in (*keys, "seq")]


def lease_speed(folder: Path, n_calls: int, rounds: int) -> dict[str, float]:
    """Open, lease 64 runs, read their tokens; medians. The store holds `n_calls` trained ones, and some that wait."""
    path = folder / f"lease-{n_calls}.db"
    seed = 16 * GROUP * CALLS_PER_RUN
    store = open_store(f"sqlite:///{path}")
    version = live_version(store).version_id
    grow(store, [f"old{number}" for number in range(16)], version)
    lease = take(store, groups=16)
    store.commit_step(lease, make_commit(account(store, lease)))
    version = live_version(store, step=10).version_id  # what is stored by then is trained, and long stale
    store.close()
    multiply(path, max(n_calls // seed, 1))
    began = time.perf_counter()
    store = open_store(f"sqlite:///{path}", create=False)
    opened_s = time.perf_counter() - began
    grow(store, [f"new{number}" for number in range(2 * LEASED_RUNS // GROUP)], version)
    took = []
    for number in range(rounds):
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
        took.append(1000 * (time.perf_counter() - began))
        if (len(held.plan.run_ids), n_tokens) != (LEASED_RUNS, LEASED_RUNS * CALLS_PER_RUN * 32):
            raise RuntimeError(f"leased {len(held.plan.run_ids)} runs with {n_tokens} tokens")
        store.release(held)
    store.close()
    path.unlink()
    return {"lease_ms": statistics.median(took), "open_s": opened_s}


def measure(backend: str, url: str, size: Callable[[], int], rounds: int) -> dict[str, Any]:
    """Everything but the growth, for one backend."""
    store = open_store(url)
    try:
        report: dict[str, Any] = {**append_speed(store, rounds), **conversation_size(store, size)}
    finally:
        store.close()
    return {"backend": backend, **report}


def run(rounds: int, largest: int) -> dict[str, Any]:
    """Measure every backend there is and return the report."""
    OUT.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"rounds": rounds, "cpus": os.cpu_count(), "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(dir=OUT) as name:
        folder = Path(name)
        path = folder / "store.db"
        sqlite = measure("sqlite", f"sqlite:///{path}", lambda: sqlite_size(path), rounds)
        sizes = [n for n in (10_000, 100_000, 1_000_000) if n <= largest]
        grown = {n: lease_speed(folder, n, rounds) for n in sizes}
        sqlite["lease_ms"] = {f"1e{len(str(n)) - 1}": grown[n]["lease_ms"] for n in sizes}
        sqlite[f"open_s_1e{len(str(sizes[-1])) - 1}"] = grown[sizes[-1]]["open_s"]
        report["sqlite"] = sqlite
    if (url := os.environ.get("TRACEGRAD_TEST_POSTGRES")) is not None:
        report["postgresql"] = measure("postgresql", url, lambda: postgres_size(url), rounds)
    return report


def show(report: dict[str, Any]) -> None:
    """Print the report as a table, with the goals beside it."""
    table = Table("backend", "what", "measured", "goal", title="the trace store")
    for backend in ("sqlite", "postgresql"):
        found = report.get(backend)
        if found is None:
            table.add_row(backend, "not measured: TRACEGRAD_TEST_POSTGRES names no server", "", "")
            continue
        for what in ("append_batched_per_s", "append_single_per_s"):
            goal = GOALS[backend].get(what)
            table.add_row(backend, what, f"{found[what]:,.0f}", "" if goal is None else f">= {goal:,}")
        share = found["bytes_per_call_20_turns"] / found["json_bytes_per_call_20_turns"]
        told = f"{found['bytes_per_call_20_turns']:,.0f} of {found['json_bytes_per_call_20_turns']:,.0f} ({share:.2f})"
        table.add_row(backend, "bytes per call, 20 turns, of JSON", told, f"<= {GOAL_SHARE_OF_JSON}")
        for size, took in found.get("lease_ms", {}).items():
            table.add_row(backend, f"lease 64 runs of {size} calls (ms)", f"{took:.0f}", f"<= {GOAL_LEASE_MS:.0f}")
        for what, took in found.items():
            if what.startswith("open_s"):
                table.add_row(backend, f"{what} (s)", f"{took:.2f}", f"< {GOAL_OPEN_S:.0f}")
    Console().print(table)


def main() -> None:
    """Read the command line, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=1_000_000, help="calls in the largest store")
    asked = parser.parse_args()
    report = run(asked.rounds, asked.largest)
    (OUT / "store.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
