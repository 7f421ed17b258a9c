"""Spans by the hook: what LangGraph really says of nodes, tools and graphs, and the edges that follow from it."""

import asyncio
import logging
import operator
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable
from types import ModuleType
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send, interrupt
from waits import wait_for

from tracegrad.adapters import graph_writes
from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.langgraph import wrap
from tracegrad.adapters.span_outbox import SpanOutbox
from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.records import Span


class State(TypedDict):
    question: str
    answers: Annotated[list[str], operator.add]


def _model(proxy: Any) -> ChatOpenAI:
    return ChatOpenAI(model="m", base_url=proxy.v1, api_key="x", max_retries=0)


def _asking(model: Any) -> Any:
    return lambda state: {"answers": [model.invoke(state["question"]).content]}


def _given(question: str = "why") -> dict[str, Any]:
    return {"question": question, "answers": []}


def _spans(proxy: Any) -> list[Span]:
    (run_id,) = proxy.runs
    parts = proxy.spans[run_id].values()
    spans = [Span(**{**part, "run_id": run_id, **_tuples(part)}) for part in parts]
    assert all(span.started_at is not None and span.ended_at is not None for span in spans)
    return sorted(spans, key=lambda span: span.started_at or 0)


def _tuples(part: dict[str, Any]) -> dict[str, Any]:
    wrote = part.get("wrote")
    return {"triggers": tuple(part.get("triggers", ())), "wrote": None if wrote is None else tuple(wrote)}


def _tree(spans: Iterable[Span]) -> dict[str, list[str]]:
    """Parent's name -> its children, as `kind name`; the calls' spans are among them."""
    names = {span.span_id: span.name for span in spans}
    tree: dict[str, list[str]] = {}
    for span in spans:
        parent = names[span.parent_span_id] if span.parent_span_id else ""
        tree.setdefault(parent, []).append(f"{span.kind} {span.name}")
    return {parent: sorted(children) for parent, children in tree.items()}


def _edges(spans: list[Span]) -> list[tuple[str, str]]:
    names = {span.span_id: span.name for span in spans}
    return sorted((names[edge.source], names[edge.target]) for edge in edges(spans))


def _calls_hang_under_nodes(proxy: Any, spans: list[Span]) -> None:
    nodes = {span.span_id: span for span in spans if span.kind == "node"}
    for call in proxy.calls:
        said, told = call.span, nodes[call.span["span_id"]]
        assert (said["name"], said["superstep"], said["parent_span_id"]) == (
            told.name,
            told.superstep,
            told.parent_span_id,
        )
        assert tuple(said["triggers"]) == told.triggers and said["namespace"] == told.namespace


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_a_chain(proxy: Any, how: str) -> None:
    builder = StateGraph(State)
    builder.add_node("a", _asking(_model(proxy)))
    builder.add_node("b", ChatPromptTemplate.from_template("b {question}") | _model(proxy) | _answer)
    builder.add_edge(START, "a").add_edge("a", "b")
    graph = wrap(builder.compile(), proxy=proxy.root)
    output = asyncio.run(graph.ainvoke(_given())) if how == "ainvoke" else graph.invoke(_given())
    spans = _spans(proxy)
    assert _tree(spans) == {"": ["graph LangGraph", "node a", "node b"]}
    assert _edges(spans) == [("a", "b")]
    _calls_hang_under_nodes(proxy, spans)
    root, a, b = spans
    assert (root.input, root.output) == (_given(), output)
    assert (a.input, a.output) == (_given(), {"answers": ["echo: why"]})
    assert b.output == {"answers": ["echo: b why"]}
    assert proxy.log[-1].endswith("/end"), "the spans are posted before the run ends"


def _answer(message: AIMessage) -> dict[str, Any]:
    return {"answers": [str(message.text)]}


