"""`tracegrad reward`: new rewards for what is stored, without app or engine."""

import gc
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tracegrad.adapters import rescore
from tracegrad.adapters.cli import main
from tracegrad.tracestore.records import Run, RunTrace, Task
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import add_group, finish_run, make_call, make_reward, ready_group, train

FUNCTIONS = """
from tracegrad.adapters.scoring import RewardSpec

def length(trace, task):
    return {"length": len(trace.calls[-1].choices[0].token_ids)}

async def question(trace, task):
    return [RewardSpec(name="question", value=len(task.input["question"]), role="answerer")] if task else None

def nothing(trace, task):
    return None

def breaks(trace, task):
    if trace.run.run_id.endswith("-0"):
        raise ValueError("no gold answer")
    return 1.0

def turns(trace, task):
    from tracegrad.trainer.allocators import deltas, role_turns

    calls = [turn for turns in role_turns(trace).values() for turn in turns]
    gains = deltas([0.25 * (1 + place) for place in range(len(calls))])
    return [{"name": "gain", "value": g, "call_id": c} for turn, g in zip(calls, gains) for c in turn]

def elsewhere(trace, task):
    return [RewardSpec(name="gain", value=1.0, call_id="call of another run")]

def wrong(trace, task):
    return "good"

number = 3
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules_of_test.py").write_text(FUNCTIONS)
    opened = open_store(f"sqlite:///{tmp_path}/s.db")
    yield opened
    opened.close()


def reward(store: Store, function: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["reward", "--with", f"rules_of_test:{function}", "--store", store.url, *arguments])


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_runs_and_tasks_whose_content_was_deleted_get_no_reward(store: Store) -> None:
    """A stub has nothing to judge; a run whose task lost its content fails with what to do."""
    runs = ready_group(store)
    train(store)
    store.delete_runs(runs)
    finish_run(store, store.open_run(Run(run_id="r", task_id="task-g")).run_id)
    assert told(reward(store, "nothing", "--json", *runs))["runs"] == 0
    failed = reward(store, "question")
    assert failed.exit_code == 1
    assert "failed: r: the content of task 'task-g' was deleted with its runs: put it again" in failed.output


def test_a_turn_is_rewarded_on_its_calls(store: Store) -> None:
    """With the trainer's allocators; what is said again is not written again. A call of another run is an error."""
    (run,) = ready_group(store, size=1)
    calls = [call.call_id for call in store.trace(run).calls]
    assert told(reward(store, "turns", "--json"))["appended"] == len(calls)
    gained = {one.call_id: one.value for one in store.trace(run).rewards if one.name == "gain"}
    assert gained == dict.fromkeys(calls, 0.25)
    assert told(reward(store, "turns", "--json"))["unchanged"] == 1
    failed = reward(store, "elsewhere", "--json")
    assert failed.exit_code == 1
    assert "which the run does not have" in failed.output


def names(store: Store, run_id: str) -> dict[str, float]:
    return {one.name: one.value for one in store.trace(run_id).rewards}


def test_every_closed_run_is_scored_once(store: Store) -> None:
    """What says the same already is not written again; another value counts from then on."""
    runs = ready_group(store, size=3)
    store.open_run(Run(run_id="open"))
    first = told(reward(store, "length", "--json"))
    assert (first["runs"], first["rewarded"], first["appended"], first["unchanged"]) == (3, 3, 3, 0)
    again = told(reward(store, "length", "--json"))
    assert (again["rewarded"], again["appended"], again["unchanged"]) == (0, 0, 3)
    assert [names(store, run) for run in runs] == [{"f1": 1.0, "length": 3.0}] * 3
    assert {one.source for one in store.trace(runs[0]).rewards} == {"t", "rules_of_test:length"}
    assert names(store, "open") == {}
    store.add_rewards([make_reward("other", runs[0], 9.0, name="length", source="rules_of_test:length")])
    assert told(reward(store, "length", "--json"))["appended"] == 1
    assert names(store, runs[0])["length"] == 3.0


