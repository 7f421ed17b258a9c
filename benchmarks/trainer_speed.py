"""Trainer speed: what one update on given traces takes, ours and TRL's, beside what matrix products alone would take.

`make bench-trainer`, or `python benchmarks/trainer_speed.py [--quick] [--shapes NAME ...] [--out FILE]`; writes
out/bench/trainer.json. The model is SmolLM2-135M-Instruct from `TRACEGRAD_MODEL` or the cache that `make demo` fills;
without it the benchmark says so and stops. Made-up token ids: speed does not depend on the text. The traces are frozen
in `trainer_shapes`: 8-turn agent, workflow of 3 roles, fan-out to 8, group of 8 on a long prompt, nothing shared.

What is timed is one update: from token ids in memory to new weights, nothing generated, nothing read or written.
    packed         `Learner.step`: packing, credit, loss, backward, clipping, AdamW, rounding (`trainer_driver`)
    per_call       the same with one row per call
    packed_critic  `packed` with a critic: a scoring pass and the update
    trl_grpo       one optimizer step of TRL's trainer, `on_step_begin` to `on_step_end` (`peers/trl_driver`): the same
                   calls, turns of one conversation joined into one row by its mask; no scoring pass
    trl_rloo       the same trainer loop; one row per call (it has no mask), with the scoring pass that it always makes
    bound          6 * N * unique tokens at the best rate of plain bf16 products of 2048 x 2048; N: all parameters
Everyone: bf16 compute over float32 weights and AdamW, gradients clipped, no gradient checkpointing, no reference
model, the same threads. TRL's rows at once: the fastest of 1, 2, 4 and 8 here, which was 1 (also its smallest memory).

Each system is a process of its own per kind of traces; all of a kind are there at once, one computes at a time, rounds
alternate, medians are taken. `computed_tokens` are those of one pass (TRL: with its padding), `tokens_per_s` are unique
tokens for everyone, so that rates compare as times do. `peak_rss_mb` is of the process, start to end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.driven import Driven
from peers.installs import python_of
from trainer_shapes import SHAPES, chains, one_by_one, per_call_tokens, rows_as_json, trained_tokens, unique_tokens

from tracegrad.tracestore.time_shares import shares_of

HERE = Path(__file__).parent
OURS = ("packed", "per_call", "packed_critic", "bound")
TRL = {"trl_grpo": chains, "trl_rloo": one_by_one}
ROWS_AT_ONCE = 1
GOALS = "goals: ratio >= 0.85 ideal; >= 4x TRL on group_of_8, >= 1x on nothing_shared; >= 0.65 of the bound"
BOUNDED_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""As the trainer's workers have them."""

DEMO = Path("out/demo")

Figures = dict[str, Any]