def test_fan_out_and_join(proxy: Any) -> None:
    ask = _asking(_model(proxy))
    builder = StateGraph(State)
    for name in ("plan", "work", "left", "right", "join"):
        builder.add_node(name, ask)
    builder.add_edge(START, "plan")
    sent = [Send("work", _given(f"part {i}")) for i in range(3)]
    builder.add_conditional_edges("plan", lambda _: sent, ["work"])
    builder.add_edge("work", "left").add_edge("work", "right").add_edge(["left", "right"], "join")
    wrap(builder.compile(), proxy=proxy.root).invoke(_given())
    spans = _spans(proxy)
    work = [span for span in spans if span.name == "work"]
    assert len({span.namespace for span in work}) == len({span.span_id for span in work}) == 3
    assert sorted(span.input["question"] for span in work) == ["part 0", "part 1", "part 2"]
    fan = [("plan", "work")] * 3 + [("work", "left")] * 3 + [("work", "right")] * 3
    assert _edges(spans) == sorted([*fan, ("left", "join"), ("right", "join")])
    _calls_hang_under_nodes(proxy, spans)


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_branches_that_go_on_separately(proxy: Any, how: str) -> None:
    """Two branches of two steps and their join; beside them a map of `Send`s, its reduce, and a step after it.

    Some branches call a model, some do not; one is a `Command`, one a route.
    """
    ask, quiet = _asking(_model(proxy)), lambda state: {"answers": ["x"]}
    builder = StateGraph(State)
    for name in ("plan", "a1", "b2", "join", "work", "after"):
        builder.add_node(name, ask)
    builder.add_node("a2", quiet).add_node("reduce", quiet)
    builder.add_node("b1", lambda state: Command(goto="b2", update={"answers": ["to b2"]}))
    builder.add_edge(START, "plan").add_edge("a1", "a2").add_edge(["a2", "b2"], "join")
    sent: list[Any] = [Send("work", _given(f"part {i}")) for i in range(3)]
    builder.add_conditional_edges("plan", lambda _: ["a1", "b1", *sent])
    builder.add_edge("work", "reduce").add_conditional_edges("reduce", lambda _: "after", ["after", "join"])
    graph = wrap(builder.compile(), proxy=proxy.root)
    if how == "invoke":
        graph.invoke(_given())
    else:
        asyncio.run(graph.ainvoke(_given()))
    spans = _spans(proxy)
    plan = [("plan", "a1"), ("plan", "b1"), *[("plan", "work")] * 3]
    apart = [("a1", "a2"), ("b1", "b2"), ("a2", "join"), ("b2", "join")]
    assert _edges(spans) == sorted([*plan, *apart, *[("work", "reduce")] * 3, ("reduce", "after")])
    _calls_hang_under_nodes(proxy, spans)


def test_each_sent_copy_that_sends_on_feeds_its_own(proxy: Any) -> None:
    """Copies side by side that send two, none and one: by LangGraph's numbers, whoever is done first."""
    planned = {"part 0": (0.1, 2), "part 1": (0.0, 0), "part 2": (0.05, 1)}

    def work(state: State) -> Any:
        mine = state["question"]
        pause_s, amount = planned[mine]
        time.sleep(pause_s)
        return Command(goto=[Send("polish", _given(f"{mine}.{i}")) for i in range(amount)])

    builder = StateGraph(State).add_node("work", work, destinations=("polish",))
    builder.add_node("polish", lambda state: {"answers": ["x"]})
    builder.add_node("plan", lambda state: {"answers": []}).add_edge(START, "plan")
    builder.add_conditional_edges("plan", lambda _: [Send("work", _given(name)) for name in planned], ["work"])
    wrap(builder.compile(), proxy=proxy.root).invoke(_given())
    spans = _spans(proxy)
    asked = {span.span_id: span.input["question"] for span in spans}
    found = sorted((asked[e.source], asked[e.target]) for e in edges(spans) if "." in asked[e.target])
    assert found == [("part 0", "part 0.0"), ("part 0", "part 0.1"), ("part 2", "part 2.0")]


