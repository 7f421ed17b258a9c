"""`tracegrad doctor`: what a person reads, the same as JSON, and the exit status."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import event

from tracegrad.adapters.doctor import doctor
from tracegrad.adapters.doctor_report import gather
from tracegrad.tracestore.diagnosis_records import Extent
from tracegrad.tracestore.records import Continues
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    Clock,
    account,
    add_group,
    finish_run,
    first_version,
    live_version,
    make_call,
    make_choice,
    make_commit,
    make_reward,
    make_rule,
    ready_group,
    take,
)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A group that was trained, one with equal rewards that waits, one without rewards; loose and doubtful calls."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    where = f"sqlite:///{tmp_path}/trace.db"
    store = open_store(where, clock=Clock())
    live_version(store)
    ready_group(store, "trained")
    store.register_job(JOB, [MODEL], {"algorithm": {"credit": {"advantage": "grpo"}}})
    lease = take(store)
    commit = make_commit(account(store, lease, excluded={"call-trained-1": "greedy"}))
    metrics = {"reward": 0.5, "ratio_mean": 1.0, "clip_fraction": 0.0, "logprob_abs_diff": 0.25}
    store.commit_step(lease, replace(commit, metrics=metrics))
    store.register_job(JOB, [MODEL], {"algorithm": {"credit": {"advantage": "grpo"}}})
    ready_group(store, "flat")
    for run_id in add_group(store, "bare"):
        finish_run(store, run_id, reward=None)
    origin = Continues(call_id="call-flat-0", choice=0, drift="template")
    store.append_calls(
        [
            make_call("loose", None, role=None),
            make_call("doubtful", "flat-0", quarantine="usage mismatch"),
            make_call("on", "flat-0", continues=origin, choices=(replace(make_choice(0, (7,)), flags=("greedy",)),)),
            make_call("too", "flat-0", continues=replace(origin, drift=None), status="aborted"),
        ]
    )
    store.close()
    return where


GOLDEN = Path(__file__).with_name("doctor.golden.txt").read_text()


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(doctor, list(arguments), catch_exceptions=False)


def test_the_whole_store_is_told(url: str) -> None:
    found = invoke("--store", url)
    assert found.stdout.splitlines() == GOLDEN.splitlines()
    assert (found.exit_code, found.stderr) == (1, "")


def test_the_same_is_told_as_json(url: str) -> None:
    found = invoke("--store", url, "--json", "--deep")
    told = json.loads(found.stdout)
    assert (found.exit_code, told["ok"], told["verdict"][0]["code"]) == (1, False, "logprobs apart")
    printed = [line.split(": ", 1)[1] for line in GOLDEN.splitlines() if line.startswith(("problem:", "note:"))]
    assert [one["text"] for one in told["verdict"]] == printed
    assert told["calls"]["no_run_example"] == "loose"
    (job,) = told["jobs"]
    assert job["tokens"]["conserved"] and job["tokens"]["excluded"]["greedy"] == 3
    assert (job["trained_lags"], job["waiting"]["by_lag"]) == ({"0": 3}, {"0": 1})
    assert job["steps"][0]["metrics"]["ratio_mean"] == 1.0
    assert told["forks"] == [{"what": "template", "count": 1, "example": "call-flat-0"}]
    assert told["payloads"] == {"calls": 8, "choices": 8, "flaws": []}


@pytest.mark.parametrize("deep", [False, True])
def test_payloads_are_read_with_deep_only(url: str, deep: bool) -> None:
    """Counts must not touch the pages that hold tokens and prompts: they are nearly the whole store."""
    store, asked = open_store(url), list[str]()
    event.listen(store._db.engine, "before_cursor_execute", lambda _c, _k, statement, *_: asked.append(statement))
    gather(store, Extent(), store.list_jobs(), deep=deep)
    gather(store, Extent(run_id="flat-0"), store.list_jobs(), deep=deep)
    store.close()
    assert len(asked) > 20
    assert any("_payloads" in statement for statement in asked) == deep


def test_a_run_is_told_with_why_it_is_trained_or_not(url: str) -> None:
    trained = invoke("trained-0", "--store", url).stdout
    assert "trained     by job job in step 1 (epoch 0), which made version 2" in trained
    assert "model main: 3 sampled tokens = 3 trained + 0 excluded" in trained
    waits = invoke("flat-1", "--store", url).stdout
    assert "note: not leased (tokens ready and waiting): job 'job' does not train 3 of 3 tokens" in waits
    bare = json.loads(invoke("bare-0", "--store", url, "--json").stdout)
    assert bare["jobs"][0]["tokens"]["excluded"] == {"no reward": 3}
    assert [one["code"] for one in bare["verdict"] if one["level"] == "problem"] == ["logprobs apart", "no reward"]


def test_a_part_of_the_store_is_told(url: str) -> None:
    assert invoke("--store", url, "--since", "2h").stdout.startswith("calls       0")
    assert invoke("--store", url, "--since", "1970-01-01T00:10").stdout.startswith("calls       10")
    assert invoke("--store", url, "--job", JOB).stdout.startswith("calls       10")


def test_a_job_is_told_with_the_calls_that_another_model_recorded_for_it(tmp_path: Path) -> None:
    """Trained offline under another role map: the part of the store that `--job` looks at is what the job leases."""
    where = f"sqlite:///{tmp_path}/split.db"
    store = open_store(where)
    ready_group(store)
    store.append_calls([make_call("elsewhere", None, model="neither")])
    store.register_job("split", ["plan_m"], {})
    rule = make_rule(model="plan_m", recorded_models=(MODEL,))
    assert store.lease("split", rule, groups=1, lease_s=60, step=1, epoch=0, seed=7) is not None
    store.close()
    told = json.loads(invoke("--store", where, "--job", "split", "--json").stdout)
    assert (told["calls"]["calls"], told["extent"]["models"]) == (2, [MODEL, "plan_m"])
    tokens = told["jobs"][0]["tokens"]
    assert (tokens["stored"], tokens["excluded"], tokens["conserved"]) == (6, {"leased": 6}, True)
    assert told["verdict"] == []


def test_each_job_is_told_of_the_groups_that_are_flat_for_it(tmp_path: Path) -> None:
    """By its own rewards and weights: another job's, or one without weight, hide none; `gae` compares nobody."""
    where = f"sqlite:///{tmp_path}/jobs.db"
    store = open_store(where)
    first, second = ready_group(store)  # f1 is 1 in both
    store.add_rewards([make_reward("a", first, 0.0, name="em"), make_reward("b", second, 1.0, name="em")])
    assert json.loads(invoke("--store", where, "--json").stdout)["flat_groups"] == {
        "compared": 1,
        "flat": 0,
        "example": None,
    }
    for job_id, credit in (
        ("on f1", {"credit": {"advantage": "grpo", "reward_weights": {"f1": 1.0, "em": 0.0}}}),
        ("on both", {"credit": {"advantage": "rloo", "reward_weights": {"f1": 1.0, "em": 1.0}}}),
        ("on all", {"advantage": "group"}),  # as earlier versions registered it
        ("gae", {"credit": {"advantage": "gae", "reward_weights": {"f1": 1.0}}}),
    ):
        store.register_job(job_id, [MODEL], {"algorithm": credit})
    store.lease("on f1", make_rule(reward_names=("em", "f1")), groups=1, lease_s=60, step=1, epoch=0, seed=7)
    store.close()
    told = json.loads(invoke("--store", where, "--json").stdout)
    flat = {one["job"]["job_id"]: one["flat_groups"] and one["flat_groups"]["flat"] for one in told["jobs"]}
    assert (flat, told["flat_groups"]) == ({"on f1": 1, "on both": 0, "on all": 0, "gae": None}, None)
    (found,) = [one["text"] for one in told["verdict"] if one["code"] == "zero variance"]
    assert "in 1 of 1 groups all members have the same reward for job 'on f1'" in found


