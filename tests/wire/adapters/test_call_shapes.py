"""Every shape in which a node calls a model, under three runs at once, through the real proxy: who is said to call.

Each shape is run by the hook (`wrap`), and by the LangSmith wire where LangSmith sees it: then the graph is bare.
"""

import asyncio
import contextvars
import operator
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import langsmith
import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send
from langsmith.run_helpers import tracing_context

from tracegrad.adapters.langgraph import wrap

RUNS = 3
Calls = list[tuple[str | None, str | None]]
"""(role, the node that calls) of each call of one run."""


class State(TypedDict, total=False):
    question: str
    answers: Annotated[list[str], operator.add]


@dataclass(frozen=True)
class Shape:
    """`build(served)` gives a graph; `ask` makes its input from a question."""

    build: Callable[[Any], Any]
    calls: Calls
    is_async: bool = False
    ask: Callable[[str], Any] = lambda question: {"question": question, "answers": []}
    by: Literal["both", "hook"] = "both"


def _said(message: Any) -> dict[str, Any]:
    return {"answers": [str(message.content)]}


def _one(node: Callable[[Any], Any], name: str = "a") -> Callable[[Any], Any]:
    """A graph of one node; `node(model)` makes it."""

    def build(served: Any) -> Any:
        return StateGraph(State).add_node(name, node(served.model())).add_edge(START, name).compile()

    return build


def _ask(model: Any) -> Any:
    return lambda state: _said(model.invoke(state["question"]))


def _aask(model: Any) -> Any:
    async def node(state: State) -> dict[str, Any]:
        return _said(await model.ainvoke(state["question"]))

    return node


def _in_turn(*names: str) -> Callable[[Any], Any]:
    def build(served: Any) -> Any:
        builder = StateGraph(State)
        for name in names:
            builder.add_node(name, _ask(served.model()))
        for before, after in zip([START, *names], names, strict=False):
            builder.add_edge(before, after)
        return builder.compile()

    return build


def _streams(model: Any) -> Any:
    return lambda state: {"answers": ["".join(str(chunk.content) for chunk in model.stream(state["question"]))]}


def _astreams(model: Any) -> Any:
    async def node(state: State) -> dict[str, Any]:
        return {"answers": ["".join([str(chunk.content) async for chunk in model.astream(state["question"])])]}

    return node


def _lcel(model: Any) -> Any:
    return ChatPromptTemplate.from_template("{question}") | model | StrOutputParser()


def _abatch(model: Any) -> Any:
    async def node(state: State) -> dict[str, Any]:
        return _said((await model.abatch([state["question"]] * 2))[0])

    return node


def _gathered(model: Any) -> Any:
    async def node(state: State) -> dict[str, Any]:
        tasks = [asyncio.create_task(model.ainvoke(state["question"])) for _ in range(2)]
        return _said((await asyncio.gather(*tasks))[0])

    return node


def _to_thread(model: Any) -> Any:
    async def node(state: State) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(model.invoke, state["question"])
        return _said(await loop.run_in_executor(None, model.invoke, state["question"]))

    return node


def _structured(model: Any) -> Any:
    schema = {"title": "Answer", "type": "object", "properties": {"text": {"type": "string"}}}
    chain = model.with_structured_output(schema, method="json_schema", include_raw=True)
    return lambda state: _said(chain.invoke(state["question"])["raw"])


def _branches(served: Any) -> Any:
    builder = StateGraph(State)
    for name in ("left", "right", "last"):
        builder.add_node(name, _ask(served.model()))
    builder.add_edge(START, "left").add_edge(START, "right")
    return builder.add_edge(["left", "right"], "last").compile()


def _fan_out(served: Any) -> Any:
    builder = StateGraph(State).add_node("plan", _aask(served.model())).add_node("work", _astreams(served.model()))
    builder.add_edge(START, "plan")

    def send(state: State) -> list[Send]:
        return [Send("work", {"question": f"{state['question']} part {i}"}) for i in range(3)]

    return builder.add_conditional_edges("plan", send, ["work"]).compile()


def _loop(served: Any) -> Any:
    builder = StateGraph(State).add_node("a", _ask(served.model())).add_edge(START, "a")
    return builder.add_conditional_edges("a", lambda state: END if len(state["answers"]) == 3 else "a").compile()


