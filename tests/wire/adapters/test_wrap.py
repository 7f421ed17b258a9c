"""`wrap`: the graph's own interface, a run around each invocation, rewards, and an app that nothing of ours breaks."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from langchain_core.runnables import Runnable, RunnableLambda
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from typing_extensions import TypedDict

from tracegrad.adapters.errors import NoProxyNamed
from tracegrad.adapters.langgraph import wrap
from tracegrad.adapters.scope import RunScope, current_scope, entered
from tracegrad.adapters.scoring import RewardSpec


class State(TypedDict):
    x: int


class Broken(Exception):
    """The app's own error."""


def _graph(node: Callable[[State], Any] = lambda state: {"x": state["x"] + 1}, *more: Callable[[State], Any]) -> Any:
    builder = StateGraph(State)
    nodes = [("n0", node), *((f"n{i}", one) for i, one in enumerate(more, 1))]
    for name, one in nodes:
        builder.add_node(name, one)
    for before, (after, _) in zip([START, *(name for name, _ in nodes)], nodes, strict=False):
        builder.add_edge(before, after)
    return builder.compile()


def _raise(state: State) -> Any:
    raise Broken("no such luck")


def _run(proxy: Any) -> tuple[str, str | None]:
    run = proxy.only_run()
    return run["status"], run["error"]


def test_it_is_a_graph_of_the_same_class(proxy: Any) -> None:
    bare = _graph()
    graph = wrap(bare, proxy=proxy.root)
    assert isinstance(graph, CompiledStateGraph) and isinstance(graph, Pregel) and isinstance(graph, Runnable)
    assert graph.get_graph().to_json() == bare.get_graph().to_json()
    assert graph.get_input_jsonschema() == bare.get_input_jsonschema()
    assert (graph.name, graph.get_name(), type(graph).__name__) == (bare.name, bare.get_name(), "CompiledStateGraph")
    assert type(bare) is CompiledStateGraph and not hasattr(bare, "_tracegrad_runs")
    assert graph.invoke({"x": 1}) == bare.invoke({"x": 1}) == {"x": 2}
    assert len(proxy.runs) == 1


def test_what_is_derived_from_it_is_wrapped_too(proxy: Any) -> None:
    graph = wrap(_graph(), proxy=proxy.root)
    assert graph.with_config(tags=["t"]).invoke({"x": 1}) == {"x": 2}
    assert (graph | RunnableLambda(lambda state: state["x"])).invoke({"x": 1}) == 2
    assert graph.with_retry().invoke({"x": 1}) == {"x": 2}
    assert len(proxy.runs) == 3
    outer = _graph(graph)
    assert outer.invoke({"x": 1}) == {"x": 2}
    assert [run["status"] for run in proxy.runs.values()] == ["closed"] * 4


def test_batches_return_exceptions_as_the_graph_does(proxy: Any) -> None:
    def node(state: State) -> Any:
        return _raise(state) if state["x"] == 1 else {"x": 0}

    results = wrap(_graph(node), proxy=proxy.root).batch([{"x": 0}, {"x": 1}], return_exceptions=True)
    assert results[0] == {"x": 0} and isinstance(results[1], Broken)
    assert sorted(run["status"] for run in proxy.runs.values()) == ["closed", "failed"]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_goes_through_unchanged_and_fails_the_run(proxy: Any, is_async: bool) -> None:
    graph = wrap(_graph(_raise), proxy=proxy.root, reward=lambda given, output: 1.0)
    with pytest.raises(Broken) as caught:
        asyncio.run(graph.ainvoke({"x": 1})) if is_async else graph.invoke({"x": 1})
    assert caught.value.args == ("no such luck",)
    assert _run(proxy) == ("failed", "Broken: no such luck")
    assert proxy.rewards == []


# -- what the reward function may give


async def _later(given: Any, output: Any) -> float:
    await asyncio.sleep(0)
    return float(output["x"]) / 10