def test_answers_that_a_step_left_out_as_unfinished_are_told(tmp_path: Path) -> None:
    """Their calls are complete, so nothing else tells of them."""
    where = f"sqlite:///{tmp_path}/given_up.db"
    store = open_store(where)
    for run_id in add_group(store):
        answer = replace(make_choice(0, (4, 5)), finish_reason="abort")
        store.append_calls([make_call(f"more-{run_id}", run_id, choices=(answer,), version=first_version(store))])
        finish_run(store, run_id)
    lease = take(store)
    unfinished = {f"more-g-{member}": "aborted" for member in range(2)}
    store.commit_step(lease, make_commit(account(store, lease, excluded=unfinished)))
    store.close()
    told = json.loads(invoke("--store", where, "--json").stdout)
    assert told["jobs"][0]["tokens"]["excluded"] == {"aborted": 4}
    assert [(one["level"], one["code"]) for one in told["verdict"]] == [("problem", "aborted")]
    assert told["unfinished"] == {"what": "aborted", "count": 2, "example": "more-g-1"}


def test_a_store_where_all_is_well_is_left_with_0(tmp_path: Path) -> None:
    where = f"sqlite:///{tmp_path}/well.db"
    store: Store = open_store(where)
    ready_group(store)
    store.close()
    found = invoke("--store", where)
    assert (found.exit_code, found.stdout.splitlines()[-1]) == (0, "well: nothing here wants action")


def test_what_cannot_be_understood_is_left_with_2(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, says in (
        (("nobody", "--store", url), "no run 'nobody'"),
        (("--project", "defualt", "--store", url), "no project 'defualt' in this store; did you mean default?"),
        (("--job", "nobody", "--store", url), "no training job 'nobody' (known: job)"),
        (("--since", "yesterday", "--store", url), "no age (30m, 2h, 7d)"),
        (("r", "--since", "2h", "--store", url), "not both"),
    ):
        found = invoke(*arguments)
        assert (found.exit_code, says in found.stderr) == (2, True), found.stderr
    monkeypatch.chdir(tmp_path)
    assert invoke().exit_code == 2
    missing = invoke("--store", f"sqlite:///{tmp_path}/none.db")
    assert (missing.exit_code, (tmp_path / "none.db").exists()) == (1, False)
