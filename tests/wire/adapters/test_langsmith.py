"""An app with LangSmith tracing on and nothing else: the real LangSmith client posts its trees to the real proxy."""

import asyncio
import operator
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import langsmith
import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Send
from langsmith.run_helpers import tracing_context

from tracegrad.adapters.langgraph import wrap
from tracegrad.adapters.proxy.langsmith_spans import own_run_id
from tracegrad.tracestore.edges import edges


class State(TypedDict):
    question: str
    answers: Annotated[list[str], operator.add]


@contextmanager
def _traced(served: Any, path: str = "/langsmith", **client_args: Any) -> Iterator[None]:
    """What LANGSMITH_TRACING, _ENDPOINT and _API_KEY do, for a part of this process."""
    client = langsmith.Client(api_url=served.root + path, api_key="x", **client_args)
    with tracing_context(enabled=True, client=client):
        yield
    client.flush()
    client.cleanup()


def _ask(served: Any, *, stream: bool = False) -> Any:
    model = served.model()

    def node(state: State) -> dict[str, Any]:
        if stream:
            return {"answers": ["".join(str(chunk.content) for chunk in model.stream(state["question"]))]}
        return {"answers": [model.invoke(state["question"]).content]}

    return node


def _given(question: str = "why") -> dict[str, Any]:
    return {"question": question, "answers": []}


def _graph(served: Any) -> Any:
    """plan -> two workers side by side, which stream -> a subgraph."""
    inner = StateGraph(State).add_node("draft", _ask(served)).add_edge(START, "draft").compile()
    builder = StateGraph(State)
    builder.add_node("plan", _ask(served)).add_node("work", _ask(served, stream=True)).add_node("write", inner)
    builder.add_edge(START, "plan").add_edge("work", "write")
    sent = [Send("work", _given(f"part {i}")) for i in range(2)]
    return builder.add_conditional_edges("plan", lambda _: sent, ["work"]).compile()


def _trace(served: Any, run_id: str | None = None) -> Any:
    return served.store.trace(run_id or served.store.list_runs(limit=1)[0].run.run_id)


def _names(trace: Any) -> list[str]:
    names = {span.span_id: span.name for span in trace.spans}
    return sorted(f"{span.kind} {names.get(span.parent_span_id, '')}/{span.name}" for span in trace.spans)


GRAPH_NAMES = sorted(
    [
        "graph /LangGraph",
        "node /plan",
        "node /work",
        "node /work",
        "node /write",
        "graph write/LangGraph",
        "node write/draft",
    ]
)


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_a_graph_is_attributed_with_nothing_but_tracing(served: Any, how: str) -> None:
    trace_id = uuid.uuid4()
    with _traced(served):
        config: Any = {"run_id": trace_id}
        if how == "invoke":
            output = _graph(served).invoke(_given("all"), config)
        else:
            output = asyncio.run(_graph(served).ainvoke(_given("all"), config))
    trace = _trace(served, str(trace_id))
    assert (trace.run.status, trace.run.purpose, trace.run.error) == ("closed", "live", None)
    assert {(c.attribution.run_source, c.attribution.role_source) for c in trace.calls} == {("langsmith",) * 2}
    assert sorted(str(call.attribution.role) for call in trace.calls) == ["plan", "work", "work", "write"]
    assert [call.stream for call in trace.calls].count(True) == 2, "streams are joined as well"
    assert sorted(call.attribution.span.name for call in trace.calls) == ["draft", "plan", "work", "work"]
    assert _names(trace) == GRAPH_NAMES
    names = {span.span_id: span.name for span in trace.spans}
    told = sorted((names[edge.source], names[edge.target]) for edge in edges(trace.spans))
    assert told == [("plan", "work")] * 2 + [("work", "write")] * 2
    root = next(span for span in trace.spans if span.kind == "graph" and span.parent_span_id is None)
    assert (root.input, root.output, root.source) == (_given("all"), output, "langsmith")
    assert all(span.started_at and span.ended_at for span in trace.spans)
    assert served.store.attribution_conflicts() == []


