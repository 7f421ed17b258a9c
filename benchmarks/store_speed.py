"""How fast the trace store is, how large, and whether it stays so as it grows. Writes out/bench/store.json.

Calls of 2,200 tokens (2,000 prompt, 200 sampled with logprobs), each transaction durable; a 20-turn conversation
against the JSON that vLLM sends for it; lease of 64 runs of 4 such calls and read of their tokens in stores of 10^4,
10^5, and 10^6 calls, with the reader's memory (`store_growth`); and what others do with the same calls in the same run
(`store_peers`). PostgreSQL is measured where TRACEGRAD_TEST_POSTGRES names a server (`source scripts/postgres.sh;
start_postgres`). Run it with nothing else on the machine: `make bench-store`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, text
from store_calls import PROMPT, choice_of, large_calls, prose, sample
from store_growth import growth, postgres_database, sqlite_file
from store_peers import ASIDE, compare

from tracegrad.tracestore.database import parse_url
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import make_call

OUT = Path(__file__).parent.parent / "out" / "bench"
GOALS = {
    "sqlite": {"append_batched_per_s": 5_000, "append_single_per_s": 1_500},
    "postgresql": {"append_batched_per_s": 2_000},
}
GOAL_LEASE_MS, GOAL_OPEN_S, GOAL_SHARE_OF_JSON = 100.0, 1.0, 0.1
BATCH = 128
TURNS, SYSTEM, ASKED, ANSWERED, SYSTEM_RUNS = 20, 300, 60, 80, 1_000


def per_second(work: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def append_speed(store: Store, rounds: int) -> dict[str, float]:
    """Calls per second, many in a transaction and one in each, and the slowest of the latter (ms).

    Medians of alternating rounds. A round of single ones is as long as SQLite's log several times over: what copying
    it costs is in each.
    """
    batched, single, slowest = [], [], []
    for number in range(rounds):
        many = large_calls(8 * BATCH, f"many{number}", 10_000 * number)
        few = large_calls(1_000, f"few{number}", 5_000_000 + 10_000 * number)
        took: list[float] = []

        def all_together(many: list[Call] = many) -> None:
            for start in range(0, len(many), BATCH):
                store.append_calls(many[start : start + BATCH])

        def one_by_one(few: list[Call] = few, took: list[float] = took) -> None:
            for call in few:
                began = time.perf_counter()
                store.append_calls([call])
                took.append(time.perf_counter() - began)

        batched.append(per_second(all_together, len(many)))
        single.append(per_second(one_by_one, len(few)))
        slowest.append(1_000 * max(took))
    return {
        "append_batched_per_s": statistics.median(batched),
        "append_single_per_s": statistics.median(single),
        "append_single_slowest_ms": statistics.median(slowest),
    }


def disk_sync_us(folder: Path, pages: int = 20, rounds: int = 300) -> float:
    """Median microseconds that the disk takes to make a commit's pages durable, over bytes that a file has already.

    SQLite's commit of one call cannot take less. Written and waited for here with nothing else to do.
    """
    page, log = os.urandom(4096), folder / "sync"
    with log.open("w+b", buffering=0) as file:
        file.write(page * pages * rounds)
        os.fsync(file.fileno())
        file.seek(0)
        took = []
        for _ in range(rounds):
            for _ in range(pages):
                file.write(page)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    log.unlink()
    return 1e6 * statistics.median(took)


def conversation(run: str, seed: int) -> Iterator[Call]:
    """Twenty turns of an agent that sends its whole history each time; prompts go on as sampled."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": prose(4 * SYSTEM, seed)}]
    ids = sample(SYSTEM, seed)
    for turn in range(TURNS):
        number = 1_000 * seed + 2 * turn
        messages = [*messages, {"role": "user", "content": prose(4 * ASKED, number)}]
        ids += sample(ASKED, number)
        answer = choice_of(sample(ANSWERED, number + 1), prose(4 * ANSWERED, number + 1), number)
        yield make_call(f"{run}-{turn}", run, prompt_ids=ids, choices=(answer,), request={"messages": messages})
        messages, ids = [*messages, dict(answer.message)], ids + answer.token_ids


def one_system_prompt(runs: int) -> list[Call]:
    """Runs of one call each, that have a long system prompt in common and nothing else."""
    system, told = sample(PROMPT, -7), {"role": "system", "content": prose(4 * PROMPT, -7)}
    calls = []
    for number in range(runs):
        asked, answered = 10**6 + 2 * number, 10**6 + 2 * number + 1
        calls.append(
            make_call(
                f"one{number}",
                f"one-run{number}",
                prompt_ids=system + sample(ASKED, asked),
                choices=(choice_of(sample(ANSWERED, answered), prose(4 * ANSWERED, answered), number),),
                request={"messages": [told, {"role": "user", "content": prose(4 * ASKED, asked)}]},
            )
        )
    return calls


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
    """Bytes that a call of a 20-turn conversation adds to the store, one of 1,000 runs of a prompt, and their JSON."""
    runs = [list(conversation(f"talk{number}", number + 1)) for number in range(50)]
    for call in runs[0]:
        store.append_calls([call])
    before = size()
    for call in (call for calls in runs[1:] for call in calls):
        store.append_calls([call])
    stored = (size() - before) / (TURNS * (len(runs) - 1))
    before, single = size(), one_system_prompt(SYSTEM_RUNS)
    for start in range(0, len(single), BATCH):
        store.append_calls(single[start : start + BATCH])
    return {
        "bytes_per_call_one_system_prompt": (size() - before) / len(single),
        "json_bytes_per_call_one_system_prompt": statistics.mean(map(wire_bytes, single[:100])),
        "bytes_per_call_20_turns": stored,
        "json_bytes_per_call_20_turns": statistics.mean(map(wire_bytes, runs[0])),
    }