def main() -> None:
    """Measure every kind of traces, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description="Trainer speed on SmolLM2-135M, beside TRL")
    parser.add_argument("--model", type=Path, default=os.environ.get("TRACEGRAD_MODEL") or _cached_model())
    parser.add_argument("--out", type=Path, default=Path("out/bench/trainer.json"))
    parser.add_argument("--publish", type=Path, default=Path("out/bench/publish.json"), help="of publish_speed")
    parser.add_argument(
        "--metrics",
        type=Path,
        default=_metrics_of_the_demo(),
        help="metrics.jsonl of a loop with an engine: the shares of time; default: of the last `make demo`",
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--systems", nargs="+", choices=[*OURS, *TRL], default=[*OURS, *TRL])
    asked = parser.parse_args()
    if not (asked.model / "config.json").exists():
        print(f"trainer_speed: no model at {asked.model}; fetch it with `make demo` or name one with --model. Skipped.")
        return
    rounds = 1 if asked.quick else asked.rounds
    began = time.monotonic()
    kinds: dict[str, dict[str, Figures]] = {}
    report: Figures = {}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for kind in asked.shapes:
        kinds[kind] = measure(kind, asked, rounds)
        report = report_of(asked, kinds) | {"rounds": rounds, "seconds": round(time.monotonic() - began, 1)}
        asked.out.write_text(json.dumps(report, indent=1) + "\n")  # after each: the whole takes half an hour
    _print(report)


def report_of(asked: argparse.Namespace, measured: dict[str, dict[str, Figures]]) -> Figures:
    """Return what is measured so far, with the bound by the highest peak that was seen."""
    peak = max((one["bound"]["peak_gflops"] for one in measured.values() if "bound" in one), default=0.0)
    return {
        "model": asked.model.name,
        "precision": "bf16 over float32 masters",
        "threads": asked.threads,
        "load_average": os.getloadavg()[0],
        **({"matmul_peak_gflops": round(peak, 1)} if peak else {}),
        **published(asked.publish, asked.metrics),
        "shapes": {
            kind: completed(kind, {name: dict(one) for name, one in systems.items()}, peak)
            for kind, systems in measured.items()
        },
    }


def measure(kind: str, asked: argparse.Namespace, rounds: int) -> dict[str, Figures]:
    """Return system -> its medians over one kind of traces; what cannot be run says why."""
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="tracegrad-bench-") as scratch:
        driven: dict[str, Driven] = {}
        for system in asked.systems:
            print(f"{kind}: {system} starts", file=sys.stderr)
            try:
                driven[system] = start(system, kind, asked, Path(scratch))
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                if system not in TRL:
                    raise
                found[system] = {"not_measured": str(error)}
        for number in range(rounds):
            print(f"{kind}: round {number + 1} of {rounds}", file=sys.stderr)
            for one in driven.values():
                one.play(f"round{number}")
        for system, one in driven.items():
            one.end()
            found[system] = one.report()
    return found


def start(system: str, kind: str, asked: argparse.Namespace, scratch: Path) -> Driven:
    """Start the process of a system; it has warmed up with one update when this returns."""
    folder = scratch / system
    folder.mkdir()
    wanted: Figures = {"model": str(asked.model.resolve()), "kind": kind, "system": system, "threads": asked.threads}
    env = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
    if system in TRL:
        wanted |= {"rows": rows_as_json(TRL[system](SHAPES[kind]())), "rows_at_once": ROWS_AT_ONCE}
        python, driver = python_of("trl"), HERE / "peers" / "trl_driver.py"
    else:
        python, driver = Path(sys.executable), HERE / "trainer_driver.py"
        env |= BOUNDED_CACHES
    asked_file = folder / "asked.json"
    asked_file.write_text(json.dumps(wanted))
    return Driven(system, [python, driver.resolve(), folder, asked_file], folder, env=env)


def completed(kind: str, systems: dict[str, Figures], peak_gflops: float) -> Figures:
    """Add the bound, the rates and the ratios that the goals are about."""
    calls = SHAPES[kind]()
    unique = unique_tokens(calls)
    if "bound" in systems and "not_measured" not in systems.get("packed", {"not_measured": 1}):
        flops = 6 * systems["packed"]["parameters"] * unique
        systems["bound"] |= {"seconds_per_update": flops / peak_gflops / 1e9, "computed_tokens": unique}
        systems["bound"]["trained_tokens"] = trained_tokens(calls)
    seconds = {name: one["seconds_per_update"] for name, one in systems.items() if "seconds_per_update" in one}
    for name, took in seconds.items():
        systems[name]["tokens_per_s"] = unique / took
    ideal = per_call_tokens(calls) / unique
    ratios = {f"{name}_over_packed": took / seconds["packed"] for name, took in seconds.items() if "packed" in seconds}
    ratios.pop("packed_over_packed", None)
    facts = {"unique_tokens": unique, "per_call_tokens": per_call_tokens(calls), "ideal_ratio": ideal, **ratios}
    if "per_call" in seconds and "packed" in seconds:
        facts["share_of_ideal"] = facts["per_call_over_packed"] / ideal
    return {name: _rounded(one) for name, one in {**systems, "facts": facts}.items()}


def published(path: Path, loop: Path | None) -> Figures:
    """Return what a publish takes as `publish_speed` measured it, and of a loop's lines the shares of time."""
    made: Figures = json.loads(path.read_text()) if path.exists() else {}
    if loop is not None:
        made |= shares_of(json.loads(line) for line in loop.read_text().splitlines())
    how = dict.fromkeys(("publish_s", "publish_adapter_s", "copy_s"), "run benchmarks/publish_speed.py first")
    how |= dict.fromkeys(
        ("engine_paused_share", "fresh_wait_share"), "run `make demo` first, or --metrics: metrics.jsonl of a loop"
    )
    measured = {name: made[name] for name in how if made.get(name) is not None}
    missing = {name: why for name, why in how.items() if name not in measured}
    return {**measured, **({"not_measured": missing} if missing else {})}


def _rounded(figures: Figures) -> Figures:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


def _cached_model() -> Path:
    cache = os.environ.get("TRACEGRAD_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "tracegrad") / "smollm2-135m-instruct"


def _metrics_of_the_demo() -> Path | None:
    found = sorted(DEMO.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _print(report: Figures) -> None:
    print(f"{report['model']}, {report['precision']}, {report['threads']} threads, {report['rounds']} rounds, ", end="")
    print(f"matmul {report.get('matmul_peak_gflops')} GFLOP/s, load {report['load_average']:.1f}")
    for kind, systems in report["shapes"].items():
        facts = systems["facts"]
        print(f"{kind}: unique {facts['unique_tokens']}, ideal ratio {facts['ideal_ratio']}", end="")
        print(f", share of it {facts.get('share_of_ideal')}, of the bound {facts.get('bound_over_packed')}")
        for name, figures in systems.items():
            if "not_measured" in figures:
                print(f"  {name:14} not measured: {figures['not_measured'][-300:]}")
            elif "seconds_per_update" in figures:
                ratio = facts.get(f"{name}_over_packed", 1.0)
                print(
                    f"  {name:14} {figures['seconds_per_update']:8.3f} s/update  {ratio:7.2f}x packed  "
                    f"{figures['tokens_per_s']:8.1f} tok/s  computed {figures['computed_tokens']:6d}  "
                    f"peak {figures.get('peak_rss_mb', 0.0):6.0f} MB"
                )
    print(f"{GOALS}; {report['seconds']} s in all")


if __name__ == "__main__":
    main()