@pytest.mark.parametrize("args", [{}, {"auto_batch_tracing": False}], ids=["multipart", "one by one"])
def test_agents_and_tools_that_ask_a_model(served: Any, args: dict[str, Any]) -> None:
    model = served.model()

    @tool
    def search(question: str) -> str:
        """Search."""
        return str(model.invoke("inside the tool").content)

    wanted = {"name": "search", "args": {"question": "why"}, "id": "call_1", "type": "tool_call"}
    builder = StateGraph(MessagesState).add_node("boss", create_agent(model, name="boss"))
    builder.add_node("ask", lambda state: {"messages": [AIMessage("", tool_calls=[wanted])]})
    builder.add_node("act", ToolNode([search]))
    builder.add_edge(START, "boss").add_edge("boss", "ask").add_edge("ask", "act")
    trace_id = uuid.uuid4()
    with _traced(served, **args):
        builder.compile().invoke({"messages": [("user", "go")]}, {"run_id": trace_id})
    trace = _trace(served, str(trace_id))
    assert _names(trace) == sorted(
        [
            "graph /LangGraph",
            "node /boss",
            "graph boss/boss",
            "node boss/model",
            "node /ask",
            "node /act",
            "tool act/search",
        ]
    )
    (found,) = [span for span in trace.spans if span.kind == "tool"]
    assert (found.input, found.output) == ({"question": "why"}, "0: inside the tool")
    assert [call.attribution.role for call in trace.calls] == ["boss", "act"]
    assert [call.attribution.span.name for call in trace.calls] == ["model", "act"]


def test_a_chain_that_is_a_node(served: Any) -> None:
    trace_id = uuid.uuid4()
    chain = ChatPromptTemplate.from_template("{question}") | served.model() | (lambda m: {"answers": [m.text]})
    with _traced(served):
        graph = StateGraph(State).add_node("chain", chain).add_edge(START, "chain").compile()
        graph.invoke(_given(), {"run_id": trace_id})
    trace = _trace(served, str(trace_id))
    assert [call.attribution.role for call in trace.calls] == ["chain"]
    assert _names(trace) == ["graph /LangGraph", "node /chain"]


def test_a_failure_fails_the_run(served: Any) -> None:
    def breaks(state: State) -> dict[str, Any]:
        raise LookupError("no such luck")

    trace_id = uuid.uuid4()
    with _traced(served), pytest.raises(LookupError):
        graph = StateGraph(State).add_node("a", _ask(served)).add_node("breaks", breaks)
        graph.add_edge(START, "a").add_edge("a", "breaks").compile().invoke(_given(), {"run_id": trace_id})
    trace = _trace(served, str(trace_id))
    assert (trace.run.status, trace.run.error) == ("failed", "LookupError('no such luck')")
    assert {span.name: span.error for span in trace.spans}["breaks"] == "LookupError('no such luck')"
    assert len(trace.calls) == 1


def test_with_the_hook_as_well_there_is_one_run_and_one_span_a_node(served: Any) -> None:
    before = len(served.store.list_runs(limit=100))
    with _traced(served):
        wrap(_graph(served), proxy=served.root).invoke(_given("both"))
    assert len(served.store.list_runs(limit=100)) == before + 1
    trace = _trace(served)
    assert trace.run.ended_by == "hook"
    assert _names(trace) == GRAPH_NAMES
    assert {call.attribution.run_source for call in trace.calls} == {"hook"}
    assert served.store.attribution_conflicts() == []


def test_two_graphs_of_one_trace_that_the_hook_makes_two_runs_stay_two(served: Any) -> None:
    graph = wrap(_graph(served), proxy=served.root)

    @langsmith.traceable
    def both() -> None:
        graph.invoke(_given("one"))
        graph.invoke(_given("two"))

    before = len(served.store.list_runs(limit=100))
    with _traced(served):
        both()
    assert len(served.store.list_runs(limit=100)) == before + 2
    for summary in served.store.list_runs(limit=2):
        assert _names(served.store.trace(summary.run.run_id)) == GRAPH_NAMES
    assert served.store.attribution_conflicts() == []