def test_a_langgraph_without_the_name_we_watch_says_what_it_said_before(
    proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the whole step before feeds a node: too much is said, nothing is left out, and the app is not disturbed."""
    monkeypatch.setattr("tracegrad.adapters.span_notes.SpanNotes.wrote", lambda *_: None)
    builder = StateGraph(State)
    for name in ("a1", "a2", "b1", "b2"):
        builder.add_node(name, lambda state: {"answers": []})
    builder.add_edge(START, "a1").add_edge(START, "b1").add_edge("a1", "a2").add_edge("b1", "b2")
    wrap(builder.compile(), proxy=proxy.root).invoke(_given())
    assert _edges(_spans(proxy)) == sorted((a, b) for a in ("a1", "b1") for b in ("a2", "b2"))
    graph_writes.watch(ModuleType("no_runner"), lambda *_: None)
    assert [graph_writes.channels_of(odd) for odd in (None, [1], [("a",)], [(1, 2)])] == [None] * 4


def test_an_agent_with_a_tool(proxy: Any) -> None:
    @tool
    def search(question: str) -> str:
        """Search."""
        return f"found {question}"

    agent = create_agent(_model(proxy), [search], name="boss")
    wrap(agent, proxy=proxy.root).invoke({"messages": [("user", "go")]})
    spans = _spans(proxy)
    assert _tree(spans) == {"": ["graph boss", "node model", "node model", "node tools"], "tools": ["tool search"]}
    assert _edges(spans) == [("model", "tools"), ("tools", "model")]
    _calls_hang_under_nodes(proxy, spans)
    (found,) = [span for span in spans if span.kind == "tool"]
    assert (found.input, found.output, found.error) == ({"question": "why"}, "found why", None)
    first = next(span for span in spans if span.name == "model")
    (message,) = first.input["messages"]
    assert message == {"type": "human", "content": "go"}, "ids and usage are no content"


def test_agents_as_tools_of_an_agent_in_a_node(proxy: Any) -> None:
    model = _model(proxy)
    expert = create_agent(model, name="expert")

    @tool
    def consult(question: str) -> str:
        """Ask the expert."""
        return str(expert.invoke({"messages": [("user", question)]})["messages"][-1].content)

    boss = create_agent(model, [consult], name="boss")
    builder = StateGraph(MessagesState).add_node("boss", boss).add_edge(START, "boss")
    wrap(builder.compile(), proxy=proxy.root).invoke({"messages": [("user", "go")]})
    spans = _spans(proxy)
    assert _tree(spans) == {
        "": ["graph LangGraph", "node boss"],
        "boss": ["graph boss", "node model", "node model", "node tools"],
        "tools": ["graph expert", "node model", "tool consult"],
    }
    assert _edges(spans) == [("model", "tools"), ("tools", "model")]
    _calls_hang_under_nodes(proxy, spans)


def test_subgraphs_as_a_node_and_called_by_one(proxy: Any) -> None:
    ask = _asking(_model(proxy))
    inner = StateGraph(State).add_node("draft", ask).add_node("polish", ask)
    graph = inner.add_edge(START, "draft").add_edge("draft", "polish").compile()

    def twice(state: State) -> dict[str, Any]:
        return {"answers": graph.invoke(state)["answers"] + graph.invoke(state)["answers"]}

    builder = StateGraph(State).add_node("writer", graph).add_node("caller", twice)
    wrap(builder.add_edge(START, "writer").add_edge("writer", "caller").compile(), proxy=proxy.root).invoke(_given())
    spans = _spans(proxy)
    assert _tree(spans) == {
        "": ["graph LangGraph", "node caller", "node writer"],
        "writer": ["graph LangGraph", "node draft", "node polish"],
        "caller": ["graph LangGraph"] * 2 + ["node draft"] * 2 + ["node polish"] * 2,
    }
    assert _edges(spans) == [("draft", "polish")] * 3 + [("writer", "caller")]
    _calls_hang_under_nodes(proxy, spans)


def test_a_tool_node_with_a_model_call_in_the_tool_and_one_that_fails(proxy: Any) -> None:
    model = _model(proxy)

    @tool
    def think(question: str) -> str:
        """Think."""
        return str(model.invoke("inside the tool").content)

    @tool
    def fail(question: str) -> str:
        """Fail."""
        raise LookupError("nothing there")

    calls = [{"name": name, "args": {"question": "q"}, "id": name, "type": "tool_call"} for name in ("think", "fail")]
    builder = StateGraph(MessagesState)
    builder.add_node("ask", lambda state: {"messages": [AIMessage("", tool_calls=calls)]})
    builder.add_node("act", ToolNode([think, fail], handle_tool_errors=True))
    graph = builder.add_edge(START, "ask").add_edge("ask", "act").compile()
    wrap(graph, proxy=proxy.root).invoke({"messages": []})
    spans = _spans(proxy)
    assert _tree(spans)["act"] == ["tool fail", "tool think"]
    told = {span.name: (span.output, span.error) for span in spans if span.kind == "tool"}
    assert told == {"think": ("echo: inside the tool", None), "fail": (None, "LookupError: nothing there")}
    (call,) = proxy.calls
    (act,) = [span for span in spans if span.name == "act"]
    assert call.span["span_id"] == act.span_id


def test_the_functional_api(proxy: Any) -> None:
    model = _model(proxy)

    @task
    def ask(question: str) -> str:
        return str(model.invoke(question).content)

    @entrypoint()
    def workflow(question: str) -> list[str]:
        return [future.result() for future in [ask(question + "1"), ask(question + "2")]]

    wrap(workflow, proxy=proxy.root).invoke("q")
    spans = _spans(proxy)
    assert [span for span in _tree(spans)[""] if span.startswith("node")] == ["node workflow"]
    assert _tree(spans)["workflow"] == ["node ask", "node ask"]
    _calls_hang_under_nodes(proxy, spans)


def test_a_failure_a_retry_and_an_interrupt(proxy: Any) -> None:
    tries = []

    def flaky(state: State) -> dict[str, Any]:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("once")
        return {"answers": ["ok"]}

    def asks(state: State) -> dict[str, Any]:
        interrupt("a person?")
        return {}

    policy = RetryPolicy(initial_interval=0.01, jitter=False)
    builder = StateGraph(State).add_node("flaky", flaky, retry_policy=policy).add_node("asks", asks)
    graph = builder.add_edge(START, "flaky").add_edge("flaky", "asks").compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    wrapped = wrap(graph, proxy=proxy.root)
    wrapped.invoke(_given(), config)
    told = {span.name: span for span in _spans(proxy)}
    assert (told["flaky"].error, told["flaky"].output) == (None, {"answers": ["ok"]})
    assert (told["asks"].error, told["asks"].output) == (None, None)
    wrapped.invoke(Command(resume="yes"), config)
    assert len(proxy.spans) == 2, "what resumes is another run"


def test_an_error_is_told(proxy: Any) -> None:
    def breaks(state: State) -> dict[str, Any]:
        raise LookupError("no such luck")

    graph = StateGraph(State).add_node("breaks", breaks).add_edge(START, "breaks").compile()
    with pytest.raises(LookupError):
        wrap(graph, proxy=proxy.root).invoke(_given())
    assert {span.error for span in _spans(proxy)} == {"LookupError: no such luck"}


def test_long_runs_are_told_while_they_go_on(proxy: Any) -> None:
    go_on = threading.Event()

    def waits(state: State) -> dict[str, Any]:
        assert go_on.wait(10)
        return {}

    builder = StateGraph(State).add_node("first", lambda state: {}).add_node("waits", waits)
    graph = wrap(builder.add_edge(START, "first").add_edge("first", "waits").compile(), proxy=proxy.root)
    thread = threading.Thread(target=graph.invoke, args=(_given(),))
    thread.start()
    wait_for(lambda: proxy.spans and len(next(iter(proxy.spans.values()))) >= 3, "three spans are told")
    assert proxy.only_run()["status"] == "open"
    go_on.set()
    thread.join()
    assert {span.name for span in _spans(proxy)} == {"LangGraph", "first", "waits"}


def test_a_proxy_that_refuses_spans_disturbs_nobody(proxy: Any, caplog: pytest.LogCaptureFixture) -> None:
    graph = StateGraph(State).add_node("a", lambda state: {"answers": ["x"]}).add_edge(START, "a").compile()
    proxy.refuse["/tracegrad/v1/runs/"] = (409, 100)
    assert wrap(graph, proxy=proxy.root).invoke(_given())["answers"] == ["x"]


def test_the_outbox_is_bounded_merges_parts_and_says_once_what_it_lost(
    proxy: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracegrad.adapters.span_outbox.MAX_PARTS", 2)
    monkeypatch.setattr("tracegrad.adapters.span_outbox._PAUSE_S", 3600)
    outbox = SpanOutbox(ProxyClient)
    for number in range(4):
        outbox.put(proxy.root, "r", {"span_id": f"s{number}", "name": "n", "kind": "tool", "input": number})
    outbox.put(proxy.root, "r", {"span_id": "s0", "name": "n", "kind": "tool", "output": 1, "ended_at": 2.0})
    with caplog.at_level(logging.WARNING):
        outbox.flush("another run")
        assert proxy.spans == {}
        outbox.flush("r")
    assert proxy.spans["r"]["s0"] == {
        "span_id": "s0", "name": "n", "kind": "tool", "input": 0, "output": 1, "ended_at": 2.0
    }  # fmt: skip
    assert sorted(proxy.spans["r"]) == ["s0", "s1"]
    assert outbox.dropped == 2
    for number in range(2):
        outbox.put("http://127.0.0.1:9", "r", {"span_id": f"s{number}", "name": "n", "kind": "tool"})
        before = time.monotonic()
        outbox.flush()
        assert outbox.dropped == 3 + number
    assert time.monotonic() - before < 0.5, "a proxy that is away is not asked again at once"
    assert len([record for record in caplog.records if record.name == "tracegrad.spans"]) <= 1


def test_a_fork_while_spans_are_posted_goes_on_by_itself(proxy: Any) -> None:
    """As a server does that forks its workers: the thread that held the locks is not in the child."""
    code = f"""
        import os, signal
        from tracegrad.adapters.span_outbox import SpanOutbox
        outbox, part = SpanOutbox(), {{"span_id": "s", "name": "n", "kind": "node"}}
        with outbox._posting:
            outbox.put({proxy.root!r}, "parent", part)
            child = os.fork()
            if child == 0:
                signal.alarm(15)
                outbox.put({proxy.root!r}, "child", part)
                outbox.flush()
                os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert set(proxy.spans) == {"parent", "child"}
    assert sum(path.endswith("/spans") for path in proxy.log) == 2, "each posts its own"
