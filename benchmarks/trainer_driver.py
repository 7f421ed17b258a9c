"""Our learner applies updates: how long one takes. Run by `trainer_speed` as a process of its own.

What is timed is one `Learner.step` on samples in memory: packing, credit, (with a critic: the scoring pass), loss and
backward over all rows, gradient clipping, AdamW, rounding into bfloat16, metrics, giving memory back. bf16 with
float32 masters. Systems: `packed` and `per_call` compare runs of a group (GRPO: no critic, one update, so no scoring
pass) and differ in `row_tokens` alone, which is 1 for the latter: a row for each context. `packed_critic` is PPO with
a critic: a scoring pass and the update. `bound` is no system: it times matrix products (`peak_gflops`, bf16, the
threads of the others), and those of the model's layers alone on the traces' unique tokens, forward and backward.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.driving import drive, peak_rss_mb
from trainer_shapes import SHAPES, TracedCall, unique_tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import (
    Attribution,
    BatchPlan,
    Call,
    CallTiming,
    Choice,
    Reward,
    Run,
    RunTrace,
)
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.samples import Samples, build_batch

MODEL = "main"
ROW_TOKENS = 4096
Play = Callable[[str], dict[str, float]]


def traces_of(calls: list[TracedCall]) -> list[RunTrace]:
    """Return the runs as a store would give them: one group, every second run rewarded."""
    runs = list(dict.fromkeys(call.run for call in calls))
    return [
        RunTrace(
            run=Run(run_id=run, purpose="train", task_id="task", group_id="group", member=member, status="closed"),
            calls=tuple(_call(call, number) for number, call in enumerate(calls) if call.run == run),
            rewards=(Reward(reward_id=f"r{member}", run_id=run, name="score", value=float(member % 2), source="b"),),
        )
        for member, run in enumerate(runs)
    ]


def _call(call: TracedCall, number: int) -> Call:
    choice = Choice(
        index=0, token_ids=call.token_ids, logprobs=(-1.0,) * len(call.token_ids), finish_reason="stop", message={}
    )
    return Call(
        call_id=f"call{number}",
        completion_id=f"completion{number}",
        attribution=Attribution(run_id=call.run, role=call.role, role_source="header"),
        model=MODEL,
        requested_model=MODEL,
        version_dispatched=1,
        version_completed=1,
        prompt_ids=call.prompt_ids,
        choices=(choice,),
        status="complete",
        timing=CallTiming(received_at=0.0, dispatched_at=0.0, first_token_at=None, completed_at=1.0),
        request={},
        requested={},
        effective={"temperature": 1.0},
    )


def configuration(system: str, asked: dict[str, Any], folder: Path) -> Config:
    return parse_config(
        {
            "store": f"sqlite:///{folder / 'unused.db'}",
            "models": {MODEL: {"checkpoint": asked["model"]}},
            "roles": {"*": MODEL},
            "trainer": {
                "output": str(folder),
                "workers": {"threads": asked["threads"]},
                "algorithm": {"credit": {"advantage": "gae" if system == "packed_critic" else "grpo"}},
                "optimizer": {"lr": 1e-6},
                "batch": {"row_tokens": 1 if system == "per_call" else ROW_TOKENS},
            },
        }
    )


def updates(system: str, asked: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Play]:
    """Return what the system is, and what plays a round of it. One update has warmed it up."""
    calls = SHAPES[asked["kind"]]()
    config = configuration(system, asked, folder)
    samples: Samples = build_batch(traces_of(calls), lease_rule(config, offline=True))
    learner = Learner(config)
    learner.start()
    steps = 0

    def step() -> dict[str, Any]:
        nonlocal steps
        steps += 1
        plan = BatchPlan(step=steps, epoch=0, seed=steps, run_ids=tuple(samples.run_groups))
        return dict(learner.step(plan, samples, version_id=1).metrics)

    def play(_: str) -> dict[str, float]:
        began = time.perf_counter()
        step()
        return {"seconds_per_update": time.perf_counter() - began, "peak_rss_mb": peak_rss_mb()}

    metrics = step()
    about = {
        "trained_tokens": samples.n_trained_tokens,
        "computed_tokens": metrics["tokens_computed"],
        "parameters": sum(master.numel() for master in learner.policy.lm_masters().values()),
    }
    return about, play


def bound(asked: dict[str, Any]) -> tuple[dict[str, Any], Play]:
    """Return nothing, and what measures the machine."""
    torch.set_num_threads(asked["threads"])
    n_tokens = unique_tokens(SHAPES[asked["kind"]]())
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked["model"]))
    head = lm.get_output_embeddings()
    linears = [m for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights = [torch.randn(m.out_features, m.in_features).bfloat16() for m in linears]

    def play(_: str) -> dict[str, float]:
        return {"peak_gflops": peak_gflops(), "layer_matmuls_s": layer_matmuls_s(weights, n_tokens)}

    return {}, play


def peak_gflops() -> float:
    """Return the best of twenty bf16 products of 2048 x 2048, in GFLOP/s."""
    left, right = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    best = min(_seconds(lambda: torch.mm(left, right)) for _ in range(20))
    return 2 * 2048**3 / best / 1e9


def layer_matmuls_s(weights: list[torch.Tensor], n_tokens: int) -> float:
    """Return the seconds of every linear layer's three products (forward, and backward to input and weight)."""

    def work() -> None:
        for weight in weights:
            states = inputs[weight.shape[1]]
            out = torch.nn.functional.linear(states, weight)
            torch.mm(out, weight)
            torch.mm(out.t(), states)

    inputs = {width: torch.randn(n_tokens, width).bfloat16() for width in {weight.shape[1] for weight in weights}}
    return min(_seconds(work) for _ in range(2))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Serve rounds until the input ends."""
    folder, asked = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    logging.disable_progress_bar()
    about, play = bound(asked) if asked["system"] == "bound" else updates(asked["system"], asked, folder)
    drive(about, play)


if __name__ == "__main__":
    main()
