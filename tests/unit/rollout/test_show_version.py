"""`tracegrad show version:N` and what `tracegrad show CALL` says of weights, for people and as JSON."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from tracegrad.adapters.look import runs, show
from tracegrad.adapters.show_version import _print_calls
from tracegrad.tracestore.provenance import TrainedCall
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.chains import asked
from tracegrad.tracestore.testing.provenance import ProvenanceContract
from tracegrad.tracestore.testing.rows import JOB, Clock, make_call


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Version 1, of which step 1 made version 2 (a call left out), of which step 2 made version 3."""
    where = f"sqlite:///{tmp_path}/trace.db"
    store = open_store(where, clock=Clock())
    assert ProvenanceContract().two_steps(store) == (1, 2, 3)
    store.append_calls([make_call("untrained", None)])
    store.close()
    return where


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(show, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("named", ["version:3", "3", "checkpoint:22", f"step:{JOB}/2"])
def test_a_version_says_what_it_was_made_from(url: str, named: str) -> None:
    shown = invoke(named, "--store", url).stdout
    assert "version 3 of main" in shown and "job job, step 2, epoch 0" in shown and "version 2" in shown
    assert "6 trained tokens of 2 answers in 2 runs" in shown
    assert "2 steps: 9 trained tokens of 4 answers in 4 runs, 3 left out" in shown
    told = json.loads(invoke(named, "--store", url, "--json").stdout)
    assert [call["call_id"] for call in told["calls"]] == ["call-g2-0", "call-g2-1"]
    assert told["all_steps"]["trained_tokens"] == 9


def test_its_calls_come_in_pages(url: str) -> None:
    first = invoke("version:2", "--store", url, "--calls", "--limit", "1").stdout
    assert "call-g1-0" in first and "the next page: --calls --after call-g1-0" in first
    second = invoke("version:2", "--store", url, "--calls", "--after", "call-g1-0").stdout
    assert "call-g1-0" not in second and "greedy" in second
    assert "nothing was trained for it" in invoke("version:1", "--store", url).stdout


@pytest.mark.parametrize("named", ["version:x", "step:job", "checkpoint:"])
def test_a_name_that_is_not_whole_says_how_it_is_written(url: str, named: str) -> None:
    shown = invoke(named, "--store", url)
    assert (shown.exit_code, f"{named!r} names no version: write version:12" in shown.output) == (1, True)


def test_ids_are_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    """They are there to be copied."""
    found = [
        TrainedCall(
            call_id="call_" + 32 * "1",
            run_id="run_" + 32 * "2",
            role="a-role-with-a-name",
            model="main",
            choices=1,
            version_id=12,
            trained_tokens=1234,
            excluded_tokens=12,
            reasons=("greedy",),
        )
    ]
    with Console(width=80, record=True, file=StringIO()) as console:
        _print_calls(console, 12, found, 1)
    shown = console.export_text()
    assert "call_" + 32 * "1" in shown and "run_" + 32 * "2" in shown and "…" not in shown


def test_a_call_says_which_weights_answered_it(url: str) -> None:
    shown = invoke("call-g1-1", "--store", url).stdout
    assert "answered by version 1 (checkpoint hash-0), before any step" in shown
    assert "taken by step 1 of job job (epoch 0), which made version 2: 0 tokens trained, 3 left out (greedy)" in shown
    told = json.loads(invoke("call-g1-0", "--store", url, "--json").stdout)
    assert (told["answered_by"]["version"]["version_id"], told["taken_by"][0]["version_id"]) == (1, 2)
    untrained = invoke("untrained", "--store", url).stdout
    assert "answered by no known version" in untrained and "trained by no step" in untrained


def test_a_call_says_whose_prompt_its_own_begins_with(url: str) -> None:
    """By the stored chains: nobody noted it when the call was made."""
    store = open_store(url)
    store.append_calls([asked("first", None, ["x", "y"], tail=0), asked("second", None, ["x", "y", "z"])])
    store.close()
    assert "begins with that of call first: 256 token ids" in invoke("second", "--store", url).stdout
    told = json.loads(invoke("second", "--store", url, "--json").stdout)["begins_with"]
    assert told == {"call_id": "first", "by": "ids", "shared": 256}
    assert "begins as no earlier one" in invoke("first", "--store", url).stdout


def test_of_a_deleted_call_it_is_said_what_it_made(url: str) -> None:
    store = open_store(url)
    store.delete_runs(["g2-0", "g2-1"])
    store.close()
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(runs, ["--store", url]).stdout
    assert listed.count("closed, content deleted") == 2
    found = invoke("call-g2-0", "--store", url)
    assert found.exit_code == 1 and "taken by step 2 of job job" in found.stderr and "was deleted" in found.stderr
    assert "call-g2-0" in invoke("version:3", "--store", url, "--calls").stdout


def test_what_is_not_there_is_said(url: str) -> None:
    for named, says in (
        ("version:99", "no policy version 99"),
        ("checkpoint:ff", "no checkpoint that begins with 'ff'"),
        (f"step:{JOB}/9", "no step 9 of job 'job'"),
        ("nobody", "no run, call or completion has the id 'nobody'"),
    ):
        found = invoke(named, "--store", url)
        assert (found.exit_code, says in found.stderr) == (1, True), found.stderr
