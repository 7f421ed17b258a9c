"""How long a publish of SmolLM2-135M takes: from a drained engine to the first answer by the new weights.

Real vLLM, the real publisher with its probe, no other load. Publishes visibly other weights and the base model in
turn; prints medians and writes out/bench/publish.json. Drain time is stated apart: it is the length of the calls that
are in flight, not the publisher's. Skipped with a plain message where the model has not been fetched.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.engine import EngineProcess
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.startup import CANARY_BOUNDS, probe_set

GOAL_S = 3.0


def configuration(model: Path, folder: Path) -> Config:
    engine = {"url": f"http://127.0.0.1:{free_port()}", "max_model_len": 1024, "log": str(folder / "engine.log")}
    return parse_config(
        {
            "store": f"sqlite:///{folder / 'store.db'}",
            "models": {"main": {"checkpoint": str(model), "engine": engine}},
            "roles": {"*": "main"},
            "trainer": {"output": str(folder), "workers": {"threads": 2}},
        }
    )


def measure(config: Config, folder: Path, rounds: int) -> list[dict[str, float]]:
    store = open_store(config.store)
    learner = Learner(config)
    made = learner.create(str(folder / "checkpoints"))
    sequences = learner.probe_sequences(config.trainer.publish.probe_tokens, 0)
    gap = CANARY_BOUNDS * config.trainer.publish.probe_bound
    other = learner.perturbed(str(folder / "other"), gap, sequences, 0)
    turns = [
        (other.checkpoint, probe_set(other.new, other.previous)),
        (made, probe_set(other.previous, other.new)),
    ]
    times = []
    with EngineProcess("main", config.models["main"], say=print) as engine:
        publisher = Publisher(store, "main", [engine.client], config.trainer.publish, heartbeat_expires_s=10)
        for turn in range(-2, 2 * rounds):
            checkpoint, probe = turns[turn % 2]
            version = store.add_version(
                model="main",
                kind="initial",
                parent_id=None,
                checkpoint_path=checkpoint.path,
                checkpoint_hash=checkpoint.hash,
                step=0,
                job_id=None,
            )
            report = publisher.publish(version.version_id, probe)
            answered = time.monotonic()
            engine.client.sample(list(sequences[0].ids[:8]), max_tokens=1)
            first = time.monotonic() - answered
            drained = report.total_s - report.drain_s + first
            row = {"drain_s": report.drain_s, "swap_s": report.swap_s, "probe_s": report.probe_s}
            if turn >= 0:  # the first of each kind warms up
                times.append({**row, "first_answer_s": first, "drained_to_answer_s": drained})
    store.close()
    return times


def main() -> None:
    cache = Path(os.environ.get("TRACEGRAD_CACHE") or Path.home() / ".cache" / "tracegrad")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=cache / "smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/bench/publish.json"))
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        print(f"publish benchmark skipped: {arguments.model} is not there; run `python -m examples.rag_qa.fetch`")
        return
    with tempfile.TemporaryDirectory(prefix="tracegrad-bench-") as scratch:
        folder = Path(scratch)
        times = measure(configuration(arguments.model, folder), folder, arguments.rounds)
    median = {name: round(statistics.median(row[name] for row in times), 3) for name in times[0]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"publishes": len(times), "median": median, "all": times}, indent=2) + "\n")
    for name, value in median.items():
        print(f"{name:22s} {value:8.3f} s")
    print(f"goal: drained to first answer <= {GOAL_S} s")


if __name__ == "__main__":
    main()