def _goto(served: Any) -> Any:
    model = served.model()

    def first(state: State) -> Command[Any]:
        return Command(goto="second", update=_said(model.invoke(state["question"])))

    builder = StateGraph(State).add_node("first", first, destinations=("second",)).add_node("second", _ask(model))
    return builder.add_edge(START, "first").compile()


def _subgraph(served: Any) -> Any:
    inner = _in_turn("draft", "polish")(served)
    return StateGraph(State).add_node("writer", inner).add_edge(START, "writer").compile()


def _nested(served: Any) -> Any:
    return StateGraph(State).add_node("outer", _subgraph(served)).add_edge(START, "outer").compile()


def _called_subgraph(served: Any) -> Any:
    inner = _in_turn("draft")(served)
    builder = StateGraph(State).add_node("caller", lambda state: {"answers": inner.invoke(state)["answers"]})
    return builder.add_edge(START, "caller").compile()


def _agent_in_a_node(served: Any) -> Any:
    agent = create_agent(served.model(), name="expert")

    def node(state: State) -> dict[str, Any]:
        return _said(agent.invoke({"messages": [("user", state["question"])]})["messages"][-1])

    return StateGraph(State).add_node("caller", node).add_edge(START, "caller").compile()


def _agent_as_a_node(served: Any) -> Any:
    builder = StateGraph(MessagesState).add_node("boss", create_agent(served.model(), name="boss"))
    return builder.add_edge(START, "boss").compile()


def _tools(served: Any) -> Any:
    model = served.model()

    @tool
    def think(question: str) -> str:
        """Think."""
        return str(model.invoke(question).content)

    def plan(state: MessagesState) -> dict[str, Any]:
        args = {"question": str(state["messages"][0].content)}
        calls = [{"name": "think", "args": args, "id": f"c{i}", "type": "tool_call"} for i in range(2)]
        return {"messages": [AIMessage("", tool_calls=calls)]}

    builder = StateGraph(MessagesState).add_node("plan", plan).add_node("act", ToolNode([think]))
    return builder.add_edge(START, "plan").add_edge("plan", "act").compile()


def _functional(served: Any) -> Any:
    model = served.model()

    @task
    def ask(question: str) -> str:
        return str(model.invoke(question).content)

    @entrypoint()
    def workflow(question: str) -> list[str]:
        return [future.result() for future in [ask(question), ask(question)]]

    return workflow


def _afunctional(served: Any) -> Any:
    model = served.model()

    @task
    async def ask(question: str) -> str:
        return str((await model.ainvoke(question)).content)

    @entrypoint()
    async def workflow(question: str) -> list[str]:
        return list(await asyncio.gather(ask(question), ask(question)))

    return workflow


def _sdk(served: Any) -> Any:
    client = openai.OpenAI(base_url=served.root + "/v1", api_key="x")

    def node(state: State) -> dict[str, Any]:
        messages: Any = [{"role": "user", "content": state["question"]}]
        return _said(client.chat.completions.create(model="main", messages=messages).choices[0].message)

    return StateGraph(State).add_node("a", node).add_edge(START, "a").compile()


def _asdk(served: Any) -> Any:
    async def node(state: State) -> dict[str, Any]:
        messages: Any = [{"role": "user", "content": state["question"]}]
        async with openai.AsyncOpenAI(base_url=served.root + "/v1", api_key="x") as client:
            stream = await client.chat.completions.create(model="main", messages=messages, stream=True)
            return {"answers": ["".join([chunk.choices[0].delta.content or "" async for chunk in stream])]}

    return StateGraph(State).add_node("a", node).add_edge(START, "a").compile()


def _thread(model: Any) -> Any:
    def node(state: State) -> dict[str, Any]:
        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda: answers.append(str(model.invoke(state["question"]).content)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"answers": answers}

    return node


SHARED_POOL = ThreadPoolExecutor(2)
"""An executor that outlives the runs and serves them all: its threads belong to none."""


def _executor(model: Any) -> Any:
    return lambda state: {"answers": [m.text for m in SHARED_POOL.map(model.invoke, [state["question"]] * 3)]}


def _sdk_in_a_thread(served: Any) -> Any:
    client = openai.OpenAI(base_url=served.root + "/v1", api_key="x")

    def ask(question: str) -> str:
        messages: Any = [{"role": "user", "content": question}]
        return str(client.chat.completions.create(model="main", messages=messages).choices[0].message.content)

    def node(state: State) -> dict[str, Any]:
        return {"answers": [SHARED_POOL.submit(ask, state["question"]).result()]}

    return StateGraph(State).add_node("a", node).add_edge(START, "a").compile()


