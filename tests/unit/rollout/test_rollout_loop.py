"""`tracegrad rollout` through the real proxy: groups, rewards, failures, resuming, stopping, back-pressure."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import true
from versions import add_version
from waits import wait_for

from tracegrad.adapters.app_session import open_session, run_loop
from tracegrad.adapters.cli import main
from tracegrad.adapters.rollout import INTERRUPTED, Rollout, RolloutPlan
from tracegrad.adapters.rollout_errors import RolloutStopped
from tracegrad.adapters.schedule import planned_groups
from tracegrad.adapters.tasks import load_tasks
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.records import Consumption, LeaseRule, ModelCalls, Run
from tracegrad.tracestore.step_records import NewVersion, StepCommit
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.tasks import blank_tasks

RULE = LeaseRule(trained=(ModelCalls(model="main"),), max_staleness=1, min_group=2)


def command(stack: Any, app: str, tasks: Path, *more: str) -> list[str]:
    named = ["--app", f"{app}:graph", "--reward", f"{app}:reward", "--tasks", str(tasks)]
    return ["rollout", *named, "--config", str(stack.config_path), "--json", "--quiet", *more]


def invoke(arguments: list[str]) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def all_runs(store: Store, name: str, tasks: Path, *, groups: int) -> list[Run]:
    found: list[Run] = []
    for group in planned_groups(name, load_tasks(tasks), seed=0, groups=groups):
        with contextlib.suppress(NotFound):  # not begun
            found += store.group_runs(group.group_id)
    return found


def test_a_graph_is_sampled_in_groups_that_are_ready_to_train(stack: Any, graph_app: str, tasks_file: Path) -> None:
    done = invoke(command(stack, graph_app, tasks_file, "--name", "first", "--group", "3", "--groups", "4"))
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["groups_done"], summary["runs_closed"], summary["runs_failed"]) == (4, 12, 0)
    assert summary["scores"] == {"drafter:length": 0.5, "right": 1.0}
    assert stack.store.backlog("main", RULE).ready_groups == 4
    found = all_runs(stack.store, "first", tasks_file, groups=4)
    assert len(found) == 12
    for trace in stack.store.traces([run.run_id for run in found]):
        assert (trace.run.status, trace.run.purpose, trace.run.ended_by) == ("closed", "train", "explicit")
        question = stack.store.get_task(trace.run.task_id or "").input["question"]
        assert [call.attribution.role for call in trace.calls] == ["drafter", "answerer"]
        assert [call.request["messages"][0]["content"] for call in trace.calls] == [
            f"draft {question}",
            f"answer {question}",
        ]
        rewards = sorted((reward.name, reward.role, reward.value) for reward in trace.rewards)
        assert rewards == [("length", "drafter", 0.5), ("right", None, 1.0)]


def test_what_is_pruned_under_a_rollout_it_puts_again(
    stack: Any, light_app: str, tasks_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tasks are put at the start; their earlier runs, and with these their content, may go before their turn."""
    put = Store.put_tasks

    def pruned_once_all_are_put(store: Store, tasks: Any) -> None:
        put(store, tasks)
        if len(tasks) > 1:
            with store._db.write() as connection:
                assert blank_tasks(connection, true()) == len(tasks)

    monkeypatch.setattr(Store, "put_tasks", pruned_once_all_are_put)
    done = invoke(command(stack, light_app, tasks_file, "--name", "pruned", "--group", "2", "--groups", "2"))
    assert done.exit_code == 0, done.output
    found = all_runs(stack.store, "pruned", tasks_file, groups=2)
    assert len(found) == 4 and all(stack.store.get_task(run.task_id or "").input for run in found)


def test_the_same_name_does_only_what_is_missing(stack: Any, light_app: str, tasks_file: Path) -> None:
    more = ("--name", "again", "--group", "3", "--seed", "5")
    first = json.loads(invoke(command(stack, light_app, tasks_file, *more, "--groups", "4")).stdout)
    assert (first["groups_done"], len(stack.engine.requests)) == (4, 12)
    second = json.loads(invoke(command(stack, light_app, tasks_file, *more, "--groups", "8")).stdout)
    assert (second["groups_before"], second["groups_done"], second["runs_before"]) == (4, 4, 12)
    assert [(r["round"], r["groups"], r["scores"]) for r in second["rounds"]] == [
        (1, 2, {"reward": 1.0}),
        (2, 2, {"reward": 1.0}),
    ]
    assert len(stack.engine.requests) == 24
    other_size = invoke(command(stack, light_app, tasks_file, *more[:2], "--group", "4"))
    assert other_size.exit_code == 1
    assert "409" in other_size.stderr


