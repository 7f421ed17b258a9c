"""`tracegrad queue`: what a person reads, and the same as JSON."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tracegrad.adapters.queue_command import queue
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.queue_view import QueueViewContract
from tracegrad.tracestore.testing.rows import JOB, Clock, account, ready_group, take


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of everything, and a group that was refused."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    where = f"sqlite:///{tmp_path}/trace.db"
    clock = Clock()
    store = open_store(where, clock=clock)
    QueueViewContract().furnish(store)
    clock.advance(1)
    ready_group(store, "masked")
    lease = take(store, step=3, groups=2)
    store.release(lease)
    clock.advance(1)
    store.delete_runs(["ready-0", "ready-1"])
    lease = take(store, step=3, roles=("answerer",))
    store.refuse(lease, account(store, lease, excluded={f"call-masked-{n}": "constrained" for n in (0, 1)}))
    store.close()
    return where


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(queue, list(arguments), catch_exceptions=False)


def test_the_whole_queue_is_told(url: str) -> None:
    lines = invoke("--store", url).stdout.splitlines()
    assert lines[0] == "job job     model main, epoch 0"
    assert lines[1] == "tokens      39 sampled = 6 held, 9 waiting, 3 trained, 18 dead, 3 elsewhere"
    assert lines[2].startswith("groups      2 group awaits rewards") or "1 refused" in lines[2]
    assert lines[3].startswith("lease       lease 2 of 2 runs for step 2, until 1970-01-01 00:18:10, which was ")
    told = [line for line in lines if line.startswith("waiting")]
    assert told[0].startswith(
        "waiting     no reward: 6 tokens (2 runs, such as silent-1) that no counted reward reaches; "
    )
    assert any(
        "refused: 6 tokens (2 runs, such as masked-1) of batches in which the trainer found nothing" in line
        for line in lines
    )
    assert any("no run: 3 tokens" in line and "tracegrad runs --unplaced" in line for line in lines)
    (job,) = json.loads(invoke("--store", url, "--json").stdout)
    assert job["conserved"] and job["groups"]["refused"] == 1
    assert {one["reason"] for one in job["reasons"]} == job["words"].keys()


def test_dead_letters_are_told_run_by_run(url: str) -> None:
    shown = invoke("--store", url, "--dead", "--limit", "2").stdout
    assert "masked-1    1970-01-01 00:16:41, train, closed, group masked" in shown
    assert "refused for constrained: 3 tokens sampled under a grammar or a forced tool call" in shown
    assert shown.splitlines()[-1].strip() == "the next page: --dead --job job --before masked-0"
    rest = invoke("--store", url, "--dead", "--before", "masked-0").stdout
    assert "masked" not in rest and "quarantined: no logprobs: 3 tokens of calls with an answer without" in rest
    (page,) = json.loads(invoke("--store", url, "--dead", "--json").stdout)
    assert page["runs"][0]["refused"] == {"constrained": 3}


def test_a_run_is_told_with_what_it_waits_for(url: str) -> None:
    waits = invoke("--store", url, "--run", "silent-0").stdout
    assert "waits       for rewards: any" in waits
    assert "group       silent: 2 of 2 members ended and settled, 2 of them can be trained, 0 are rewarded too" in waits
    assert "waiting     call call-silent-0 answer 0 (answerer): 3 tokens, no reward (that no" in waits
    assert "held        by lease 2 of 2 runs for step 2" in invoke("--store", url, "--run", "held-0").stdout
    (told,) = json.loads(invoke("--store", url, "--run", "trained-0", "--json").stdout)
    assert [one["stage"] for one in told["choices"]] == ["trained"]
    assert told["trained"][0]["step"] == 1
    store = open_store(url)
    store.delete_runs(["trained-0"])
    store.close()
    deleted = invoke("--store", url, "--run", "trained-0").stdout
    assert "trained     call" in deleted and "waits" not in deleted, "its rewards are gone, and nobody wants them"


def test_what_cannot_be_told_is_said(url: str, tmp_path: Path) -> None:
    mistyped = invoke("--store", url, "--job", "jbo")
    assert (mistyped.exit_code, "no training job 'jbo'; did you mean job?" in mistyped.output) == (2, True)
    assert invoke("--store", url, "--run", "nobody").exit_code == 2
    assert invoke("--store", url, "--run", "held-0", "--dead").exit_code == 2
    assert invoke("--store", url, "--job", JOB, "--epoch", "1").exit_code == 0
    open_store(f"sqlite:///{tmp_path}/empty.db").close()
    assert "no training job yet" in invoke("--store", f"sqlite:///{tmp_path}/empty.db").stdout
