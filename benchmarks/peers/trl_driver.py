"""TRL 1.16.0 applies updates: how long one takes. Run by `trainer_speed` in a venv of its own.

What is timed is one optimizer step of TRL's own `Trainer` loop, from `on_step_begin` to `on_step_end`: rewards,
advantages, padding, the scoring passes that its settings ask for, loss and backward over all micro-batches, gradient
clipping, AdamW. Nothing is generated: the rows are given, for GRPO through its `rollout_func`, for RLOO in place of
its tokenizer and its `generate`.

Its best settings here: float32 weights under bf16 autocast (TRL's own default, and what ours does), no gradient
checkpointing, no reference model (`beta` 0), one update per generation, so that GRPO has no scoring pass (RLOO always
has one), fused AdamW, logits of completions only (its fused head). Its rows are padded to the longest of the batch;
GRPO and RLOO have no padding-free batches. GRPO takes a mask of trained tokens, so the turns of one conversation are
one row; RLOO has none: one row per call.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset, disable_progress_bars
from driving import peak_rss_mb, rounds, say
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, __version__

Rows = list[dict[str, Any]]


class GivenRLOO(RLOOTrainer):
    """RLOO on rows that are there already."""

    rows: Rows

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [row["prompt_ids"] for row in self.rows], None, {}

    def _generate_single_turn(self, *_: Any) -> list[list[int]]:
        return [row["completion_ids"] for row in self.rows]


class Rounds(TrainerCallback):
    """Times steps; between two it waits until it is asked for the next. The first warms up and is not told."""

    def __init__(self, about: dict[str, Any]) -> None:
        self._about, self._asked = about, rounds()
        self._began = 0.0
        self._warm = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        took = time.perf_counter() - self._began
        if self._warm:
            say({"seconds_per_update": took, "peak_rss_mb": peak_rss_mb()})
        else:
            say(self._about)
            self._warm = True
        control.should_training_stop = next(self._asked, None) is None


def settings(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    n_rows, batch = len(asked["rows"]), asked["rows_at_once"]
    if n_rows % batch:
        raise ValueError(f"{n_rows} rows do not divide into batches of {batch}")
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": n_rows // batch,
        "generation_batch_size": n_rows,
        "num_generations": 2,
        "max_steps": 1_000_000,
        "learning_rate": 1e-6,
        "beta": 0.0,
        "temperature": 1.0,
        "bf16": True,
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def trainer_of(asked: dict[str, Any], folder: Path, about: dict[str, Any]) -> Any:
    rows: Rows = asked["rows"]
    common = {
        "model": asked["model"],
        "reward_funcs": lambda completions, **_: [float(number % 2) for number in range(len(completions))],
        "train_dataset": Dataset.from_list([{"prompt": f"task {number}"} for number in range(max(2, len(rows)))]),
        "callbacks": [Rounds(about)],
    }
    if asked["system"] == "trl_rloo":
        trainer = GivenRLOO(args=RLOOConfig(**settings(asked, folder)), **common)
        trainer.rows = rows
        return trainer
    given = {name: [row[name] for row in rows] for name in ("prompt_ids", "completion_ids")}
    logprobs = [[-1.0] * len(ids) for ids in given["completion_ids"]]
    rollout = {**given, "logprobs": logprobs, "env_mask": [row["trained"] for row in rows]}
    return GRPOTrainer(args=GRPOConfig(**settings(asked, folder)), rollout_func=lambda *_: dict(rollout), **common)


def main() -> None:
    folder, asked = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(asked["threads"])
    disable_progress_bars()
    logging.disable_progress_bar()
    rows: Rows = asked["rows"]
    longest = [max(len(row[name]) for row in rows) for name in ("prompt_ids", "completion_ids")]
    about = {
        "version": __version__,
        "rows": len(rows),
        "rows_at_once": asked["rows_at_once"],
        "trained_tokens": sum(sum(row["trained"]) for row in rows),
        "computed_tokens": len(rows) * sum(longest),
    }
    trainer_of(asked, folder, about).train()


if __name__ == "__main__":
    main()