@pytest.mark.parametrize(
    ("reward", "posted"),
    [
        (lambda given, output: given["x"] + 10 * output["x"], [("reward", 21.0, None)]),
        (lambda given, output: {"f1": 0.5, "format": True}, [("f1", 0.5, None), ("format", 1.0, None)]),
        (lambda given, output: [RewardSpec(name="em", value=0.0, role="n0")], [("em", 0.0, "n0")]),
        (_later, [("reward", 0.2, None)]),
        (lambda given, output: None, []),
    ],
    ids=["number", "mapping", "list", "async", "none"],
)
@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream", "invoke inside a loop"])
def test_rewards_are_posted_before_the_run_is_closed(proxy: Any, reward: Any, posted: Any, how: str) -> None:
    graph = wrap(_graph(), proxy=proxy.root, reward=reward)

    async def astream() -> list[Any]:
        return [chunk async for chunk in graph.astream({"x": 1}, stream_mode="updates")]

    async def inside() -> Any:
        return graph.invoke({"x": 1})

    if how == "invoke":
        assert graph.invoke({"x": 1}) == {"x": 2}
    elif how == "stream":
        assert list(graph.stream({"x": 1}, stream_mode="updates")) == [{"n0": {"x": 2}}]
    elif how == "ainvoke":
        assert asyncio.run(graph.ainvoke({"x": 1})) == {"x": 2}
    elif how == "astream":
        assert asyncio.run(astream()) == [{"n0": {"x": 2}}]
    else:
        assert asyncio.run(inside()) == {"x": 2}
    run = proxy.only_run()
    assert [(r["name"], r["value"], r.get("role")) for r in proxy.rewards] == posted
    assert {(r["run_id"], r["source"]) for r in proxy.rewards} <= {(run["run_id"], "wrap")}
    assert (run["status"], run["ended_by"], run["error"]) == ("closed", "hook", None)
    end = f"POST /tracegrad/v1/runs/{run['run_id']}/end"
    log = [line for line in proxy.log if not line.endswith("/spans")]
    assert log == ["POST /tracegrad/v1/runs", *(["POST /tracegrad/v1/rewards"] if posted else []), end]
    assert proxy.log[-1] == end