def _messages(question: str) -> Any:
    return {"messages": [("user", question)]}


ONE: Calls = [("a", "a")]
SHAPES: dict[str, Shape] = {
    "nodes in turn": Shape(_in_turn("a", "b"), [("a", "a"), ("b", "b")]),
    "async node": Shape(_one(_aask), ONE, is_async=True),
    "sync node under ainvoke": Shape(_one(_ask), ONE, is_async=True),
    "stream": Shape(_one(_streams), ONE),
    "astream": Shape(_one(_astreams), ONE, is_async=True),
    "streams of n": Shape(_one(lambda model: _streams(model.bind(n=2))), ONE),
    "several choices": Shape(_one(lambda model: _ask(model.bind(n=2))), ONE),
    "LCEL in a node": Shape(_one(lambda m: lambda s: {"answers": [_lcel(m).invoke(s)]}), ONE),
    "a chain is the node": Shape(_one(lambda m: _lcel(m) | (lambda text: {"answers": [text]})), ONE),
    "a chain is the node, async": Shape(
        _one(lambda m: _lcel(m) | (lambda text: {"answers": [text]})), ONE, is_async=True
    ),
    "a parallel chain": Shape(
        _one(lambda m: RunnableParallel(x=_lcel(m), y=_lcel(m)) | (lambda both: {"answers": [both["x"]]})), ONE * 2
    ),
    "batch": Shape(_one(lambda m: lambda s: _said(m.batch([s["question"]] * 3)[0])), ONE * 3),
    "abatch": Shape(_one(_abatch), ONE * 2, is_async=True),
    "with_retry and with_fallbacks": Shape(_one(lambda m: _ask(m.with_retry().with_fallbacks([m]))), ONE),
    "with_config": Shape(_one(lambda m: _ask(m.with_config(tags=["t"], metadata={"mine": 1}))), ONE),
    "structured output": Shape(_one(_structured), ONE),
    "a lambda in a lambda": Shape(_one(lambda m: RunnableLambda(lambda s: RunnableLambda(_ask(m)).invoke(s))), ONE),
    "tasks of asyncio": Shape(_one(_gathered), ONE * 2, is_async=True),
    "to_thread and run_in_executor": Shape(_one(_to_thread), ONE * 2, is_async=True, by="hook"),
    "branches and a join": Shape(_branches, [("last", "last"), ("left", "left"), ("right", "right")]),
    "Send": Shape(_fan_out, [("plan", "plan"), *[("work", "work")] * 3], is_async=True),
    "a loop": Shape(_loop, ONE * 3),
    "Command": Shape(_goto, [("first", "first"), ("second", "second")]),
    "a subgraph": Shape(_subgraph, [("writer", "draft"), ("writer", "polish")]),
    "nested subgraphs": Shape(_nested, [("outer", "draft"), ("outer", "polish")]),
    "a subgraph called in a node": Shape(_called_subgraph, [("caller", "draft")]),
    "create_agent": Shape(lambda served: create_agent(served.model()), [("model", "model")], ask=_messages),
    "create_agent as a node": Shape(_agent_as_a_node, [("boss", "model")], ask=_messages),
    "create_agent in a node": Shape(_agent_in_a_node, [("expert", "model")]),
    "tools side by side": Shape(_tools, [("act", "act")] * 2, ask=_messages),
    "functional": Shape(_functional, [("workflow", "ask")] * 2, ask=str),
    "functional, async": Shape(_afunctional, [("workflow", "ask")] * 2, ask=str, is_async=True),
    "the raw SDK": Shape(_sdk, ONE, by="hook"),
    "the raw SDK, async stream": Shape(_asdk, ONE, is_async=True, by="hook"),
    "raw threads": Shape(_one(_thread), ONE * 2, by="hook"),
    "a raw executor": Shape(_one(_executor), ONE * 3, by="hook"),
    "the raw SDK in a raw executor": Shape(_sdk_in_a_thread, ONE, by="hook"),
}