def sqlite_size(url: str) -> int:
    path = Path(str(parse_url(url).database))
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    engine.dispose()
    return path.stat().st_size


def postgres_size(url: str) -> int:
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        found = int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())
    engine.dispose()
    return found


def measure(url_of: Any, size: Callable[[str], int], rounds: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Everything, for one backend; `url_of` gives an empty database for the time of a with block."""
    with url_of("bench_append") as url:
        store = open_store(url)
        try:
            report: dict[str, Any] = {
                **append_speed(store, rounds),
                **conversation_size(store, lambda: size(url)),
            }
        finally:
            store.close()
    return {**report, **growth(url_of, sizes, rounds)}


def run(rounds: int, largest: int, *, peers: bool) -> dict[str, Any]:
    """Measure every backend there is, and the peers, and return the report."""
    OUT.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"rounds": rounds, "cpus": os.cpu_count(), "load_average": os.getloadavg()[0]}
    sizes = [n for n in (10_000, 100_000, 1_000_000) if n <= largest]
    with tempfile.TemporaryDirectory(dir=OUT) as name:
        folder = Path(name)
        report["disk_sync_us"] = disk_sync_us(folder)
        report["sqlite"] = measure(lambda name: sqlite_file(folder, name), sqlite_size, rounds, sizes)
        if (server := os.environ.get("TRACEGRAD_TEST_POSTGRES")) is not None:
            report["postgresql"] = measure(lambda name: postgres_database(server, name), postgres_size, rounds, sizes)
        if peers:
            report.update(compare(folder, rounds))
    return report


def show(report: dict[str, Any]) -> None:
    """Print the report as tables, with the goals beside it."""
    table = Table("backend", "what", "measured", "goal", title="the trace store")
    for backend in ("sqlite", "postgresql"):
        found = report.get(backend)
        if found is None:
            table.add_row(backend, "not measured: TRACEGRAD_TEST_POSTGRES names no server", "", "")
            continue
        for row in _rows(found, GOALS[backend]):
            table.add_row(backend, *row)
    table.add_row("the disk", "a commit's 20 pages made durable (us)", f"{report['disk_sync_us']:.0f}", "")
    Console().print(table)
    if ASIDE in report:
        Console().print(_beside(report))


def _rows(found: dict[str, Any], goals: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    for what in ("append_batched_per_s", "append_single_per_s"):
        yield what, f"{found[what]:,.0f}", f">= {goals[what]:,}" if what in goals else ""
    yield "the slowest of 1,000 single appends (ms)", f"{found['append_single_slowest_ms']:.0f}", ""
    yield "bytes per call, 20 turns, of JSON", _of_json(found, "20_turns"), f"<= {GOAL_SHARE_OF_JSON}"
    yield "bytes per call, 1,000 runs of one system prompt", _of_json(found, "one_system_prompt"), ""
    for size, took in found["lease_ms"].items():
        yield f"lease and read 64 runs of {size} calls (ms)", f"{took:.0f}", f"<= {GOAL_LEASE_MS:.0f}"
        yield "  its reader's peak memory (MB)", f"{found['reader_peak_mb'][size]:.0f}", ""
        yield f"open a store of {size} calls (s)", f"{found[f'open_s_{size}']:.3f}", f"< {GOAL_OPEN_S:.0f}"
        yield "  made in (s)", f"{found[f'fill_s_{size}']:.0f}", ""


def _of_json(found: dict[str, Any], what: str) -> str:
    stored, wire = found[f"bytes_per_call_{what}"], found[f"json_bytes_per_call_{what}"]
    return f"{stored:,.0f} of {wire:,.0f} ({stored / wire:.3f})"


def _beside(report: dict[str, Any]) -> Table:
    table = Table("system", "what", "measured", title="the same calls, in alternating rounds")
    for name in (ASIDE, "agentlightning", "mlflow"):
        for what, figure in report[name].items():
            table.add_row(name, what, f"{figure:,.0f}" if isinstance(figure, float) else str(figure))
    return table


def main() -> None:
    """Read the command line, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=1_000_000, help="calls in the largest store")
    parser.add_argument("--no-peers", action="store_true", help="measure tracegrad alone")
    asked = parser.parse_args()
    report = run(asked.rounds, asked.largest, peers=not asked.no_peers)
    (OUT / "store.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