def test_calls_that_know_their_run_take_the_tree_into_it(served: Any) -> None:
    model = ChatOpenAI(model="main", base_url=f"{served.root}/run/mine/v1", api_key="x")
    graph = StateGraph(State).add_node("a", lambda s: {"answers": [model.invoke("x").content]}).add_edge(START, "a")
    trace_id = uuid.uuid4()
    with _traced(served):
        graph.compile().invoke(_given(), {"run_id": trace_id})
    trace = _trace(served, "mine")
    assert _names(trace) == ["graph /LangGraph", "node /a"]
    (call,) = trace.calls
    assert (call.attribution.run_source, call.attribution.role, call.attribution.role_source) == (
        "path", "a", "langsmith",
    )  # fmt: skip
    assert trace.run.status == "open", "whoever opened the run ends it"
    assert str(trace_id) not in {summary.run.run_id for summary in served.store.list_runs(limit=100)}


def test_a_prefix_names_the_run_and_a_source_that_disagrees_is_a_conflict(served: Any) -> None:
    model = ChatOpenAI(model="main", base_url=f"{served.root}/run/kept/v1", api_key="x")
    graph = StateGraph(State).add_node("a", lambda s: {"answers": [model.invoke("x").content]}).add_edge(START, "a")
    with _traced(served, "/run/said/langsmith"):
        graph.compile().invoke(_given())
    (conflict,) = served.store.attribution_conflicts("kept")
    assert (conflict.field, conflict.kept, conflict.kept_source, conflict.said, conflict.said_source) == (
        "run", "kept", "path", "said", "langsmith",
    )  # fmt: skip
    assert _names(_trace(served, "said")) == ["graph /LangGraph", "node /a"]


def test_a_model_alone_is_no_run_and_the_raw_sdk_stays_unattributed(served: Any) -> None:
    before = len(served.store.list_runs(limit=100))
    with _traced(served):
        served.model().invoke("alone")
    assert len(served.store.list_runs(limit=100)) == before
    client = openai.OpenAI(base_url=served.root + "/v1", api_key="x")
    messages: Any = [{"role": "user", "content": "raw"}]
    trace_id = uuid.uuid4()
    with _traced(served):

        def node(state: State) -> dict[str, Any]:
            client.chat.completions.create(model="main", messages=messages)
            return {}

        StateGraph(State).add_node("a", node).add_edge(START, "a").compile().invoke(_given(), {"run_id": trace_id})
    assert _trace(served, own_run_id(trace_id.hex)).calls == ()


def test_a_program_needs_only_the_environment(served: Any, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        textwrap.dedent("""
        from typing import TypedDict
        from langchain_openai import ChatOpenAI
        from langgraph.graph import START, StateGraph

        model = ChatOpenAI(model="main")
        State = TypedDict("State", {"text": str})
        say = lambda state: {"text": model.invoke(state["text"]).content}
        graph = StateGraph(State).add_node("speaker", say).add_edge(START, "speaker").compile()
        print(graph.invoke({"text": "good day"})["text"])
        """)
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACEGRAD_", "OPENAI_"))}
    clean |= {"OPENAI_BASE_URL": served.root + "/v1", "OPENAI_API_KEY": "x", "LANGSMITH_API_KEY": "x"}
    clean |= {"LANGSMITH_TRACING": "true", "LANGSMITH_ENDPOINT": served.root + "/langsmith"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=clean, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0: good day\n", "")
    trace = _trace(served)
    assert (trace.run.status, [call.attribution.role for call in trace.calls]) == ("closed", ["speaker"])
    assert _names(trace) == ["graph /LangGraph", "node /speaker"]