def test_a_role_a_task_and_a_coroutine(store: Store) -> None:
    (run,) = ready_group(store, "gg", size=1)
    finish_run(store, "alone")
    found = told(reward(store, "question", "--json"))
    assert (found["rewarded"], found["without"]) == (1, 1)
    (one,) = [one for one in store.trace(run).rewards if one.name == "question"]
    assert (one.value, one.role) == (2.0, "answerer")


def test_only_some_runs(store: Store) -> None:
    first, second = ready_group(store, size=2)
    assert told(reward(store, "length", first, "--json"))["runs"] == 1
    assert "length" in names(store, first) and "length" not in names(store, second)
    for arguments, runs in (
        (["--purpose", "eval"], 0),
        (["--purpose", "train"], 2),
        (["--since", "1h"], 2),
    ):
        assert told(reward(store, "nothing", *arguments, "--json"))["runs"] == runs
    unknown = reward(store, "length", "no-such-run")
    assert unknown.exit_code == 1 and "no run 'no-such-run'" in unknown.output


def test_more_runs_than_a_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescore, "BATCH", 2)
    ready_group(store, size=5)
    assert told(reward(store, "length", "--json"))["rewarded"] == 5


def test_only_the_tasks_of_a_batch_are_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescore, "BATCH", 2)
    for number in range(6):
        store.put_tasks([Task(task_id=f"t{number}", input={"question": str(number)})])
        finish_run(store, store.open_run(Run(run_id=f"r{number}", task_id=f"t{number}")).run_id)
    held: list[int] = []

    def count(trace: RunTrace, task: Task | None) -> None:
        held.append(sum(isinstance(one, Task) for one in gc.get_objects()))

    gc.collect()
    before = sum(isinstance(one, Task) for one in gc.get_objects())
    runs = rescore.closed_runs(store, project=None, purpose=None, since=None)
    rescore.run_pass(rescore.Rescoring(store, count, source="s"), runs)
    assert len(held) == 6 and max(held) <= before + 2, held


def test_a_dry_run_writes_nothing(store: Store) -> None:
    (run,) = ready_group(store, size=1)
    result = reward(store, "length", "--dry-run")
    assert "1 runs: 1 would be rewarded anew (1 rewards)" in result.output
    assert "length" not in names(store, run)


def test_what_raises_gives_no_reward(store: Store) -> None:
    """The others get theirs; the exit status says that something failed."""
    first, second = ready_group(store, size=2)
    result = reward(store, "breaks")
    assert result.exit_code == 1
    assert f"failed: {first}: reward function failed: ValueError: no gold answer" in result.output
    assert "1 failed" in result.output
    assert "reward" not in names(store, first) and names(store, second)["reward"] == 1.0


def test_jobs_that_trained_already_are_named(store: Store) -> None:
    ready_group(store, size=2)
    train(store)
    result = reward(store, "length")
    assert "job job had trained 2 of them already: it uses the new rewards in its next epoch" in result.output
    assert told(reward(store, "nothing", "--json"))["late"] == {}


def test_what_is_no_function_or_no_reward_is_said(store: Store, tmp_path: Path) -> None:
    (run,) = add_group(store, size=1)
    store.append_calls([make_call("c", run)])
    store.end_run(run, status="closed", ended_by="explicit")
    for function, said in (
        ("wrong", "returned a str"),
        ("number", "is a int, not a function"),
        ("numbr", "did you mean number"),
    ):
        result = reward(store, function)
        assert result.exit_code == 1 and said in result.output, result.output
    nowhere = CliRunner().invoke(
        main, ["reward", "--with", "rules_of_test:length", "--store", f"sqlite:///{tmp_path}/none.db"]
    )
    assert nowhere.exit_code == 1 and "there is no store" in nowhere.output
    mistyped = reward(store, "length", "--project", "defualt")
    assert (mistyped.exit_code, "did you mean default?" in mistyped.output) == (1, True)
    with closing(open_store(f"sqlite:///{tmp_path}/none.db")) as fresh:
        assert "no closed run" in reward(fresh, "length", "--project", "demo").output, "nothing there yet to be like"


def test_a_folder_without_a_configuration_is_told_what_to_name(store: Store) -> None:
    asked = CliRunner().invoke(main, ["reward", "--with", "rules_of_test:length"])
    assert asked.exit_code == 2
    assert "which store? give --config FILE or --store URL" in asked.output
