"""How long a publish of SmolLM2-135M takes: from a drained engine to the first answer by the new weights.

Real vLLM, the real publisher with its probe, no other load. Publishes visibly other weights and the base model in
turn, as files and through shared memory, and an adapter (rank 16, every linear layer) the same way; prints medians and
writes out/bench/publish.json. Drain time is stated apart: it is the length of the calls that
are in flight, not the publisher's. Skipped with a plain message where the model has not been fetched.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.store import open_store
from tracegrad.trainer import engine_launch
from tracegrad.trainer.adapter_client import engine_clients
from tracegrad.trainer.engine import EngineProcess
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.shared_weights import SharedWeights
from tracegrad.trainer.startup import CANARY_BOUNDS, probe_set

GOAL_S, GOAL_ADAPTER_S = 1.5, 0.5


def configuration(model: Path, folder: Path, *, adapter: bool, backend: str) -> Config:
    engine = {
        "url": f"http://127.0.0.1:{free_port()}",
        "max_model_len": 1024,
        "log": str(folder / "engine.log"),
        "transfer": {"backend": backend},
    }
    base = {"checkpoint": str(model), "engine": engine, "trained": not adapter}
    return parse_config(
        {
            "store": f"sqlite:///{folder / 'store.db'}",
            "models": {"base": base, **({"role": {"adapter": {"of": "base"}}} if adapter else {})},
            "roles": {"*": "role" if adapter else "base"},
            # what changes an adapter visibly changes it much, and bfloat16 then differs by 0.1 nats
            "trainer": {
                "output": str(folder),
                "workers": {"threads": 2},
                "publish": {"probe_bound": 0.3 if adapter else 0.1},
            },
        }
    )


def engine_of(config: Config) -> EngineProcess:
    """The engine, with room for adapters where there are any."""
    base = config.models["base"]
    args = engine_launch.adapter_flags(config.adapters_on("base"), config.adapter_slots("base"))
    return EngineProcess("base", replace(base, engine=replace(base.engine, args=args)), say=print)


def measure(config: Config, folder: Path, rounds: int) -> list[dict[str, float]]:
    store, (name,) = open_store(config.store), config.trained_models()
    learner = Learner(config, name)
    made = learner.create(str(folder / "checkpoints"))
    sequences = learner.probe_sequences(config.trainer.publish.probe_tokens, 0)
    gap = CANARY_BOUNDS * config.trainer.publish.probe_bound
    other = learner.perturbed(str(folder / "other"), gap, sequences, 0)
    turns = [
        (other.checkpoint, probe_set(other.new, other.previous)),
        (made, probe_set(other.previous, other.new)),
    ]
    times = []
    clients = engine_clients(config, name)
    with engine_of(config):
        publisher = Publisher(store, name, clients, config.trainer.publish, heartbeat_expires_s=10)
        for turn in range(-2, 2 * rounds):
            checkpoint, probe = turns[turn % 2]
            version = store.add_version(
                model=name,
                kind="initial",
                parent_id=None,
                checkpoint_path=checkpoint.path,
                checkpoint_hash=checkpoint.hash,
                step=0,
                job_id=None,
            )
            report = publisher.publish(version.version_id, probe)
            answered = time.monotonic()
            clients[0].sample(list(sequences[0].ids[:8]), max_tokens=1)
            first = time.monotonic() - answered
            drained = report.total_s - report.stage_s - report.drain_s + first
            parts = {part: getattr(report, part) for part in ("stage_s", "drain_s", "swap_s", "probe_s")}
            if turn >= 0:  # the first of each kind warms up
                times.append({**parts, "first_answer_s": first, "drained_to_answer_s": drained})
    store.close()
    return times


def copied(model: Path, rounds: int) -> float:
    """Seconds to read a checkpoint's weights (from the page cache) and to copy them once: what no publish is under."""
    took = []
    for _ in range(rounds + 1):
        start = time.monotonic()
        SharedWeights(model).close()
        took.append(time.monotonic() - start)
    return statistics.median(took[1:])


def main() -> None:
    cache = Path(os.environ.get("TRACEGRAD_CACHE") or Path.home() / ".cache" / "tracegrad")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=cache / "smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=["files", "memory", "adapter"])
    parser.add_argument("--out", type=Path, default=Path("out/bench/publish.json"))
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        print(f"publish benchmark skipped: {arguments.model} is not there; run `python -m examples.rag_qa.fetch`")
        return
    systems = {"files": (False, "files"), "memory": (False, "memory"), "adapter": (True, "files")}
    medians, rows = {}, {}
    for name in arguments.systems:
        adapter, backend = systems[name]
        with tempfile.TemporaryDirectory(prefix="tracegrad-bench-") as scratch:
            folder = Path(scratch)
            config = configuration(arguments.model, folder, adapter=adapter, backend=backend)
            rows[name] = measure(config, folder, arguments.rounds)
        medians[name] = {part: round(statistics.median(row[part] for row in rows[name]), 3) for part in rows[name][0]}
    copy_s = round(copied(arguments.model, arguments.rounds), 3)
    total = {name: median["drained_to_answer_s"] for name, median in medians.items()}
    made: dict[str, Any] = {"publish_s": total.get("files"), "publish_memory_s": total.get("memory")}
    made |= {"publish_adapter_s": total.get("adapter"), "copy_s": copy_s, "median": medians, "all": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(made, indent=2) + "\n")
    for name, median in medians.items():
        print(f"{name:8s}" + "  ".join(f"{part} {value:.3f}" for part, value in median.items()))
    print(f"copy_s {copy_s} s: the weights read and copied once")
    print(f"goal, drained to first answer: {GOAL_S} s, adapter {GOAL_ADAPTER_S} s")


if __name__ == "__main__":
    main()
