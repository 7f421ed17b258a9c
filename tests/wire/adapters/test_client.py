"""The client of the proxy's API: what it sends, what it repeats, which error says what."""

import asyncio
from typing import Any

import pytest

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import ProxyFailed, ProxyRefused, ProxyUnreachable
from tracegrad.tracestore.records import Group, Task


def test_runs_are_opened_under_an_id_made_here_and_ended(proxy: Any) -> None:
    client = ProxyClient(proxy.v1 + "/")
    assert client.root == proxy.root
    run = client.open_run(purpose="train", task_id="t", group_id="g", member=0)
    assert run.run_id.startswith("run_") and (run.purpose, run.group_id, run.member) == ("train", "g", 0)
    assert client.open_run(run_id=run.run_id, purpose="train").run_id == run.run_id
    assert client.group_runs("g") == [run]
    ended = client.end_run(run.run_id, status="failed", error="why")
    assert (ended.status, ended.ended_by, ended.error) == ("failed", "explicit", "why")
    assert client.get_run(run.run_id)["run"]["status"] == "failed"
    client.put_tasks([Task(task_id="t", input={"q": 1})])
    client.put_groups([Group(group_id="g", task_id="t", planned_size=2, purpose="train")])


@pytest.mark.parametrize(
    "target", [{"run_id": "r"}, {"run_id": "r", "role": "planner"}, {"call_id": "c"}, {"completion_id": "chatcmpl-1"}]
)
def test_a_reward_names_one_target(proxy: Any, target: dict[str, str]) -> None:
    stored = ProxyClient(proxy.root).reward(0.5, name="f1", **target)
    (sent,) = proxy.rewards
    assert sent == {**target, "reward_id": stored["reward_id"], "name": "f1", "value": 0.5, "source": "client"}


@pytest.mark.parametrize("target", [{}, {"run_id": "r", "call_id": "c"}])
def test_a_reward_without_one_target_is_refused(proxy: Any, target: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        ProxyClient(proxy.root).reward(1.0, **target)
    assert proxy.log == []


def test_what_is_not_now_possible_is_repeated_under_the_same_id(proxy: Any) -> None:
    proxy.refuse["/tracegrad/v1/rewards"] = (503, 2)
    ProxyClient(proxy.root).reward(1.0, run_id="r")
    assert proxy.log == ["POST /tracegrad/v1/rewards"] * 3
    assert len(proxy.rewards) == 1


def test_errors_say_who_is_at_fault(proxy: Any) -> None:
    client = ProxyClient(proxy.root)
    with pytest.raises(ProxyRefused, match="no /tracegrad/v1/runs/a%2Fb") as refused:
        client.get_run("a/b")
    assert (refused.value.status, refused.value.code) == (404, "not_found")
    proxy.refuse["/tracegrad/v1/runs"] = (503, 9)
    with pytest.raises(ProxyFailed, match="not now") as failed:
        client.open_run()
    assert (failed.value.status, failed.value.code) == (503, "said_no")
    proxy.refuse["/tracegrad/v1/runs"] = (500, 9)
    with pytest.raises(ProxyFailed):
        client.open_run()
    assert proxy.refuse["/tracegrad/v1/runs"] == (500, 8)
    with pytest.raises(ProxyUnreachable, match="tracegrad proxy"):
        ProxyClient("http://127.0.0.1:1").health()
    with pytest.raises(ValueError, match="not a proxy's URL"):
        ProxyClient("127.0.0.1:8080")


def test_the_async_twins_do_the_same(proxy: Any) -> None:
    async def main() -> list[Any]:
        client = ProxyClient(proxy.root)
        runs = await asyncio.gather(*(client.aopen_run() for _ in range(5)))
        await client.areward(1.0, run_id=runs[0].run_id)
        return [(await client.aend_run(run.run_id)).status for run in runs]

    assert asyncio.run(main()) == ["closed"] * 5
    assert ProxyClient.aopen_run.__doc__ == ProxyClient.open_run.__doc__
