"""The JSON doors: tasks, groups, runs, rewards, backlog; and idle runs that end by themselves."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from versions import go_live
from waits import wait_for

from examples.rag_qa.demo import live_step
from tracegrad.tracestore.records import Run
from tracegrad.tracestore.store import Store

ASK = {"messages": [{"role": "user", "content": "hello"}]}


def post(proxy: SimpleNamespace, path: str, body: Any) -> Any:
    answer = proxy.client.post(f"/tracegrad/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def open_group(proxy: SimpleNamespace, purpose: str = "train") -> None:
    task = {"task_id": "t1", "input": {"question": "why?"}, "reference": {"answers": ["so"]}}
    group = {"group_id": "g1", "task_id": "t1", "planned_size": 2, "purpose": purpose}
    for _ in range(2):  # idempotent
        post(proxy, "tasks", {"tasks": [task]})
        post(proxy, "groups", {"groups": [group]})


def test_a_rollout_from_task_to_reward(proxy: SimpleNamespace, store: Store) -> None:
    open_group(proxy)
    run = post(proxy, "runs", {"run_id": "r0", "purpose": "train", "group_id": "g1", "member": 0})
    assert (run["run_id"], run["task_id"], run["status"]) == ("r0", "t1", "open")
    made = post(proxy, "runs", {"purpose": "train", "group_id": "g1", "member": 1})
    assert made["run_id"].startswith("run_")
    answer = proxy.client.post("/run/r0/role/a/v1/chat/completions", json=ASK)
    call_id = answer.headers["x-tracegrad-call"]
    asked = [
        {"run_id": "r0", "name": "f1", "value": 0.5, "source": "test"},
        {"completion_id": answer.json()["id"], "name": "short", "value": 1},
        {"run_id": "r0", "role": "a", "name": "style", "value": -1, "reward_id": "rw"},
    ]
    stored = post(proxy, "rewards", {"rewards": asked})["rewards"]
    assert [(r["run_id"], r["call_id"]) for r in stored] == [("r0", None), ("r0", call_id), ("r0", None)]
    assert stored[2]["reward_id"] == "rw" and stored[0]["late_for"] == []
    ended = post(proxy, "runs/r0/end", {"status": "closed", "ended_by": "hook"})
    assert (ended["status"], ended["ended_by"]) == ("closed", "hook")
    shown = proxy.client.get("/tracegrad/v1/runs/r0").json()
    assert shown["run"]["status"] == "closed"
    assert [(c["call_id"], c["role"], c["sampled_tokens"]) for c in shown["calls_summary"]] == [(call_id, "a", [9])]
    assert {(r["name"], r["role"], r["call_id"], r["value"]) for r in shown["rewards"]} == {
        ("f1", None, None, 0.5),
        ("short", None, call_id, 1.0),
        ("style", "a", None, -1.0),
    }
    runs = proxy.client.get("/tracegrad/v1/groups/g1/runs").json()["runs"]
    assert [(r["member"], r["status"]) for r in runs] == [(0, "closed"), (1, "open")]


def test_a_failed_run_is_recorded_as_failed(proxy: SimpleNamespace, store: Store) -> None:
    post(proxy, "runs", {"run_id": "r", "purpose": "live"})
    post(proxy, "runs/r/end", {"status": "failed", "error": "KeyError: 'x'"})
    run = store.get_run("r")
    assert (run.status, run.ended_by, run.error) == ("failed", "explicit", "KeyError: 'x'")


def test_the_backlog_is_the_trainers(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    version = go_live(store)
    proxy = start_proxy()
    open_group(proxy)
    for member in (0, 1):
        run_id = f"r{member}"
        post(proxy, "runs", {"run_id": run_id, "purpose": "train", "group_id": "g1", "member": member})
        proxy.client.post(f"/run/{run_id}/role/a/v1/chat/completions", json=ASK)
        post(proxy, "rewards", {"rewards": [{"run_id": run_id, "name": "f1", "value": 1.0}]})
        assert proxy.client.get("/tracegrad/v1/backlog").json()["ready_groups"] == 0
        post(proxy, f"runs/{run_id}/end", {})
    found = proxy.client.get("/tracegrad/v1/backlog").json()
    assert found == {
        "ready_groups": 1,
        "leased_groups": 0,
        "publishing": False,
        "live": {"main": {"version": version, "step": 0}},
    }
    assert live_step(found) == 0 and live_step({**found, "live": {"main": None}}) is None, "as the demo reads it"


def test_spans_are_told_in_parts(proxy: SimpleNamespace, store: Store) -> None:
    node = {"span_id": "s1", "name": "a", "namespace": "a:1", "superstep": 1, "triggers": ["branch:to:a"]}
    tool = {"span_id": "s2", "name": "search", "kind": "tool", "parent_span_id": "s1", "input": {"q": 1}}
    for _ in range(2):  # idempotent
        assert post(proxy, "runs/r1/spans", {"spans": [{**node, "started_at": 1.0}, tool]}) == {"spans": 2}
        post(proxy, "runs/r1/spans", {"spans": [{**tool, "output": ["found"], "ended_at": 3.0}]})
    a, search = store.list_spans("r1")
    assert (a.name, a.kind, a.superstep, a.triggers, a.source) == ("a", "node", 1, ("branch:to:a",), "hook")
    assert (search.kind, search.parent_span_id, search.input, search.output) == ("tool", "s1", {"q": 1}, ["found"])
    assert store.get_run("r1").status == "open"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("runs", {"purpose": "lunch"}, 400),
        ("runs", {"purpose": "live", "colour": "red"}, 400),
        ("runs/nobody/end", {}, 404),
        ("rewards", {"rewards": [{"name": "x", "value": 1}]}, 400),
        ("rewards", {"rewards": [{"completion_id": "nothing", "name": "x", "value": 1}]}, 404),
        ("runs", {"run_id": "r", "purpose": "train"}, 409),
        ("runs/r/spans", {"spans": [{"name": "without an id"}]}, 400),
        ("runs/r/spans", {"spans": [{"span_id": "s", "name": "x", "kind": "dream"}]}, 400),
        ("nothing", {}, 404),
    ],
)
def test_wrong_requests_are_refused_in_openais_shape(
    proxy: SimpleNamespace, store: Store, path: str, body: Any, status: int
) -> None:
    store.open_run(Run(run_id="r", purpose="live"))
    answer = proxy.client.post(f"/tracegrad/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "code", "param"}


def test_a_reward_on_a_call_of_another_run_is_refused(proxy: SimpleNamespace) -> None:
    answer = proxy.client.post("/run/r1/v1/chat/completions", json=ASK)
    reward = {"run_id": "r2", "call_id": answer.headers["x-tracegrad-call"], "name": "x", "value": 1}
    assert proxy.client.post("/tracegrad/v1/rewards", json={"rewards": [reward]}).status_code == 400


def test_idle_live_runs_end_by_themselves(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    proxy = start_proxy(proxy={"idle_close_s": 0.2}, project="elsewhere")
    proxy.client.post("/run/quiet/v1/chat/completions", json=ASK)
    assert (store.get_run("quiet").project, store.get_run("quiet").status) == ("elsewhere", "open")
    wait_for(lambda: store.get_run("quiet").status != "open", "the run is over")
    assert store.get_run("quiet").ended_by == "idle"
