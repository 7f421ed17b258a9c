"""What workers and recomputed activations save: peak memory of a worker and seconds of a step, SmolLM2-135M on CPUs.

`python benchmarks/group_memory.py [--model DIR] [--out out/bench/groups.json] [--threads 1]`. bf16 with float32 masters
and a critic; two steps, of 4 groups of 8 answers (prompts of 300 tokens, answers of 16), in rows of at most 1,024
tokens. The second is measured. Every case is made by processes of its own, each worker on `threads` cores. Peaks are of
the step: to load, each worker needs the whole model first.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch writes no __all__
from torch.multiprocessing.spawn import spawn
from transformers.utils import logging

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import (
    Attribution,
    BatchPlan,
    Call,
    CallTiming,
    Choice,
    LeaseRule,
    ModelCalls,
    Reward,
    Run,
    RunTrace,
)
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.memory import return_freed_memory
from tracegrad.trainer.ranks import ALONE, join
from tracegrad.trainer.samples import build_batch

CASES = [(1, False), (1, True), (2, False), (2, True)]


def main() -> None:
    """Measure every case, print a line for each, write the JSON."""
    parser = argparse.ArgumentParser(description="Memory of the workers of a group on SmolLM2-135M")
    cached = Path.home() / ".cache/tracegrad/smollm2-135m-instruct"
    parser.add_argument("--model", default=os.environ.get("TRACEGRAD_MODEL", str(cached)))
    parser.add_argument("--out", default="out/bench/groups.json")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not (Path(arguments.model) / "config.json").exists():
        print(f"group_memory: no model at {arguments.model}; fetch it with `make demo` or name one. Skipped.")
        return
    results = [_case(arguments, size, recompute) for size, recompute in CASES]
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"threads": arguments.threads, "cases": results}, indent=1) + "\n")


def _case(arguments: argparse.Namespace, size: int, recompute: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (size, recompute, arguments, folder), nprocs=size)  # type: ignore[no-untyped-call]
        workers = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
    found = {
        "workers": size,
        "gradient_checkpointing": recompute,
        **{name: max(worker[name] for worker in workers) for name in workers[0]},
    }
    print(json.dumps(found), flush=True)
    return found


def _work(rank: int, size: int, recompute: bool, arguments: argparse.Namespace, folder: str) -> None:
    """One worker: its second step and what it needed for it."""
    logging.disable_progress_bar()
    ranks = ALONE
    if size > 1:
        ranks = join(rank, size, "cpu", FileStore(f"{folder}/meeting", size))
    config = _config(arguments, recompute)
    learner = Learner(config, ranks=ranks)
    learner.start()
    rule = LeaseRule(trained=(ModelCalls(model="main"),), max_staleness=1, min_group=1)
    samples = build_batch(_traces(learner.policy.lm.config.vocab_size), rule)
    learner.step(BatchPlan(step=1, epoch=0, seed=1, run_ids=("r",)), samples, version_id=1)
    return_freed_memory()
    held = _memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    done = learner.step(BatchPlan(step=2, epoch=0, seed=2, run_ids=("r",)), samples, version_id=1)
    report = {
        "seconds_per_step": round(time.perf_counter() - began, 2),
        "computed_tokens": done.metrics["tokens_computed"],
        "between_steps_mb": held,
        "peak_mb": _memory_mb("VmHWM"),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(report))


def _config(arguments: argparse.Namespace, recompute: bool) -> Config:
    trainer = {
        "precision": "bf16",
        "workers": {"threads": arguments.threads},
        "algorithm": {"credit": {"advantage": "gae"}},
        "batch": {"row_tokens": 1024, "gradient_checkpointing": recompute},
    }
    return parse_config({"models": {"main": {"checkpoint": arguments.model}}, "trainer": trainer})


def _traces(vocabulary: int) -> list[RunTrace]:
    rng = np.random.default_rng(0)
    traces = []
    for group in range(4):
        prompt = tuple(rng.integers(0, vocabulary, 300).tolist())
        for member in range(8):
            answer = tuple(rng.integers(0, vocabulary, 16).tolist())
            traces.append(_trace(f"g{group}", member, prompt, answer, float(rng.random())))
    return traces


def _trace(group: str, member: int, prompt: tuple[int, ...], answer: tuple[int, ...], reward: float) -> RunTrace:
    run_id = f"{group}-{member}"
    call = Call(
        call_id=f"call-{run_id}",
        completion_id=None,
        attribution=Attribution(run_id=run_id, run_source="header", role="answerer", role_source="header"),
        model="main",
        requested_model="main",
        version_dispatched=1,
        version_completed=1,
        prompt_ids=prompt,
        choices=(Choice(index=0, token_ids=answer, logprobs=(-1.0,) * len(answer), finish_reason="stop"),),
        status="complete",
        timing=CallTiming(received_at=1.0, dispatched_at=1.0, first_token_at=None, completed_at=2.0),
        request={"messages": []},
        requested={"temperature": 1.0},
        effective={"temperature": 1.0},
    )
    run = Run(run_id=run_id, purpose="train", task_id=group, group_id=group, member=member, status="closed")
    given = Reward(reward_id=f"rw-{run_id}", run_id=run_id, name="score", value=reward, source="benchmark")
    return RunTrace(run=run, calls=(call,), rewards=(given,))


def _memory_mb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


if __name__ == "__main__":
    main()
