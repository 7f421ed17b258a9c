"""Trainer speed: computed tokens per second of forward + backward + AdamW, packed against one row per call.

`python benchmarks/trainer_speed.py [--model DIR] [--out out/bench/trainer.json]`. The model is SmolLM2-135M-Instruct
from ``TRACEGRAD_MODEL`` or the cache that `make demo` fills; without it the benchmark says so and stops. bf16 with
float32 masters, value head on. Token ids are made up from a fixed seed: speed does not depend on the text.

Shapes (frozen):
  group of 8     one prompt of 360 tokens, 8 answers of 16 tokens
  4 groups of 8  4 prompts of 180-320 tokens that share a system prompt of 40, 8 answers of 4-20 tokens each
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from tracegrad.tracestore.algorithm import AlgorithmConfig
from tracegrad.trainer.batches import PackedRow, packed_row
from tracegrad.trainer.losses import LossInputs, objective
from tracegrad.trainer.packing import PackingStats, pack
from tracegrad.trainer.policy import Policy
from tracegrad.trainer.samples import ChoiceSample, Turn


def main() -> None:
    """Measure every shape, print a line for each, write the JSON."""
    parser = argparse.ArgumentParser(description="Trainer speed on SmolLM2-135M")
    parser.add_argument("--model", default=os.environ.get("TRACEGRAD_MODEL"))
    parser.add_argument("--out", default="out/bench/trainer.json")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--row-tokens", type=int, default=2048)
    arguments = parser.parse_args()
    model = Path(arguments.model) if arguments.model else _cached_model()
    if not (model / "config.json").exists():
        print(f"trainer_speed: no model at {model}; fetch it with `make demo` or name one with --model. Skipped.")
        return
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    policy = Policy.from_checkpoint(model, "bf16")
    optimizer = torch.optim.AdamW(
        [*policy.lm_masters().values(), *policy.value_masters().values()], lr=1e-6, betas=(0.9, 0.95), fused=True
    )
    vocabulary = int(policy.lm.config.vocab_size)
    shapes = {"group of 8": _group_of_8(vocabulary), "4 groups of 8": _groups(vocabulary)}
    results = {name: _shape(policy, optimizer, choices, arguments) for name, choices in shapes.items()}
    report = {
        "model": model.name,
        "precision": policy.precision,
        "threads": arguments.threads,
        "matmul_peak_gflops": round(_matmul_peak_gflops(), 1),
        "shapes": results,
    }
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    _print(report)


def _shape(
    policy: Policy, optimizer: torch.optim.Optimizer, choices: list[ChoiceSample], arguments: argparse.Namespace
) -> dict[str, object]:
    packed = pack(
        choices, row_tokens=arguments.row_tokens, attention_cost=policy.attention_cost, row_cost=policy.row_cost
    )
    alone = [pack(choices, row_tokens=arguments.row_tokens, select=[i]) for i in range(len(choices))]
    return {
        "packed": _time(policy, optimizer, [packed_row(row) for row in packed.rows], packed.stats, arguments.repeat),
        "per_call": _time(policy, optimizer, [packed_row(p.rows[0]) for p in alone], packed.stats, 1),
    }


def _time(
    policy: Policy, optimizer: torch.optim.Optimizer, rows: list[PackedRow], stats: PackingStats, repeat: int
) -> dict[str, float]:
    """Best of `repeat` updates after one that warms up (for the slow one row per call, after one row)."""
    _update(policy, optimizer, rows if repeat > 1 else rows[:1])
    seconds = min(_update(policy, optimizer, rows) for _ in range(repeat))
    computed = sum(row.n_nodes for row in rows)
    return {
        "seconds_per_update": round(seconds, 3),
        "rows": len(rows),
        "trained_tokens": stats.n_edges,
        "unique_tokens": stats.n_unique,
        "computed_tokens": computed,
        "tokens_per_s": round(computed / seconds, 1),
        "trained_tokens_per_s": round(stats.n_edges / seconds, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0),
    }


def _update(policy: Policy, optimizer: torch.optim.Optimizer, rows: list[PackedRow]) -> float:
    started = time.perf_counter()
    n_tokens = sum(row.n_edges for row in rows)
    policy.zero_grads()
    for row in rows:
        out = policy.edge_outputs(row)
        assert out.values_E is not None
        inputs = LossInputs(
            policy_logprobs_E=out.logprobs_E,
            proximal_logprobs_E=out.logprobs_E.detach(),
            behaviour_logprobs_E=out.logprobs_E.detach(),
            choice_E=row.edge_choice_E,
            weight_E=torch.full((row.n_edges,), 1.0 / n_tokens),
            advantages_E=torch.linspace(-1.0, 1.0, row.n_edges),
            values_E=out.values_E,
            old_values_E=out.values_E.detach(),
            targets_E=torch.ones(row.n_edges),
        )
        objective(inputs, AlgorithmConfig()).total.backward()
    optimizer.step()
    policy.refresh()
    return time.perf_counter() - started


def _group_of_8(vocabulary: int) -> list[ChoiceSample]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, vocabulary, 360)
    return [_choice(0, member, prompt, rng.integers(0, vocabulary, 16)) for member in range(8)]


def _groups(vocabulary: int) -> list[ChoiceSample]:
    rng = np.random.default_rng(1)
    system = rng.integers(0, vocabulary, 40)
    choices = []
    for group in range(4):
        prompt = np.concatenate([system, rng.integers(0, vocabulary, rng.integers(140, 281))])
        for member in range(8):
            choices.append(_choice(group, member, prompt, rng.integers(0, vocabulary, rng.integers(4, 21))))
    return choices


def _choice(group: int, member: int, prompt: NDArray[np.int64], answer: NDArray[np.int64]) -> ChoiceSample:
    return ChoiceSample(
        run_id=f"run_{group}_{member}",
        group_id=f"group_{group}",
        task_id=f"task_{group}",
        call_id=f"call_{group}_{member}",
        choice_index=0,
        role="answerer",
        turn=Turn(),
        prompt_ids=tuple(prompt.tolist()),
        token_ids=tuple(answer.tolist()),
        behaviour_logprobs=(-1.0,) * len(answer),
        temperature=0.8,
        finish_reason="stop",
        version_id=1,
    )


def _matmul_peak_gflops() -> float:
    """Best of ten bf16 products of 2048 x 2048, as GFLOP/s."""
    left, right = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best / 1e9


def _cached_model() -> Path:
    cache = os.environ.get("TRACEGRAD_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "tracegrad") / "smollm2-135m-instruct"


def _print(report: dict[str, object]) -> None:
    shapes = report["shapes"]
    assert isinstance(shapes, dict)
    print(
        f"{report['model']}, {report['precision']}, {report['threads']} threads, "
        f"matmul {report['matmul_peak_gflops']} GFLOP/s"
    )
    for name, systems in shapes.items():
        for system, figures in systems.items():
            print(
                f"  {name:14} {system:9} {figures['tokens_per_s']:7.1f} computed tok/s  "
                f"{figures['seconds_per_update']:7.2f} s/update  computed {figures['computed_tokens']:6d} "
                f"(unique {figures['unique_tokens']})  rows {figures['rows']:3d}  peak {figures['peak_rss_mb']:.0f} MB"
            )


if __name__ == "__main__":
    main()