@pytest.fixture(scope="module")
def tracer(served: Any) -> Iterator[langsmith.Client]:
    client = langsmith.Client(api_url=served.root + "/langsmith", api_key="x")
    yield client
    client.cleanup()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all shapes: ChatOpenAI keeps its async connections from one model to the next."""
    with asyncio.Runner() as one:
        yield one


def _run_at_once(graph: Any, shape: Shape, words: list[str], ids: list[uuid.UUID], runner: asyncio.Runner) -> None:
    """Start the runs together: the first node of each waits for the others."""
    configs: list[Any] = [{"run_id": run_id} for run_id in ids]
    if shape.is_async:

        async def all_of_them() -> None:
            given = zip(words, configs, strict=True)
            await asyncio.gather(*(graph.ainvoke(shape.ask(word), config) for word, config in given))

        runner.run(all_of_them(), context=contextvars.copy_context())
        return
    gate = threading.Barrier(RUNS)

    def one(word: str, config: Any) -> None:
        gate.wait(20)
        graph.invoke(shape.ask(word), config)

    with ThreadPoolExecutor(RUNS) as pool:
        list(pool.map(one, words, configs))


def _check(served: Any, shape: Shape, words: list[str], source: str) -> set[str]:
    """Each run has its own calls, all of them, with the roles and nodes that made them. Returns the runs."""
    found = [served.store.trace(summary.run.run_id) for summary in served.store.list_runs(limit=RUNS)]
    for trace in found:
        assert (trace.run.status, trace.run.error) == ("closed", None)
        told = [(call.attribution.role, call.attribution.span and call.attribution.span.name) for call in trace.calls]
        assert sorted(told, key=str) == sorted(shape.calls, key=str)
        assert {(c.attribution.run_source, c.attribution.role_source) for c in trace.calls} == {(source, source)}
        said = {word for word in words for call in trace.calls if word in str(call.request["messages"])}
        assert len(said) == 1, "a run holds the calls of one question"
        words = [word for word in words if word not in said]
        spans = {span.span_id: span for span in trace.spans}
        assert all(span.started_at and span.ended_at for span in spans.values())
        assert all(span.parent_span_id in spans for span in spans.values() if span.parent_span_id)
        assert [span.name for span in spans.values() if span.kind == "graph" and span.parent_span_id is None]
    assert words == []
    assert served.store.attribution_conflicts() == []
    return {trace.run.run_id for trace in found}


@pytest.mark.parametrize("name", SHAPES)
def test_by_hook(served: Any, runner: asyncio.Runner, name: str) -> None:
    shape, words = SHAPES[name], [f"q{uuid.uuid4().hex}" for _ in range(RUNS)]
    ids = [uuid.uuid4() for _ in range(RUNS)]
    _run_at_once(wrap(shape.build(served), proxy=served.root), shape, words, ids, runner)
    _check(served, shape, words, "hook")


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.by == "both"])
def test_by_langsmith(served: Any, tracer: langsmith.Client, runner: asyncio.Runner, name: str) -> None:
    shape, words = SHAPES[name], [f"q{uuid.uuid4().hex}" for _ in range(RUNS)]
    ids = [uuid.uuid4() for _ in range(RUNS)]
    with tracing_context(enabled=True, client=tracer):
        if shape.is_async:
            _run_at_once(shape.build(served), shape, words, ids, runner)
        else:
            _run_at_once(_TracedEverywhere(shape.build(served), tracer), shape, words, ids, runner)
    tracer.flush()
    assert _check(served, shape, words, "langsmith") == {str(run_id) for run_id in ids}


class _TracedEverywhere:
    """A graph under tracing in whatever thread it is invoked, as the environment does it."""

    def __init__(self, graph: Any, tracer: langsmith.Client) -> None:
        self.graph, self.tracer = graph, tracer

    def invoke(self, given: Any, config: Any) -> Any:
        with tracing_context(enabled=True, client=self.tracer):
            return self.graph.invoke(given, config)


def test_a_thread_that_outlives_its_run_serves_others_without_its_name(served: Any) -> None:
    """A worker that a node starts as a daemon carries no run: what it does later may be for another."""
    model: ChatOpenAI = served.model()
    asked, go_on = f"q{uuid.uuid4().hex}", threading.Event()

    def worker() -> None:
        assert go_on.wait(20)
        model.invoke(asked)

    thread = threading.Thread(target=worker, daemon=True)
    node = StateGraph(State).add_node("starter", lambda state: thread.start() or {}).add_edge(START, "starter")
    wrap(node.compile(), proxy=served.root).invoke({"question": "x"})
    go_on.set()
    thread.join()
    assert served.store.trace(served.store.list_runs(limit=1)[0].run.run_id).calls == ()
