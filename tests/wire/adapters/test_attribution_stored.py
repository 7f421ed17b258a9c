"""Through the real proxy into a real store: what wrap, hook, launcher and client say is what is recorded."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from typing_extensions import TypedDict

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import ProxyRefused
from tracegrad.adapters.langgraph import wrap
from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.records import Reward
from tracegrad.trainer.returns import reached_calls
from tracegrad.trainer.run_graph import run_graph


class State(TypedDict):
    question: str
    answers: Annotated[list[str], lambda old, new: old + new]


def _newest(served: Any) -> Any:
    return served.store.trace(served.store.list_runs(limit=1)[0].run.run_id)


def _graph(served: Any) -> Any:
    """plan -> three parallel workers -> a subgraph that streams."""
    model = served.model()

    def ask(state: State) -> dict[str, Any]:
        return {"answers": [model.invoke(state["question"]).content]}

    def stream(state: State) -> dict[str, Any]:
        return {"answers": ["".join(str(chunk.content) for chunk in model.stream(state["question"]))]}

    inner = StateGraph(State).add_node("draft", stream).add_edge(START, "draft").compile()
    builder = StateGraph(State).add_node("plan", ask).add_node("work", ask).add_node("write", inner)
    builder.add_edge(START, "plan").add_edge("work", "write")
    branches = [Send("work", {"question": f"part {i}", "answers": []}) for i in range(3)]
    builder.add_conditional_edges("plan", lambda _: branches, ["work"])
    return builder.compile()


def test_a_run_is_stored_with_roles_spans_and_rewards(served: Any) -> None:
    wrapped = wrap(_graph(served), proxy=served.root, reward=lambda given, output: len(output["answers"]) / 10)
    output = wrapped.invoke({"question": "all", "answers": []})
    assert output["answers"][:4] == ["0: all", "0: part 0", "0: part 1", "0: part 2"]
    trace = _newest(served)
    assert (trace.run.status, trace.run.ended_by, trace.run.purpose) == ("closed", "hook", "live")
    assert [(reward.name, reward.value, reward.source) for reward in trace.rewards] == [
        ("reward", len(output["answers"]) / 10, "wrap")
    ]
    sources = {(call.attribution.role_source, call.attribution.run_source) for call in trace.calls}
    assert sources == {("hook", "hook")}
    assert {call.status for call in trace.calls} == {"complete"}
    roles = [call.attribution.role for call in trace.calls]
    assert roles[0] == "plan" and sorted(roles[1:4]) == ["work"] * 3 and set(roles[4:]) == {"write"}
    spans = [call.attribution.span for call in trace.calls]
    assert [span.superstep for span in spans[:4]] == [1, 2, 2, 2]
    assert len({span.namespace for span in spans[1:4]}) == 3
    assert spans[4].name == "draft" and spans[4].parent_span_id is not None
    assert {span.run_id for span in spans} == {trace.run.run_id}
    assert trace.calls[4].stream
    told = {span.span_id: span for span in trace.spans}
    assert {span.source for span in told.values()} <= {"hook", None}
    assert sorted(f"{span.kind} {span.name}" for span in told.values()) == sorted(
        ["graph LangGraph", "node plan", *["node work"] * 3, "node write", "graph LangGraph", "node draft"]
    )
    assert all(span.started_at and span.ended_at for span in told.values()), "calls and callbacks tell of one span"
    assert told[spans[4].parent_span_id].name == "write"
    assert told[spans[0].span_id].output == {"answers": ["0: all"]}
    assert told[spans[0].span_id].wrote == ("answers", *["send:work"] * 3)
    names = {span.span_id: span.name for span in trace.spans}
    fed = sorted((names[edge.source], names[edge.target]) for edge in edges(trace.spans))
    assert fed == [("plan", "work")] * 3 + [("work", "write")] * 3


def test_credit_goes_from_the_subgraph_back_to_the_workers_and_the_plan(served: Any) -> None:
    """The graph over calls, out of what a real run left in the store: the last call earns, all that led to it share."""
    wrap(_graph(served), proxy=served.root).invoke({"question": "all", "answers": []})
    trace = _newest(served)
    plan, *works, draft = (call.call_id for call in trace.calls)
    graph = run_graph(trace)

    def reached(call_id: str) -> frozenset[str]:
        earned = Reward(reward_id="r", run_id=trace.run.run_id, name="f1", value=1.0, source="t", call_id=call_id)
        return reached_calls(graph, [earned], "graph")

    assert reached(draft) == {plan, *works, draft}
    assert [reached(work) for work in works] == [{plan, work} for work in works]
    assert reached(plan) == {plan}


def test_a_failing_app_is_a_failed_run_without_reward(served: Any) -> None:
    model = served.model()

    def node(state: State) -> dict[str, Any]:
        model.invoke("before the failure")
        raise LookupError("nothing found")

    graph = StateGraph(State).add_node("answerer", node).add_edge(START, "answerer").compile()
    with pytest.raises(LookupError, match="nothing found"):
        wrap(graph, proxy=served.root, reward=lambda given, output: 1.0).invoke({"question": "x", "answers": []})
    trace = _newest(served)
    assert (trace.run.status, trace.run.error) == ("failed", "LookupError: nothing found")
    assert (len(trace.calls), trace.rewards) == (1, ())


def test_a_reward_function_that_fails_is_written_on_the_closed_run(served: Any) -> None:
    wrap(_graph(served), proxy=served.root, reward=lambda given, output: 1 / 0).invoke({"question": "x", "answers": []})
    trace = _newest(served)
    assert (trace.run.status, trace.rewards) == ("closed", ())
    assert trace.run.error == "reward function failed: ZeroDivisionError: division by zero"


def test_rewards_reach_a_call_by_the_completions_id(served: Any) -> None:
    seen: list[str] = []
    model = served.model()

    def node(state: State) -> dict[str, Any]:
        seen.append(model.invoke("x").response_metadata["id"])
        return {"answers": []}

    graph = StateGraph(State).add_node("answerer", node).add_edge(START, "answerer").compile()
    wrap(graph, proxy=served.root).invoke({"question": "x", "answers": []})
    client = ProxyClient(served.root)
    run_id = _newest(served).run.run_id
    stored = client.reward(0.25, name="late", completion_id=seen[0])
    assert (stored["run_id"], stored["call_id"]) == (run_id, _newest(served).calls[0].call_id)
    client.reward(0.5, run_id=run_id, role="answerer")
    rewards = {(reward.name, reward.role): reward.value for reward in _newest(served).rewards}
    assert rewards == {("late", None): 0.25, ("reward", "answerer"): 0.5}
    assert [reward["name"] for reward in client.get_run(run_id)["rewards"]] == ["late", "reward"]
    assert client.backlog()["publishing"] is False
    with pytest.raises(ProxyRefused) as refused:
        client.end_run("run_unknown")
    assert refused.value.status == 404


def test_names_of_any_script_arrive_unharmed(served: Any) -> None:
    model = served.model()
    name = "плановик / 100% «да»"
    node = StateGraph(State).add_node(name, lambda state: {"answers": [model.invoke("x").content]})
    wrap(node.add_edge(START, name).compile(), proxy=served.root).invoke({"question": "x", "answers": []})
    (call,) = _newest(served).calls
    assert call.attribution.role == call.attribution.span.name == name


def test_an_unmodified_program_is_recorded(served: Any, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        textwrap.dedent("""
        import os
        from typing import TypedDict

        import httpx
        from langgraph.graph import START, StateGraph

        def say(state):
            ask = {"model": "main", "messages": [{"role": "user", "content": state["text"]}]}
            answer = httpx.post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json=ask, timeout=30).json()
            return {"text": answer["choices"][0]["message"]["content"]}

        State = TypedDict("State", {"text": str})
        graph = StateGraph(State).add_node("speaker", say).add_edge(START, "speaker").compile()
        print(graph.invoke({"text": "good day"})["text"])
        """)
    )
    command = [sys.executable, "-m", "tracegrad.adapters.cli", "run", "--proxy", served.root, "--purpose", "train"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACEGRAD_", "OPENAI_"))}
    done = subprocess.run(
        [*command, "--", sys.executable, str(script)], capture_output=True, text=True, env=clean, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0: good day\n", "")
    trace = _newest(served)
    assert (trace.run.status, trace.run.ended_by, trace.run.purpose) == ("closed", "hook", "train")
    (call,) = trace.calls
    assert (call.attribution.role, call.attribution.role_source) == ("speaker", "hook")
    assert call.attribution.span is not None and call.attribution.span.wrote == ("text",)
