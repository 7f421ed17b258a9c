"""metrics.jsonl follows the ledger; the console says what people need; TensorBoard gets every number."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tracegrad.tracestore.records import Consumption
from tracegrad.trainer.joint_metrics import joint_metrics
from tracegrad.trainer.metrics import Console, MetricsLog, duration, scalars
from tracegrad.trainer.packing import PackingStats
from tracegrad.trainer.results import StepResult
from tracegrad.trainer.samples import Samples
from tracegrad.trainer.shares import Shares
from tracegrad.trainer.step_metrics import token_counts

NO_SAMPLES = Samples(choices=(), consumption=(), rewards={}, run_groups={}, graphs={})


def test_reconcile_drops_torn_and_future_lines_and_adds_the_missing_last(tmp_path: Path) -> None:
    lines = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}, {"step": 9, "reward": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "rew')
    log = MetricsLog(tmp_path)
    log.reconcile(3, {"reward": 0.3})
    log.record({"step": 4, "reward": 0.4})
    log.close()
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reward"]) for line in read] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_tensorboard_has_the_nested_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.record({"step": 3, "reward": 0.5, "roles": {"writer": {"reward": 0.25}}, "publish": None, "note": "x"})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward", "roles/writer/reward", "step"]
    assert [(e.step, e.value) for e in events.Scalars("roles/writer/reward")] == [(3, 0.25)]


def test_scalars_leave_out_what_is_no_number() -> None:
    assert dict(scalars({"a": 1, "b": None, "c": {"d": 2.5, "e": "text", "f": True}})) == {"a": 1.0, "c/d": 2.5}


def test_console_says_a_status_once_and_a_step_in_one_line() -> None:
    said: list[str] = []
    console = Console(said.append, steps=10, as_json=False)
    console.say("waits")
    console.say("waits")
    console.step({"step": 4, "reward": 0.5, "tokens_trained": 7, "seconds": {"total": 2.0}, "logprob_abs_diff": None})
    console.say("waits")
    assert [line.split("  ")[0] for line in said] == ["waits", "step 4/10", "waits"]
    assert "reward 0.5" in said[1]
    assert "|d| -" in said[1]
    assert "left" in said[1]


def test_console_json_lines_parse() -> None:
    said: list[str] = []
    console = Console(said.append, steps=1, as_json=True)
    console.say("hello")
    console.step({"step": 1})
    assert [json.loads(line) for line in said] == [{"event": "status", "text": "hello"}, {"event": "step", "step": 1}]


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3725)] == ["0s", "1m01s", "1h02m"]


def test_what_packing_saves_is_counted_over_the_minibatches() -> None:
    """The batch has 40 distinct contexts; two minibatches compute 30 and 20 of them, 10 twice: 40 / 50."""
    whole = PackingStats(n_choices=4, n_edges=9, n_nodes=40, n_unique=40, n_naive=70, n_rows=1)
    parts = [replace(whole, n_nodes=nodes, n_unique=nodes) for nodes in (30, 20)]
    counts = token_counts(whole, parts)
    assert counts == {"tokens_computed": 50, "tokens_unique": 40, "tokens_naive": 70, "efficiency": 0.8}
    others = token_counts(replace(whole, n_unique=10), [replace(whole, n_nodes=30)])
    results = {"p": of_model(30, **counts), "w": of_model(10, **others)}
    joint = joint_metrics(results, Shares(by_model={"p": NO_SAMPLES, "w": NO_SAMPLES}, consumption=()))
    assert joint["efficiency"] == (40 + 10) / (50 + 30)


def of_model(tokens: int, **numbers: Any) -> StepResult:
    metrics = {"tokens_trained": tokens, "roles": {f"role{tokens}": {"reward": 1.0}}, "runs": 8, **numbers}
    return StepResult(consumption=(), metrics=metrics)


def test_numbers_of_several_models_add_up() -> None:
    """Counts are summed, means weighted by tokens; of what is a greatest value the greatest; nobody has it: None."""
    given = Consumption(run_id="r", call_id="c", choice_index=0, trained_tokens=0, excluded_tokens=5, reason="greedy")
    shares = Shares(by_model={"p": NO_SAMPLES, "w": NO_SAMPLES}, consumption=(given,))
    p = of_model(30, kl=0.1, ratio_max=2.0, apart=None, tokens_masked={"low": 1}, seconds={"update": 2.0}, only=7)
    w = of_model(10, kl=0.5, ratio_max=3.0, apart=None, tokens_masked={"low": 2}, seconds={"update": 1.0})
    joint = joint_metrics({"p": p, "w": w}, shares)
    assert (joint["tokens_trained"], joint["runs"], joint["ratio_max"], joint["only"]) == (40, 8, 3.0, 7)
    assert joint["kl"] == pytest.approx((30 * 0.1 + 10 * 0.5) / 40)
    assert (joint["apart"], joint["tokens_masked"], joint["seconds"]) == (None, {"low": 3}, {"update": 2.0})
    assert set(joint["roles"]) == {"role30", "role10"}
    assert {model: own["kl"] for model, own in joint["models"].items()} == {"p": 0.1, "w": 0.5}
    assert joint["tokens_excluded"] == {"greedy": 5}
    lost = replace(NO_SAMPLES, consumption=(given,), roles={("r", "c"): "role30"})
    idle = joint_metrics({"p": p}, replace(shares, by_model={"p": NO_SAMPLES, "w": lost}))
    assert idle["models"]["w"] == {"choices": 0, "tokens_trained": 0, "tokens_excluded": {"greedy": 5}}
    assert idle["roles"] == {
        "role30": {"reward": 1.0, "choices": 0, "tokens_trained": 0, "tokens_excluded": {"greedy": 5}}
    }
    assert (idle["tokens_trained"], idle["kl"], idle["runs"]) == (30, 0.1, 8), "what trained nothing weighs nothing"
    alone = joint_metrics({"p": p}, Shares(by_model={"p": NO_SAMPLES}, consumption=()))
    assert alone == {**p.metrics, "tokens_excluded": {}}
