"""MLflow tracing on SQLite records calls: what it does in a second. Run by `store_peers` in a venv of its own.

One call is one trace of one span, whose inputs and outputs hold the messages, the token ids and the logprobs as plain
lists, without vLLM's JSON around them. *Single* waits for each trace to be stored, *batched* is its own asynchronous
exporter, timed until it is flushed. Reading is one search that gives back 256 traces with their spans.
"""

import os

os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import mlflow
from driving import CALLS_PER_RUN, drive, folder_and_calls, per_second

READ_CALLS = 64 * CALLS_PER_RUN


def record(call: dict[str, Any]) -> None:
    with mlflow.start_span("call", span_type="CHAT_MODEL") as span:
        span.set_inputs({"messages": call["request"]["messages"], "prompt_ids": call["prompt_ids"]})
        span.set_outputs({name: call[name] for name in ("message", "token_ids", "logprobs")})


def export(*, asynchronously: bool) -> None:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = str(asynchronously).lower()
    mlflow.tracing.reset()


class Rounds:
    """The rounds, on one SQLite file."""

    def __init__(self, path: Path, calls: list[dict[str, Any]]) -> None:
        self.path, self.calls = path, calls
        mlflow.set_tracking_uri(f"sqlite:///{path}")
        mlflow.set_experiment("bench")
        record(calls[0])

    def play(self, name: str) -> dict[str, float]:
        """Time one round."""
        export(asynchronously=False)
        figures = {"append_single_per_s": per_second(record, self.calls)}
        figures["append_batched_per_s"] = self.together(self.calls)
        missing = READ_CALLS - self.stored()
        if missing > 0:
            self.together([self.calls[number % len(self.calls)] for number in range(missing)])
        return {**figures, "read_64_runs_ms": self.read()}

    def together(self, calls: list[dict[str, Any]]) -> float:
        export(asynchronously=True)
        began = time.perf_counter()
        for call in calls:
            record(call)
        mlflow.flush_trace_async_logging()
        took = time.perf_counter() - began
        export(asynchronously=False)
        return len(calls) / took

    def read(self) -> float:
        began = time.perf_counter()
        found = mlflow.search_traces(max_results=READ_CALLS, return_type="list")
        n_tokens = sum(len(trace.data.spans[0].inputs["prompt_ids"]) for trace in found)
        took = 1000 * (time.perf_counter() - began)
        if (len(found), n_tokens) != (READ_CALLS, READ_CALLS * len(self.calls[0]["prompt_ids"])):
            raise RuntimeError(f"it gave back {len(found)} calls with {n_tokens} prompt tokens")
        return took

    def stored(self) -> int:
        with sqlite3.connect(self.path) as connection:
            return int(connection.execute("SELECT count(*) FROM spans").fetchone()[0])

    def bytes_per_call(self) -> float:
        """Bytes that one call adds to the file."""
        before, stored = self.path.stat().st_size, self.stored()
        for call in self.calls:
            record(call)
        return (self.path.stat().st_size - before) / (self.stored() - stored)

    def durability(self) -> str:
        with sqlite3.connect(self.path) as connection:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        committed = f"committed to SQLite (journal mode {mode}, synchronous FULL)"
        return f"single: {committed} when the call returns; batched: when flushed"


def main() -> None:
    """Serve rounds until the input ends."""
    logging.disable(logging.WARNING)
    folder, calls = folder_and_calls()
    rounds = Rounds(folder / "mlflow.db", calls)
    about = {
        "version": mlflow.__version__,
        "durability": rounds.durability(),
        "bytes_per_call": rounds.bytes_per_call(),
    }
    drive(about, rounds.play)


if __name__ == "__main__":
    main()