def test_failures_are_failed_runs_and_unscored_runs_have_no_reward(stack: Any, graph_app: str, tmp_path: Path) -> None:
    tasks = tmp_path / "odd.jsonl"
    questions = ["fine", "explode", "unscorable"]
    tasks.write_text("".join(json.dumps({"id": q, "input": {"question": q}}) + "\n" for q in questions))
    done = invoke(command(stack, graph_app, tasks, "--name", "odd", "--group", "2"))
    summary = json.loads(done.stdout)
    assert (summary["runs_closed"], summary["runs_failed"], summary["reward_errors"]) == (4, 2, 2)
    assert summary["errors"] == {"ValueError: the oven is too hot": 2, "KeyError: 'gold'": 2}
    assert summary["scores"]["right"] == 1.0, "a missing reward was counted as a value"
    by_task: dict[str, list[Any]] = {}
    for run in all_runs(stack.store, "odd", tasks, groups=3):
        by_task.setdefault(run.task_id or "", []).append(stack.store.trace(run.run_id))
    assert {(t.run.status, t.run.error, len(t.rewards)) for t in by_task["explode"]} == {
        ("failed", "ValueError: the oven is too hot", 0)
    }
    assert {(t.run.status, len(t.rewards)) for t in by_task["unscorable"]} == {("closed", 0)}
    assert "the reward function raised KeyError: 'gold'" in by_task["unscorable"][0].run.error
    assert stack.store.backlog("main", RULE).ready_groups == 1


def test_many_failures_in_a_row_stop_the_rollout(stack: Any, light_app: str, tasks_file: Path) -> None:
    stack.engine.overloaded = True
    more = ("--name", "down", "--group", "2", "--concurrency", "2", "--max-failures", "3")
    done = invoke(command(stack, light_app, tasks_file, *more))
    assert done.exit_code == 1
    assert "3 runs in a row failed" in done.stderr
    assert "HTTPError" in done.stderr
    statuses = Counter(run.status for run in all_runs(stack.store, "down", tasks_file, groups=6))
    assert set(statuses) == {"failed"}
    assert 3 <= statuses["failed"] <= 5


def start(stack: Any, app: str, tasks: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "tracegrad.adapters.cli", *command(stack, app, tasks, *more)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_rollout_is_finished_by_the_same_name(stack: Any, light_app: str, tasks_file: Path) -> None:
    stack.engine.delay_s = 0.1
    more = ("--name", "killed", "--group", "4", "--concurrency", "3")
    first = start(stack, light_app, tasks_file, *more)
    wait_for(lambda: stack.engine.finished >= 7, "seven calls are answered")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    wait_for(lambda: stack.engine.in_flight == 0, "no call runs")
    stack.engine.delay_s = 0.0
    left = Counter(run.status for run in all_runs(stack.store, "killed", tasks_file, groups=1))
    assert sum(left.values()) == 4
    before = len(stack.engine.requests)

    done = invoke(command(stack, light_app, tasks_file, *more))
    assert done.exit_code == 0, done.output
    found = all_runs(stack.store, "killed", tasks_file, groups=6)
    assert Counter((run.group_id, run.member) for run in found) == Counter(
        {(run.group_id, member): 1 for run in found for member in range(4)}
    )
    failed = [run for run in found if run.status == "failed"]
    assert len(found) == 24
    assert 1 <= len(failed) <= 3, "only the runs that were in flight may be lost"
    assert {run.error for run in failed} == {INTERRUPTED}
    rewarded = [bool(trace.rewards) for trace in stack.store.traces([r.run_id for r in found if r.status == "closed"])]
    assert all(rewarded)
    assert len(stack.engine.requests) - before == json.loads(done.stdout)["runs_closed"]
    assert json.loads(done.stdout)["runs_before"] == 24 - json.loads(done.stdout)["runs_closed"]


def test_ctrl_c_ends_what_is_in_flight_as_failed(stack: Any, light_app: str, tasks_file: Path) -> None:
    stack.engine.gate = threading.Event()
    running = start(stack, light_app, tasks_file, "--name", "stopped", "--group", "2", "--concurrency", "3")
    wait_for(lambda: stack.engine.in_flight == 3, "three calls run")
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=10)
    stack.engine.gate.set()
    assert running.returncode == 130, err
    assert json.loads(out)["interrupted"] is True
    assert "go on with --name stopped" in err
    found = all_runs(stack.store, "stopped", tasks_file, groups=6)
    assert [(run.status, run.error) for run in found] == [("failed", INTERRUPTED)] * 3