def test_the_caller_s_callbacks_and_a_stream_without_state_do_not_hide_the_output(proxy: Any) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    class Counting(BaseCallbackHandler):
        ends = 0

        def on_chain_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends += 1

    mine, seen = Counting(), []
    graph = wrap(_graph(), proxy=proxy.root, reward=lambda given, output: seen.append(output))
    graph.invoke({"x": 1}, {"callbacks": [mine]})
    wrapped_ends, mine.ends = mine.ends, 0
    _graph().invoke({"x": 1}, {"callbacks": [mine]})
    assert wrapped_ends == mine.ends > 0
    assert list(graph.stream({"x": 5}, stream_mode="custom")) == []
    assert seen == [{"x": 2}, {"x": 6}]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (_raise, "reward function failed: TypeError"),
        (lambda given, output: float("nan"), "reward function failed: RewardShapeError"),
        (lambda given, output: 1 / 0, "reward function failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_function_that_fails_gives_no_reward_and_no_error_to_the_app(
    proxy: Any, reward: Any, says: str, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    graph = wrap(_graph(), proxy=proxy.root, reward=reward)
    with caplog.at_level(logging.ERROR, "tracegrad.runs"):
        result = asyncio.run(graph.ainvoke({"x": 1})) if is_async else graph.invoke({"x": 1})
    assert result == {"x": 2}
    status, error = _run(proxy)
    assert status == "closed" and error is not None and error.startswith(says)
    assert proxy.rewards == []
    assert says in caplog.text


def test_a_reward_is_judged_outside_of_the_run(proxy: Any) -> None:
    scopes: list[Any] = []

    def judge(given: Any, output: Any) -> float:
        scopes.append(current_scope())
        httpx.post(proxy.v1 + "/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "?"}]})
        return 1.0

    wrap(_graph(), proxy=proxy.root, reward=judge).invoke({"x": 1})
    assert scopes == [None]
    assert proxy.calls[0].run_id is None


# -- early ends


def test_a_stream_that_is_closed_early_is_a_cancelled_run(proxy: Any) -> None:
    ran: list[str] = []
    graph = wrap(_graph(lambda s: ran.append("n0") or s, lambda s: ran.append("n1") or s), proxy=proxy.root)
    stream = graph.stream({"x": 1}, stream_mode="updates")
    next(stream)
    assert _run(proxy)[0] == "open"
    stream.close()
    assert _run(proxy) == ("failed", "cancelled: the stream was closed before its end")
    assert ran == ["n0"]
    assert current_scope() is None


def test_a_stream_that_is_dropped_early_is_a_cancelled_run(proxy: Any) -> None:
    def consume() -> None:
        for _ in wrap(_graph(lambda s: s, lambda s: s), proxy=proxy.root).stream({"x": 1}):
            break

    consume()
    assert proxy.wait_ended(proxy.only_run()["run_id"])["error"] == "cancelled: the stream was closed before its end"


def test_an_async_stream_that_is_closed_early_is_a_cancelled_run(proxy: Any) -> None:
    async def main() -> None:
        stream = wrap(_graph(lambda s: s, lambda s: s), proxy=proxy.root).astream({"x": 1}, stream_mode="updates")
        async with contextlib.aclosing(stream) as chunks:
            async for _ in chunks:
                break

    asyncio.run(main())
    ended = proxy.wait_ended(proxy.only_run()["run_id"])
    assert (ended["status"], ended["error"]) == ("failed", "cancelled: the stream was closed before its end")


@pytest.mark.parametrize("how", ["ainvoke", "astream"])
def test_cancelling_reaches_the_node_and_fails_the_run(proxy: Any, how: str) -> None:
    reached: list[str] = []

    async def node(state: State) -> Any:
        reached.append("started")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            reached.append("cancelled")
            raise

    graph = wrap(_graph(node), proxy=proxy.root)

    async def consume() -> None:
        if how == "ainvoke":
            await graph.ainvoke({"x": 1})
        else:
            async for _ in graph.astream({"x": 1}):
                pass

    async def main() -> None:
        work = asyncio.create_task(consume())
        while not reached:
            await asyncio.sleep(0.005)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 10
    assert reached == ["started", "cancelled"]
    ended = proxy.wait_ended(proxy.only_run()["run_id"])
    assert (ended["status"], ended["error"]) == ("failed", "cancelled: the task was cancelled")


def test_a_context_variable_of_the_app_behaves_as_without_wrap(proxy: Any) -> None:
    from contextvars import ContextVar

    mine: ContextVar[str] = ContextVar("mine", default="unset")
    seen: list[str] = []
    for graph in (_graph(lambda s: seen.append(mine.get()), lambda s: seen.append(mine.get())),):
        for one in (graph, wrap(graph, proxy=proxy.root)):
            mine.set("before")
            stream = one.stream({"x": 1}, stream_mode="updates")
            next(stream)
            mine.set("between")
            list(stream)
    assert seen[:2] == seen[2:] == ["before", "between"]


# -- inside an open run; a proxy that is away


def test_an_invocation_inside_an_open_run_joins_it(proxy: Any) -> None:
    seen: list[Any] = []
    inner = wrap(_graph(lambda s: seen.append(current_scope())), proxy=proxy.root, reward=lambda g, o: {"inner": 1.0})
    outer = wrap(_graph(inner), proxy=proxy.root, reward=lambda given, output: {"outer": 2.0})
    outer.invoke({"x": 1})
    run = proxy.only_run()
    assert seen[0].run_id == run["run_id"]
    assert [(r["run_id"], r["name"], r["value"]) for r in proxy.rewards] == [
        (run["run_id"], "inner", 1.0),
        (run["run_id"], "outer", 2.0),
    ]
    with entered(RunScope(run_id="driver", proxy=proxy.root)):
        inner.invoke({"x": 1})
    assert seen[1].run_id == "driver" and len(proxy.runs) == 1


@pytest.fixture
def silent_root() -> Iterator[str]:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("is_async", [False, True])
def test_a_proxy_that_is_away_breaks_nothing_and_is_said(
    silent_root: str, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    graph = wrap(_graph(lambda s: seen.append(current_scope()) or s), proxy=silent_root, reward=lambda g, o: 1.0)
    assert (asyncio.run(graph.ainvoke({"x": 1})) if is_async else graph.invoke({"x": 1})) == {"x": 1}
    assert seen[0].run_id is None
    assert "could not be opened" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_cannot_be_posted_is_said_on_the_run(proxy: Any, is_async: bool) -> None:
    proxy.refuse["/tracegrad/v1/rewards"] = (400, 1)
    graph = wrap(_graph(), proxy=proxy.root, reward=lambda given, output: 1.0)
    assert (asyncio.run(graph.ainvoke({"x": 1})) if is_async else graph.invoke({"x": 1})) == {"x": 2}
    status, error = _run(proxy)
    assert status == "closed" and error is not None and error.startswith("the reward could not be posted: ")


def test_an_end_that_is_refused_breaks_nothing(proxy: Any, caplog: pytest.LogCaptureFixture) -> None:
    graph = wrap(_graph(_raise), proxy=proxy.root)
    proxy.refuse["/tracegrad/v1/runs/"] = (409, 10)
    with pytest.raises(Broken):
        graph.invoke({"x": 1})
    assert "could not be ended as failed" in caplog.text


def test_what_is_no_graph_is_refused(proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACEGRAD_PROXY", raising=False)
    with pytest.raises(TypeError, match="compiled LangGraph graph"):
        wrap(RunnableLambda(lambda x: x), proxy=proxy.root)
    with pytest.raises(TypeError, match="already"):
        wrap(wrap(_graph(), proxy=proxy.root), proxy=proxy.root)
    with pytest.raises(NoProxyNamed, match="TRACEGRAD_PROXY"):
        wrap(_graph())
    monkeypatch.setenv("TRACEGRAD_PROXY", proxy.v1)
    wrap(_graph(), purpose="train").invoke({"x": 1})
    assert proxy.only_run()["purpose"] == "train"
