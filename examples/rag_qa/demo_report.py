"""What the demo found: the brevity control, `summary.json`, the curve and the table.

The control answers the obvious objection to a rise of token F1: shorter answers score higher by themselves. So the
untrained answers are cut to the trained mean length (rounded up) and scored by the same function; the gain must stand
against them too. Refuses evaluations that failed for more than a few tasks. Called by `demo.py`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.rag_qa.demo_processes import DemoError
from examples.rag_qa.reward import best_f1
from tracegrad.tracestore.bootstrap import Interval, bootstrap_difference
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import PolicyVersion, Publish
from tracegrad.tracestore.store import Store

MIN_PAIRS = 200


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One evaluation: task id -> answer, and every score by name -> task id -> value."""

    answers: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]

    def mean(self, name: str) -> float:
        values = self.scores[name].values()
        return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Before, after and the control on the tasks that both evaluations answered."""

    before: float
    after: Interval
    control: float
    control_diff: Interval
    diff: Interval
    mean_words: float
    n: int


def read_answers(path: Path) -> Answers:
    """Read a file that ``tracegrad eval --out`` wrote; failed runs are left out."""
    answers: dict[str, str] = {}
    scores: dict[str, dict[str, float]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["status"] != "closed" or not row["scores"]:
            continue
        answers[row["task_id"]] = json.loads(row["output"])["answer"]
        for name, value in row["scores"].items():
            scores.setdefault(name, {})[row["task_id"]] = value
    return Answers(answers=answers, scores=scores)


def cut(answer: str, words: int) -> str:
    """Return the first `words` words."""
    return " ".join(answer.split()[:words])


def compare(before: Answers, after: Answers, golds: Mapping[str, Sequence[str]]) -> HeldOut:
    """Pair the two evaluations task by task and add the control.

    Raises:
        DemoError: fewer than `MIN_PAIRS` tasks were answered both times.
    """
    both = sorted(before.answers.keys() & after.answers.keys())
    if len(both) < MIN_PAIRS:
        raise DemoError(
            f"only {len(both)} held-out questions were answered both times; at least {MIN_PAIRS} are needed"
        )
    mean_words = sum(len(after.answers[t].split()) for t in both) / len(both)
    words = max(1, math.ceil(mean_words))
    f1_before = [before.scores["f1"][t] for t in both]
    f1_after = [after.scores["f1"][t] for t in both]
    f1_control = [best_f1(cut(before.answers[t], words), golds[t]) for t in both]
    return HeldOut(
        before=sum(f1_before) / len(both),
        after=bootstrap_difference(f1_after, [0.0] * len(both)),
        control=sum(f1_control) / len(both),
        control_diff=bootstrap_difference(f1_after, f1_control),
        diff=bootstrap_difference(f1_after, f1_before),
        mean_words=mean_words,
        n=len(both),
    )


def read_golds(tasks: Path) -> dict[str, list[str]]:
    """Return task id -> gold answers of a task file."""
    lines = [json.loads(line) for line in tasks.read_text(encoding="utf-8").split("\n") if line]
    return {line["id"]: line["reference"]["answers"] for line in lines}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file of JSON lines; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line.startswith("{")]


def summarise(
    store: Store,
    config: Config,
    metrics: Sequence[Mapping[str, Any]],
    held_out: HeldOut,
    *,
    seconds: Mapping[str, float],
    peak_memory_bytes: int | None,
) -> dict[str, Any]:
    """Return what `summary.json` holds. `seconds` has setup, generate and total; the peak is that of all processes.

    Raises:
        DemoError: stored sampled tokens are not trained + excluded (law 5).
    """
    tokens = store.consumption(config.trainer.job)
    if not tokens.conserved:
        raise DemoError(f"sampled tokens are not conserved: {tokens}")
    publishes = [p for p in store.list_publishes(config.trainer.model) if p.state == "live"]
    publish_s = sum(p.entered["live"] - p.entered["requested"] for p in publishes)
    of_steps = sum(line["publish"]["total_s"] for line in metrics if line["publish"])
    runs = store.list_runs(project=config.project, limit=1_000_000)
    return {
        "heldout_before": held_out.before,
        "heldout_after": held_out.after.mean,
        "heldout_diff_ci95": [held_out.diff.low, held_out.diff.high],
        "n_heldout": held_out.n,
        "control_truncated": held_out.control,
        "control_diff_ci95": [held_out.control_diff.low, held_out.control_diff.high],
        "warmup": None,
        "steps": metrics[-1]["step"],
        "sampled_reward": [line["roles"]["answerer"]["reward"] for line in metrics],
        "seconds": {
            "setup": seconds["setup"],
            "generate": seconds["generate"],
            "train": sum(line["seconds"]["total"] for line in metrics) - of_steps,
            "publish": publish_s,
            "total": seconds["total"],
        },
        "peak_memory_bytes": peak_memory_bytes,
        "calls_recorded": sum(run.n_calls for run in runs),
        "calls_trained": sum(line["choices"] for line in metrics),
        "sampled_tokens_stored": tokens.stored,
        "sampled_tokens_trained": tokens.trained,
        "sampled_tokens_excluded": dict(tokens.excluded),
        "logprob_abs_diff": [line["logprob_abs_diff"] for line in metrics],
        "weight_versions": [_version(version, publishes) for version in store.list_versions(config.trainer.model)],
    }


def _version(version: PolicyVersion, publishes: Sequence[Publish]) -> dict[str, Any]:
    live = [p.entered["live"] for p in publishes if p.version_id == version.version_id]
    return {
        "version": version.version_id,
        "kind": version.kind,
        "step": version.step,
        "checkpoint_hash": version.checkpoint_hash,
        "live_at": live[-1] if live else None,
    }


def draw(path: Path, metrics: Sequence[Mapping[str, Any]], held_out: HeldOut) -> None:
    """Draw the sampled reward of each role by step, and the held-out scores as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    steps = [line["step"] for line in metrics]
    for role, label, colour in (("answerer", "F1", "tab:blue"), ("rewriter", "recall", "tab:green")):
        rewards = [line["roles"].get(role, {}).get("reward") for line in metrics]
        axes.plot(steps, rewards, color=colour, marker="o", markersize=3, label=f"sampled, {role} ({label})")
    lines = (
        ("held-out F1, after", held_out.after.mean, "tab:red", "-"),
        ("held-out F1, before, cut to the trained length", held_out.control, "tab:gray", "--"),
        ("held-out F1, before", held_out.before, "tab:gray", ":"),
    )
    for label, value, colour, style in lines:
        axes.axhline(value, color=colour, linestyle=style, label=f"{label}: {value:.3f}")
    axes.set_xlabel("training step")
    axes.set_ylabel("score")
    axes.set_ylim(0, 1)
    axes.set_title(f"SmolLM2-135M answering from Wikipedia ({held_out.n} held-out questions)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(summary: Mapping[str, Any], before: Answers, after: Answers) -> None:
    """Print what a person wants to know."""
    table = Table(title=f"{summary['n_heldout']} held-out questions, greedy, the last weights")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"f1": "token F1", "em": "exact match", "format": "one short line", "rewriter:recall": "answer retrieved"}
    for name, label in names.items():
        if name in before.scores and name in after.scores:
            table.add_row(label, f"{before.mean(name):.3f}", f"{after.mean(name):.3f}")
    console = Console()
    console.print(table)
    low, high = summary["heldout_diff_ci95"]
    console.print(f"F1 gain: 95% interval [{low:+.3f}, {high:+.3f}]")
    low, high = summary["control_diff_ci95"]
    cut_f1 = summary["control_truncated"]
    console.print(
        f"untrained answers cut to the trained length: F1 {cut_f1:.3f}; gain over them [{low:+.3f}, {high:+.3f}]"
    )
    seconds = summary["seconds"]
    console.print(
        f"{summary['steps']} steps; {summary['calls_trained']:,} of {summary['calls_recorded']:,} calls trained; "
        + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    )
    if summary["peak_memory_bytes"]:
        console.print(f"at most {summary['peak_memory_bytes'] / 1e9:.1f} GB of memory while training, all processes")