def train(store: Store, groups: int, step: int) -> int:
    """Be the trainer: lease, account for every choice, commit a step. Returns the new version."""
    store.register_job("main", ["main"], {})
    lease = store.lease("main", RULE, groups=groups, lease_s=60.0, step=step, epoch=0, seed=0)
    assert lease is not None
    consumption = [
        Consumption(
            run_id=trace.run.run_id,
            call_id=call.call_id,
            choice_index=choice.index,
            trained_tokens=len(choice.token_ids),
            excluded_tokens=0,
            reason=None,
        )
        for trace in store.traces(lease.plan.run_ids)
        for call in trace.calls
        for choice in call.choices
    ]
    commit = StepCommit(
        checkpoint_path=f"/step-{step}",
        checkpoint_hash=f"hash {step}",
        versions=(NewVersion(model="main", path=f"/step-{step}/main", parent_id=None),),
        consumption=consumption,
        metrics={},
    )
    return store.commit_step(lease, commit)["main"].version_id


def test_it_waits_for_the_trainer_and_for_publishing(stack: Any, light_app: str, tasks_file: Path) -> None:
    session = open_session(
        stack.root, app=f"{light_app}:graph", reward=f"{light_app}:reward", purpose="train", source="rollout"
    )
    plan = RolloutPlan(name="paced", groups=5, group_size=2, concurrency=8, ahead=2)
    rollout = Rollout(plan, load_tasks(tasks_file), session.executor, session.control)
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(run_loop(rollout.run, concurrency=8)))
    thread.start()

    wait_for(lambda: stack.store.backlog("main", RULE).ready_groups == 2, "two groups are ready")
    time.sleep(0.4)
    assert len(stack.engine.requests) == 4, "it sampled more groups than may wait for the trainer"
    train(stack.store, 2, step=1)
    wait_for(lambda: stack.store.backlog("main", RULE).ready_groups == 2, "two groups are ready")
    canary = add_version(stack.store, "/c", model="main", kind="canary")
    publish = stack.store.request_publish(canary.version_id)
    train(stack.store, 2, step=2)
    time.sleep(0.4)
    assert len(stack.engine.requests) == 8, "it sampled while weights were being published"
    stack.store.advance_publish(publish.publish_id, "failed", error="enough")
    thread.join(10)
    assert len(stack.engine.requests) == 10
    (summary,) = ended
    assert summary.groups_done == 5
    assert summary.seconds_waiting > 0.7


def test_an_ahead_that_would_starve_the_trainer_is_refused(stack: Any, light_app: str, tasks_file: Path) -> None:
    done = invoke(command(stack, light_app, tasks_file, "--ahead", "1"))
    assert done.exit_code == 2
    assert "less than trainer.batch.groups (2)" in done.stderr


def test_a_proxy_that_stays_away_stops_the_rollout(stack: Any, light_app: str, tasks_file: Path) -> None:
    session = open_session(stack.root, app=f"{light_app}:graph", reward=None, purpose="train", source="rollout")
    session.control.client._port = 9
    session.control.hurry(0.0)
    rollout = Rollout(RolloutPlan(name="x", groups=1), load_tasks(tasks_file), session.executor, session.control)
    with pytest.raises(RolloutStopped, match="no proxy answers"):
        asyncio.run(rollout.run())
