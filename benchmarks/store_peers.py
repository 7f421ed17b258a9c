"""What others do per second with the calls that the store is measured with: Agent Lightning and MLflow tracing.

The unit is one recorded model call: 8 KB of messages, 2,000 prompt ids, 200 sampled ids with logprobs, the answer.
Everyone gets the same calls as objects in memory and is timed until its own interface says that the call is recorded;
how durable that is stands beside each figure. Rounds alternate (ours, theirs, ours, ...) and medians are taken. Each
peer runs in an environment of its own (`peers/`) and is driven through a pipe; what it is asked is in its driver.
Ours is `Store.append_calls` on SQLite, one durable commit a call or a batch, and lease plus read of 64 runs.
Called by `store_speed`; refuses nothing: a peer that cannot be installed or run is told as such.
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from peers.driven import Driven, medians
from peers.installs import python_of
from store_calls import large_calls
from store_growth import GROUP, LEASED_RUNS, grow, lease_and_read, whole_calls

from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import JOB, MODEL, live_version

ASIDE = "tracegrad_beside_them"
DRIVERS = Path(__file__).parent / "peers"
PEERS = ("agentlightning", "mlflow")
BATCH = 32
"""Calls that a peer records one after another, and together, in a round; ours are eight times as many."""


def peer(name: str, folder: Path, calls: Path) -> Driven:
    """Start the driver of a peer in the peer's own environment."""
    scratch = folder / name
    scratch.mkdir()
    return Driven(name, [python_of(name), DRIVERS / f"{name}_driver.py", scratch, calls], scratch)


def as_plain(call: Call) -> dict[str, Any]:
    """A call as the peers get it."""
    (choice,) = call.choices
    return {
        "request": call.request,
        "prompt_ids": call.prompt_ids,
        "token_ids": choice.token_ids,
        "logprobs": choice.logprobs,
        "message": choice.message,
    }


def open_ours(path: Path) -> Store:
    """A store in which 64 runs wait to be leased."""
    store = open_store(f"sqlite:///{path}")
    grow(store, [f"g{number}" for number in range(LEASED_RUNS // GROUP)], live_version(store).version_id, whole_calls)
    store.register_job(JOB, [MODEL], {})
    return store


def our_round(store: Store, number: int) -> dict[str, float]:
    """As the drivers: one by one, together, read."""
    alone = large_calls(8 * BATCH, f"alone{number}", number * 1000)
    together = large_calls(8 * BATCH, f"together{number}", 500_000 + number * 1000)  # other prompts: nothing is shared
    began = time.perf_counter()
    for call in alone:
        store.append_calls([call])
    between = time.perf_counter()
    for start in range(0, len(together), 4 * BATCH):
        store.append_calls(together[start : start + 4 * BATCH])
    ended = time.perf_counter()
    return {
        "append_single_per_s": len(alone) / (between - began),
        "append_batched_per_s": len(together) / (ended - between),
        "read_64_runs_ms": lease_and_read(store, number),
    }


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Return peer -> its figures, and ours from the same rounds as `tracegrad_beside_them`."""
    calls = folder / "calls.json"
    calls.write_text(json.dumps([as_plain(call) for call in large_calls(BATCH, "peer", 77)]))
    peers: dict[str, Driven] = {}
    report: dict[str, Any] = {}
    for name in PEERS:
        try:
            peers[name] = peer(name, folder, calls)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            report[name] = {"not_measured": str(error)}
    store = open_ours(folder / "beside.db")
    ours = []
    for number in range(rounds):
        ours.append(our_round(store, number))
        for driven in peers.values():
            driven.play(f"round{number}")
    store.close()
    for name, driven in peers.items():
        driven.end()
        report[name] = driven.report()
    durability = "SQLite, journal mode WAL, synchronous FULL: committed when the call returns"
    return {**report, ASIDE: {"durability": durability, **medians(ours)}}
