"""The publish gate's rule on worked figures, and its section of the configuration."""

from typing import Any

import pytest

from tracegrad.tracestore.config import GateRule, dump_config, parse_config
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.gating import StoredEvaluation, judge, publish_of_run, run_prefix, unjudged, was_rejected

GATE = {"app": "app.py:graph", "tasks": "held.jsonl", "reward": "judge:f1", "rule": {"minimum": 0.5}}


def found(values: dict[str, float], *, n_failed: int = 0, error: str | None = None) -> StoredEvaluation:
    mean = sum(values.values()) / len(values) if values else None
    return StoredEvaluation(
        evaluation_id=len(values),
        model="main",
        version_id=1,
        publish_id=None,
        name="e",
        tasks_hash="t",
        score="f1",
        n_runs=len(values) + n_failed,
        n_failed=n_failed,
        values=values,
        mean=mean,
        low=mean,
        high=mean,
        error=error,
        started_at=0.0,
        created_at=1.0,
        versions={"main": 1},
    )


def tasks(value: float, n: int = 20) -> dict[str, float]:
    return {f"t{i}": value for i in range(n)}


def test_a_minimum_is_a_floor_of_the_mean() -> None:
    rule = GateRule(minimum=0.5)
    passed = judge(rule, found(tasks(0.5)), None)
    assert (passed.passed, passed.judged, passed.mean, passed.baseline_id) == (True, True, 0.5, None)
    below = judge(rule, found(tasks(0.49)), found(tasks(0.1)))
    assert (below.passed, below.judged) == (False, True)
    assert below.why == "mean f1 0.49 is below the minimum 0.5"


def test_a_drop_is_measured_by_task() -> None:
    """Every task falls by 0.1: the interval of the paired difference is a point, whatever the tasks' own spread is."""
    spread = {f"t{i}": i / 20 for i in range(20)}
    worse = {task: value - 0.1 for task, value in spread.items()}
    seen = judge(GateRule(max_drop=0.09, confidence=0.9), found(worse), found(spread))
    assert not seen.passed
    assert (seen.difference, seen.at_worst) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert "allowed is a drop of 0.09" in seen.why
    assert judge(GateRule(max_drop=0.11, confidence=0.9), found(worse), found(spread)).passed


def test_at_a_confidence_few_tasks_are_not_enough_and_the_means_alone_may_be() -> None:
    """Half of the tasks gain 0.5, half lose 0.5: the mean difference is 0, its standard error 0.5 / sqrt(20) = 0.11."""
    before = tasks(0.5)
    after = {f"t{i}": 1.0 if i % 2 else 0.0 for i in range(20)}
    strict = judge(GateRule(max_drop=0.05, confidence=0.9), found(after), found(before))
    assert not strict.passed
    assert strict.at_worst == pytest.approx(-1.28 * 0.112, abs=0.06)
    assert judge(GateRule(max_drop=0.05, confidence=0.5), found(after), found(before)).passed
    assert judge(GateRule(max_drop=0.3, confidence=0.9), found(after), found(before)).passed


def test_only_tasks_that_both_scored_are_compared() -> None:
    ours, theirs = {"a": 1.0, "b": 0.0}, {"b": 0.0, "c": 1.0}
    seen = judge(GateRule(max_drop=0.0, confidence=0.5), found(ours), found(theirs))
    assert (seen.passed, seen.n_paired, seen.difference) == (True, 1, 0.0)
    apart = judge(GateRule(max_drop=1.0), found({"a": 1.0}), found({"b": 1.0}))
    assert (apart.passed, apart.why) == (False, "it shares no scored task with evaluation 1 of the live version")


def test_failed_runs_are_no_zeros_and_no_excuse() -> None:
    """19 scored runs and one failed: 5 %. The mean is over those that were scored."""
    rule = GateRule(minimum=1.0, max_failed=0.05)
    assert judge(rule, found(tasks(1.0, 19), n_failed=1), None).passed
    many = judge(rule, found(tasks(1.0, 18), n_failed=2), None)
    assert (many.passed, many.why) == (False, "2 of 20 runs failed or have no score (at most 5% may)")
    none = judge(rule, found({}, n_failed=3), None)
    assert (none.passed, none.judged, none.why) == (False, True, "none of its 3 runs has the score 'f1'")


