"""`tracegrad runs` and `tracegrad show`: what a person reads, and the same as JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tracegrad.adapters.cli import main
from tracegrad.tracestore.records import Attribution, Call, CallTiming, Choice, LateAttribution, Reward, Run, Span, Task
from tracegrad.tracestore.store import open_store


def call(number: int, **more: Any) -> Call:
    span = Span(span_id=f"s{number}", run_id="run_a", name="plan", superstep=2)
    fields: dict[str, Any] = {
        "call_id": f"call_{number}",
        "completion_id": f"chatcmpl-{number}",
        "attribution": Attribution(run_id="run_a", run_source="hook", role="planner", role_source="hook", span=span),
        "model": "main",
        "requested_model": "gpt-4o",
        "version_dispatched": None,
        "version_completed": None,
        "prompt_ids": (1, 2, 3),
        "choices": (
            Choice(
                index=0,
                token_ids=(4, 5),
                logprobs=(-0.1, -0.2),
                finish_reason="stop",
                message={"role": "assistant", "content": "Paris [bold]"},
                flags=("greedy",),
            ),
        ),
        "status": "complete",
        "timing": CallTiming(received_at=1.0, dispatched_at=1.0, first_token_at=None, completed_at=1.5),
        "request": {"messages": [{"role": "user", "content": "Where? " + "x" * 300}]},
        "requested": {"temperature": 0},
        "effective": {"temperature": 0.8},
    }
    return Call(**(fields | more))


@pytest.fixture
def url(tmp_path: Path) -> str:
    where = f"sqlite:///{tmp_path}/trace.db"
    store = open_store(where)
    store.put_tasks([Task(task_id="t", input={})])
    store.open_run(Run(run_id="run_a", purpose="train", task_id="t", opened_at=1.0))
    ruled = replace(call(2).attribution, role_source="rule")
    store.append_calls([call(1), call(2, quarantine="length mismatch", attribution=ruled)])
    store.add_rewards([Reward(reward_id="r", run_id="run_a", name="f1", value=0.25, source="test")])
    store.end_run("run_a", status="closed", ended_by="explicit")
    store.open_run(Run(run_id="run_b", opened_at=2.0))
    store.end_run("run_b", status="failed", ended_by="explicit", error="the oven is too hot")
    store.close()
    return where


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, list(arguments), catch_exceptions=False)


def test_runs_are_listed_with_calls_tokens_and_rewards(url: str) -> None:
    shown = invoke("runs", "--store", url).stdout
    failed, empty, run, inside = shown.splitlines()
    assert run.startswith("run_a  19") and run.endswith("  train  closed")
    assert inside == "    2 calls, 4 tokens; planner; rewards: f1 0.25"
    assert failed.endswith("  live  failed") and empty == "    0 calls, 0 tokens; no reward"
    listed = json.loads(invoke("runs", "--store", url, "--status", "failed", "--json").stdout)
    assert [(found["run"]["run_id"], found["run"]["error"]) for found in listed] == [("run_b", "the oven is too hot")]
    assert "no such runs" in invoke("runs", "--store", url, "--purpose", "eval").stdout


def test_calls_of_no_run_are_listed(url: str) -> None:
    assert invoke("runs", "--unplaced", "--store", url).stdout == "every call belongs to a run\n"
    store = open_store(url)
    store.append_calls([call(n, attribution=Attribution(role="planner", role_source="key")) for n in (7, 8, 9)])
    store.close()
    newest, inside, *_ = invoke("runs", "--unplaced", "--store", url).stdout.splitlines()
    assert newest.startswith("call_9  1970-") or newest.startswith("call_9  1969-")
    assert inside == "    2 tokens; planner → main"
    rest = json.loads(invoke("runs", "--unplaced", "--store", url, "--before", "call_8", "--json").stdout)
    assert [(one["call_id"], one["n_sampled_tokens"]) for one in rest] == [("call_7", 2)]
    assert invoke("runs", "--unplaced", "--store", url, "--status", "open").exit_code == 2
    assert "to list before" in invoke("runs", "--unplaced", "--store", url, "--before", "nobody").stderr


def test_a_run_is_shown(url: str) -> None:
    shown = invoke("show", "run_a", "--store", url).stdout
    assert "temperature 0.8 (asked: 0)" in shown
    assert "3 prompt, 2 sampled, 0.50 s" in shown
    assert "Paris [bold]" in shown
    assert "stop, greedy" in shown
    assert "length mismatch" in shown
    assert shown.index("run: hook, role: hook") < shown.index("run: hook, role: rule")
    assert "plan, superstep 2" in shown
    assert "x" * 300 not in shown
    assert "x" * 100 in invoke("show", "run_a", "--store", url, "--full").stdout
    trace = json.loads(invoke("show", "run_a", "--store", url, "--json").stdout)
    assert trace["calls"][0]["choices"][0]["token_ids"] == [4, 5]
    assert [call["attribution"]["role_source"] for call in trace["calls"]] == ["hook", "rule"]
    assert trace["rewards"][0]["value"] == 0.25
    assert trace["fingerprints"] == {"call_1": None, "call_2": None}  # neither a system prompt nor tools


def test_a_call_is_shown_by_its_own_or_its_completions_id(url: str) -> None:
    shown = invoke("show", "call_2", "--store", url).stdout
    assert invoke("show", "chatcmpl-2", "--store", url).stdout == shown
    assert "call call_2, of run run_a" in shown
    assert ("length mismatch" in shown, "run: hook, role: rule" in shown) == (True, True)
    assert shown.count("call_1") == shown.count("its prompt begins with that of call call_1") == 1
    told = json.loads(invoke("show", "chatcmpl-1", "--store", url, "--json").stdout)
    assert (told["call_id"], told["attribution"]["run_id"]) == ("call_1", "run_a")
    assert (told["choices"][0]["token_ids"], told["rewards"], told["conflicts"]) == ([4, 5], [], [])
    refused = invoke("show", "call_2", "--store", url, "--mermaid")
    assert (refused.exit_code, "only a run has a graph" in refused.stderr) == (1, True)


def test_a_call_without_a_run_is_shown(url: str) -> None:
    store = open_store(url)
    cut = replace(call(3).choices[0], kept_ids=((4, 9, 8), (5,)))
    store.append_calls([call(3, attribution=Attribution(role="planner", role_source="rule"), choices=(cut,))])
    store.append_calls([call(4, attribution=Attribution(), completion_id="chatcmpl-3")])
    store.attribute_late([LateAttribution(source="langsmith", call_id="call_3", role="writer")])
    store.close()
    shown = invoke("show", "call_3", "--store", url).stdout
    assert "of no run: nothing trains on it" in shown
    assert "Paris [bold] (stop, greedy, sampled from 2.0 tokens at a time)" in shown
    assert "conflict: the role of call_3 is planner (rule), not writer (langsmith)" in shown
    told = json.loads(invoke("show", "call_3", "--store", url, "--json").stdout)
    assert (told["attribution"]["run_id"], told["attribution"]["role_source"]) == (None, "rule")
    assert [conflict["said"] for conflict in told["conflicts"]] == ["writer"]
    assert "nobody" in invoke("show", "call_4", "--store", url).stdout
    twice = invoke("show", "chatcmpl-3", "--store", url)
    assert (twice.exit_code, "name the call id" in twice.stderr) == (1, True)


def test_what_a_call_was_rewarded_with_is_shown(url: str) -> None:
    store = open_store(url)
    store.add_rewards([Reward(reward_id="c", run_id="run_a", name="style", value=0.75, source="t", call_id="call_2")])
    store.close()
    assert "0.75" in invoke("show", "call_2", "--store", url).stdout
    assert "0.75" not in invoke("show", "call_1", "--store", url).stdout
    (reward,) = json.loads(invoke("show", "call_2", "--store", url, "--json").stdout)["rewards"]
    assert (reward["name"], reward["value"]) == ("style", 0.75)


def test_what_is_not_there_is_said_plainly(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = invoke("show", "run_c", "--store", url)
    assert missing.exit_code == 1
    assert "no run, call or completion has the id 'run_c'; `tracegrad runs`" in missing.stderr
    monkeypatch.chdir(tmp_path)
    assert "--config FILE or --store URL" in invoke("runs").stderr
    assert invoke("runs", "--store", f"sqlite:///{tmp_path}/none.db").exit_code == 1
    assert not (tmp_path / "none.db").exists()


@pytest.fixture
def graph_url(tmp_path: Path) -> str:
    """A run whose node `plan` called a tool and fed `write`; a conflict; a call that belongs to no span."""
    where = f"sqlite:///{tmp_path}/graph.db"
    store = open_store(where)
    told: list[dict[str, Any]] = [
        {"span_id": "p", "name": "plan", "namespace": "plan:1", "superstep": 1, "started_at": 1.0, "ended_at": 3.0},
        {"span_id": "t", "name": "search", "kind": "tool", "parent_span_id": "p", "input": {"q": "x"}, "output": "4"},
        {"span_id": "w", "name": '"write"', "namespace": "write:2", "superstep": 2, "error": "no [ink]"},
        {"span_id": "ring", "name": "ring", "parent_span_id": "ring"},
    ]
    store.put_spans([Span(run_id="run_a", **part) for part in told])
    by = Attribution(run_id="run_a", run_source="hook", role="planner", role_source="hook")
    span = Span(span_id="p", run_id="run_a", name="plan")
    store.append_calls([call(1, attribution=replace(by, span=span)), call(2, attribution=by)])
    store.attribute_late([LateAttribution(source="langsmith", call_id="call_2", role="writer")])
    store.close()
    return where


def test_a_run_is_shown_as_a_tree(graph_url: str) -> None:
    shown = invoke("show", "run_a", "--store", graph_url).stdout
    lines = [line.strip() for line in shown.splitlines()]
    tree = lines[lines.index("run run_a", 1) : lines.index("run run_a", 1) + 9]
    assert tree == [
        "run run_a",
        "├── plan node step 1 2.00 s",
        "│   ├── call 1 planner 2 tokens",
        "│   └── search tool",
        '│         in  {"q":"x"}',
        "│         out 4",
        "├── ring node",
        '├── "write" node step 2',
        "│     no [ink]",
    ]
    assert "└── call 2 planner 2 tokens" in lines
    assert "conflict: the role of call_2 is planner (hook), not writer (langsmith)" in shown


def test_a_run_is_drawn_for_mermaid(graph_url: str) -> None:
    assert invoke("show", "run_a", "--store", graph_url, "--mermaid").stdout.splitlines() == [
        "flowchart TD",
        '    s0["plan, step 1, 1 call"]',
        '    s1["ring"]',
        '    s2(["search"])',
        '    s3["&quot;write&quot;, step 2, failed"]',
        "    s0 --> s3",
        "    s0 -.-> s2",
    ]
    shown = json.loads(invoke("show", "run_a", "--store", graph_url, "--json").stdout)
    assert shown["edges"] == [{"source": "p", "target": "w"}]
    assert [(conflict["kept"], conflict["said"]) for conflict in shown["conflicts"]] == [("planner", "writer")]