def test_what_could_not_be_judged_does_not_pass_and_is_no_judgement() -> None:
    broken = judge(GateRule(minimum=0.0), found({}, error="no app"), None)
    assert (broken.passed, broken.judged) == (False, False)
    assert "no app" in broken.why
    assert not was_rejected(broken.as_json())
    assert not was_rejected(unjudged("late").as_json())
    assert was_rejected(judge(GateRule(minimum=2.0), found(tasks(1.0)), None).as_json())
    assert not was_rejected(judge(GateRule(minimum=0.0), found(tasks(1.0)), None).as_json())
    assert not was_rejected(None)


def test_the_first_version_has_nothing_to_fall_below() -> None:
    assert judge(GateRule(max_drop=0.0), found(tasks(0.1)), None).passed


def test_a_gates_run_is_known_by_its_id() -> None:
    assert publish_of_run(f"{run_prefix(12)}_0a") == 12
    for other in (None, "gate", "gate_12", "run_gate12_0a", "gatex_1"):
        assert publish_of_run(other) is None


def with_gate(**changed: Any) -> Any:
    model: dict[str, Any] = {"checkpoint": "w", **changed.pop("model", {})}
    return parse_config({"models": {"main": model}, "trainer": {"publish": {"gate": {**GATE, **changed}}}})


def test_the_section_reads_back_and_its_paths_are_the_files(tmp_path: Any) -> None:
    raw = {"models": {"main": {"checkpoint": "w"}}, "trainer": {"publish": {"gate": GATE}}}
    config = parse_config(raw, base=tmp_path)
    gate = config.trainer.publish.gate
    assert gate is not None
    assert (gate.tasks, gate.app, gate.reward) == (f"{tmp_path}/held.jsonl", f"{tmp_path}/app.py:graph", "judge:f1")
    assert dump_config(config).count("held.jsonl") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rule": {}}, "lets everything pass"),
        ({"rule": {"minimum": 0.1, "confidence": 1.0}}, "< 1"),
        ({"rule": {"max_drop": -0.1}}, ">= 0"),
        ({"share": 0.5}, "one engine serves one version at a time"),
        ({"tresh": 1}, "unknown field `tresh`"),
        ({"rejected": {"then": "stop"}}, "Invalid enum"),
    ],
)
def test_mistakes_in_it_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_gate(**change)


def test_replicas_can_share() -> None:
    assert with_gate(share=0.5, model={"replicas": ["http://127.0.0.1:9"]}).trainer.publish.gate.share == 0.5


def test_an_adapter_without_replicas_shares_its_engine_which_has_room_for_both() -> None:
    """Candidates of adapters are judged together, each beside what is live; else one is rehearsed at a time."""
    other = {"checkpoint": "v", "trained": False, "engine": {"url": "http://127.0.0.1:8"}}
    models = {"base": {"checkpoint": "w", "trained": False}, "other": other}
    models |= {name: {"adapter": {"of": "base"}} for name in "pq"}
    room = {}
    for share in (0.0, 0.5, 1.0):
        config = parse_config({"models": models, "trainer": {"publish": {"gate": {**GATE, "share": share}}}})
        room[share] = [config.adapter_slots(name) for name in ("base", "other", "p")]
    assert room == {0.0: [3, 0, 0], 0.5: [4, 0, 0], 1.0: [3, 0, 0]}
    models["base"]["replicas"] = ["http://127.0.0.1:9"]
    config = parse_config({"models": models, "trainer": {"publish": {"gate": {**GATE, "share": 0.5}}}})
    assert (config.adapter_slots("base"), config.judged_beside("p")) == (3, False)


def test_it_is_for_all_models_of_a_job_and_an_adapter_has_its_bases_replicas() -> None:
    """A share needs replicas of each of them."""
    base = {"checkpoint": "w", "trained": False, "replicas": ["http://127.0.0.1:9"]}
    models = {"base": base, "p": {"adapter": {"of": "base"}}, "q": {"adapter": {"of": "base"}}}
    publish = {"publish": {"gate": {**GATE, "share": 0.5}}}
    assert parse_config({"models": models, "trainer": publish}).trained_models() == ("p", "q")
    models["alone"] = {"checkpoint": "v", "engine": {"url": "http://127.0.0.1:8"}}
    with pytest.raises(ConfigError, match="or add replicas to alone"):
        parse_config({"models": models, "trainer": publish})
