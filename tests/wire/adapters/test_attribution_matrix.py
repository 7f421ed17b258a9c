"""Every shape in which a LangGraph app calls a model, wrapped and not otherwise changed: run, role, span."""

import asyncio
import operator
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict

import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Send

from tracegrad.adapters.langgraph import wrap
from tracegrad.adapters.scope import current_scope


class State(TypedDict):
    question: str
    answers: Annotated[list[str], operator.add]


def _model(proxy: Any) -> ChatOpenAI:
    return ChatOpenAI(model="m", base_url=proxy.v1, api_key="x", max_retries=0)


def _chain(*nodes: tuple[str, Callable[..., Any]], **compile_args: Any) -> Any:
    builder = StateGraph(State)
    for name, node in nodes:
        builder.add_node(name, node)
    for before, after in zip([START, *(name for name, _ in nodes)], [name for name, _ in nodes], strict=False):
        builder.add_edge(before, after)
    return builder.compile(**compile_args)


def _asking(model: Any, prefix: str = "") -> Callable[[State], dict[str, Any]]:
    def node(state: State) -> dict[str, Any]:
        return {"answers": [model.invoke(prefix + state["question"]).content]}

    return node


def _aasking(model: Any, prefix: str = "") -> Callable[[State], Any]:
    async def node(state: State) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"answers": [(await model.ainvoke(prefix + state["question"])).content]}

    return node


def _given(question: str = "why") -> dict[str, Any]:
    return {"question": question, "answers": []}


def _one_run(proxy: Any) -> str:
    run = proxy.only_run()
    assert (run["status"], run["ended_by"], run["error"], run["purpose"]) == ("closed", "hook", None, "live")
    assert {call.run_id for call in proxy.calls} == {run["run_id"]}
    assert {call.source for call in proxy.calls} == {"hook"}
    assert not [call for call in proxy.calls if "x-tracegrad-hook-error" in call.headers]
    return str(run["run_id"])


def _roles(proxy: Any) -> list[str | None]:
    return [call.role for call in proxy.calls]


@pytest.mark.parametrize("asking", [_asking, _aasking], ids=["sync node", "async node"])
def test_nodes_in_turn(proxy: Any, asking: Any) -> None:
    graph = _chain(("rewriter", asking(_model(proxy))), ("answerer", asking(_model(proxy))))
    given, wrapped = _given(), wrap(graph, proxy=proxy.root)
    result = asyncio.run(wrapped.ainvoke(given)) if asking is _aasking else wrapped.invoke(given)
    assert result == {"question": "why", "answers": ["echo: why", "echo: why"]}
    _one_run(proxy)
    assert _roles(proxy) == ["rewriter", "answerer"]
    first, second = (call.span for call in proxy.calls)
    assert (first["superstep"], second["superstep"]) == (1, 2)
    assert (first["triggers"], second["triggers"]) == (["branch:to:rewriter"], ["branch:to:answerer"])
    assert first["namespace"].startswith("rewriter:") and first["parent_span_id"] is None
    assert first["span_id"] != second["span_id"]


def test_a_sync_node_under_ainvoke(proxy: Any) -> None:
    asyncio.run(wrap(_chain(("a", _asking(_model(proxy)))), proxy=proxy.root).ainvoke(_given()))
    _one_run(proxy)
    assert _roles(proxy) == ["a"]


def test_two_calls_of_one_node_execution_share_a_span(proxy: Any) -> None:
    model = _model(proxy)

    def node(state: State) -> dict[str, Any]:
        return {"answers": [model.invoke(word).content for word in ("one", "two")]}

    wrap(_chain(("a", node)), proxy=proxy.root).invoke(_given())
    _one_run(proxy)
    one, two = (call.span for call in proxy.calls)
    assert one == two


@pytest.mark.parametrize("how", ["batch", "abatch", "batch_as_completed", "abatch_as_completed"])
def test_each_member_of_a_batch_is_a_run(proxy: Any, how: str) -> None:
    graph = wrap(_chain(("a", _asking(_model(proxy))), ("b", _asking(_model(proxy)))), proxy=proxy.root)
    given = [_given(f"q{i}") for i in range(4)]

    async def abatch_as_completed() -> Any:
        return dict([pair async for pair in graph.abatch_as_completed(given)])

    if how == "batch":
        results = graph.batch(given)
    elif how == "abatch":
        results = asyncio.run(graph.abatch(given))
    else:
        done = (
            dict(graph.batch_as_completed(given)) if how == "batch_as_completed" else asyncio.run(abatch_as_completed())
        )
        results = [done[i] for i in range(4)]
    assert [result["answers"] for result in results] == [[f"echo: q{i}"] * 2 for i in range(4)]
    assert [run["status"] for run in proxy.runs.values()] == ["closed"] * 4
    by_run = {run_id: [c for c in proxy.calls if c.run_id == run_id] for run_id in proxy.runs}
    assert sorted({call.said for call in calls}.pop() for calls in by_run.values()) == ["q0", "q1", "q2", "q3"]
    assert all([c.role for c in calls] == ["a", "b"] and len({c.said for c in calls}) == 1 for calls in by_run.values())


def _content(chunk: Any) -> Any:
    """A chunk without the ids that differ from run to run."""
    if isinstance(chunk, tuple):
        return tuple(_content(part) for part in chunk)
    if isinstance(chunk, dict):
        return {
            key: value for key, value in chunk.items() if key in ("question", "answers", "a", "b", "langgraph_node")
        }
    return getattr(chunk, "content", chunk)


@pytest.mark.parametrize("mode", ["values", "updates", "messages", ["values", "messages"]])
def test_streams_give_the_bare_graphs_chunks_outside_of_the_scope(proxy: Any, mode: Any) -> None:
    graph = _chain(("a", _asking(_model(proxy))), ("b", _asking(_model(proxy))))
    bare = [_content(chunk) for chunk in graph.stream(_given(), stream_mode=mode)]
    proxy.calls.clear()
    scopes, wrapped = [], []
    for chunk in wrap(graph, proxy=proxy.root).stream(_given(), stream_mode=mode):
        scopes.append(current_scope())
        wrapped.append(_content(chunk))
    assert len(bare) >= 2
    assert wrapped == bare
    assert set(scopes) == {None}
    _one_run(proxy)
    assert _roles(proxy) == ["a", "b"]


@pytest.mark.parametrize("mode", ["values", "messages"])
def test_async_streams_keep_the_scope_from_their_consumer(proxy: Any, mode: Any) -> None:
    graph = wrap(_chain(("a", _aasking(_model(proxy))), ("b", _aasking(_model(proxy)))), proxy=proxy.root)
    model = _model(proxy)

    async def main() -> list[Any]:
        scopes: list[Any] = []
        async for _ in graph.astream(_given(), stream_mode=mode):
            scopes.append(current_scope())
            if len(scopes) == 1:
                await model.ainvoke("the consumer's own")
        return scopes

    assert set(asyncio.run(main())) == {None}
    own = [call for call in proxy.calls if call.said == "the consumer's own"]
    assert [(call.run_id, call.role) for call in own] == [(None, None)]
    proxy.calls.remove(own[0])
    _one_run(proxy)
    assert _roles(proxy) == ["a", "b"]


def test_event_streams(proxy: Any) -> None:
    graph = wrap(_chain(("a", _aasking(_model(proxy)))), proxy=proxy.root)

    async def main() -> list[str]:
        return [event["event"] async for event in graph.astream_events(_given(), version="v2")]

    assert "on_chat_model_stream" in asyncio.run(main())
    _one_run(proxy)
    assert _roles(proxy) == ["a"]


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_event_streams_of_version_3(proxy: Any) -> None:
    graph = wrap(_chain(("a", _asking(_model(proxy)))), proxy=proxy.root)
    (said,) = graph.stream_events(_given(), version="v3").output["answers"]
    assert "echo: why" in str(said)
    _one_run(proxy)


def test_a_model_that_streams_inside_a_node(proxy: Any) -> None:
    model = _model(proxy)

    def node(state: State) -> dict[str, Any]:
        return {"answers": ["".join(str(chunk.content) for chunk in model.stream(state["question"]))]}

    assert wrap(_chain(("a", node)), proxy=proxy.root).invoke(_given())["answers"] == ["echo: why "]
    _one_run(proxy)
    assert _roles(proxy) == ["a"] and proxy.calls[0].body["stream"] is True


def test_lcel_and_its_batch_inside_a_node(proxy: Any) -> None:
    chain = ChatPromptTemplate.from_template("{q}") | _model(proxy) | StrOutputParser()

    def node(state: State) -> dict[str, Any]:
        return {"answers": chain.batch([{"q": "one"}, {"q": "two"}])}

    wrap(_chain(("a", node)), proxy=proxy.root).invoke(_given())
    _one_run(proxy)
    assert _roles(proxy) == ["a", "a"]
    assert proxy.calls[0].span == proxy.calls[1].span


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream"])
def test_a_chain_that_is_itself_a_node(proxy: Any, how: str) -> None:
    """LangGraph sets the context for the first step of such a node only; the model is a later one."""

    def chain(prefix: str) -> Any:
        prompt = ChatPromptTemplate.from_template(prefix + "{question}")
        return prompt | _model(proxy) | StrOutputParser() | (lambda text: {"answers": [text]})

    builder = StateGraph(State)
    for name in ("left", "right"):
        builder.add_node(name, chain(f"{name} "))
        builder.add_edge(START, name)
    builder.add_node("last", chain("last "))
    builder.add_edge(["left", "right"], "last")
    graph = wrap(builder.compile(), proxy=proxy.root)

    async def collect() -> None:
        async for _ in graph.astream(_given(), stream_mode="messages"):
            pass

    if how == "invoke":
        graph.invoke(_given())
    elif how == "ainvoke":
        asyncio.run(graph.ainvoke(_given()))
    elif how == "stream":
        list(graph.stream(_given(), stream_mode="messages"))
    else:
        asyncio.run(collect())
    _one_run(proxy)
    asked = {call.role: call.body["messages"][-1]["content"] for call in proxy.calls}
    assert asked == {"left": "left why", "right": "right why", "last": "last why"}
    assert len({call.span["span_id"] for call in proxy.calls}) == 3
    assert current_scope() is None


def test_a_note_of_a_chain_does_not_outlive_its_model(proxy: Any) -> None:
    chain = ChatPromptTemplate.from_template("{question}") | _model(proxy)
    wrap(_chain(("chain", chain | (lambda reply: {"answers": [reply.text]}))), proxy=proxy.root).invoke(_given())
    _model(proxy).invoke("outside")
    assert _roles(proxy) == ["chain", None]


@pytest.mark.parametrize("is_async", [False, True])
def test_the_raw_sdk_inside_a_node(proxy: Any, is_async: bool) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]

    def node(state: State) -> dict[str, Any]:
        client = openai.OpenAI(base_url=proxy.v1, api_key="x")
        return {"answers": [client.chat.completions.create(model="m", messages=messages).choices[0].message.content]}

    async def anode(state: State) -> dict[str, Any]:
        async with openai.AsyncOpenAI(base_url=proxy.v1, api_key="x") as client:
            answer = await client.chat.completions.create(model="m", messages=messages)
        return {"answers": [answer.choices[0].message.content]}

    graph = wrap(_chain(("sdk", anode if is_async else node)), proxy=proxy.root)
    assert (asyncio.run(graph.ainvoke(_given())) if is_async else graph.invoke(_given()))["answers"] == ["echo: hi"]
    _one_run(proxy)
    assert _roles(proxy) == ["sdk"]


def test_raw_httpx_inside_a_node(proxy: Any) -> None:
    def node(state: State) -> dict[str, Any]:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(proxy.v1 + "/chat/completions", json=body).json()
        return {"answers": [answer["choices"][0]["message"]["content"]]}

    wrap(_chain(("raw", node)), proxy=proxy.root).invoke(_given())
    _one_run(proxy)
    assert _roles(proxy) == ["raw"]


def test_subgraphs_belong_to_the_outer_nodes_role_and_name_their_parent(proxy: Any) -> None:
    inner = _chain(("draft", _asking(_model(proxy))), ("polish", _asking(_model(proxy))))

    def twice(state: State) -> dict[str, Any]:
        return {"answers": inner.invoke(state)["answers"] + inner.invoke(state)["answers"]}

    graph = _chain(("writer", inner), ("caller", twice), ("direct", _asking(_model(proxy))))
    wrap(graph, proxy=proxy.root).invoke(_given())
    _one_run(proxy)
    assert _roles(proxy) == ["writer"] * 2 + ["caller"] * 4 + ["direct"]
    spans = [call.span for call in proxy.calls]
    assert [span["name"] for span in spans] == ["draft", "polish"] * 3 + ["direct"]
    assert len({span["span_id"] for span in spans}) == 7
    parents = [span["parent_span_id"] for span in spans]
    assert parents[0] == parents[1] and len(set(parents[2:6])) == 1
    assert len({parents[0], parents[2], parents[6]}) == 3 and parents[6] is None


@pytest.mark.parametrize("asking", [_asking, _aasking], ids=["sync", "async"])
def test_send_gives_parallel_branches_spans_of_their_own_in_one_superstep(proxy: Any, asking: Any) -> None:
    builder = StateGraph(State)
    builder.add_node("plan", asking(_model(proxy))).add_node("work", asking(_model(proxy)))
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", lambda state: [Send("work", _given(f"q{i}")) for i in range(3)], ["work"])
    result = asyncio.run(wrap(builder.compile(), proxy=proxy.root).ainvoke(_given()))
    assert result["answers"] == ["echo: why", "echo: q0", "echo: q1", "echo: q2"]
    _one_run(proxy)
    assert sorted(map(str, _roles(proxy))) == ["plan", "work", "work", "work"]
    spans = [call.span for call in proxy.calls if call.role == "work"]
    assert {span["superstep"] for span in spans} == {2}
    assert len({span["span_id"] for span in spans}) == 3


def test_a_call_inside_a_tool_node(proxy: Any) -> None:
    model = _model(proxy)

    @tool
    def search(question: str) -> str:
        """Search."""
        return str(model.invoke("inside the tool").content)

    def ask(state: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [model.bind_tools([search]).invoke("use it")]}

    from langgraph.graph import MessagesState

    builder = StateGraph(MessagesState)
    builder.add_node("ask", ask).add_node("search", ToolNode([search]))
    builder.add_edge(START, "ask").add_edge("ask", "search")
    result = wrap(builder.compile(), proxy=proxy.root).invoke({"messages": []})
    assert result["messages"][-1].content == "echo: inside the tool"
    _one_run(proxy)
    assert _roles(proxy) == ["ask", "search"]


def test_agents_are_roles_by_name_also_as_tools_of_each_other(proxy: Any) -> None:
    expert = create_agent(_model(proxy), name="expert")

    @tool
    def consult(question: str) -> str:
        """Ask the expert."""
        return str(expert.invoke({"messages": [("user", question)]})["messages"][-1].content)

    boss = create_agent(_model(proxy), [consult], name="boss")
    result = wrap(boss, proxy=proxy.root).invoke({"messages": [("user", "go")]})
    assert result["messages"][-1].content == "echo: echo: why"
    _one_run(proxy)
    assert _roles(proxy) == ["boss", "expert", "boss"]
    assert [call.span["superstep"] for call in proxy.calls] == [1, 1, 3]


def test_the_functional_api(proxy: Any) -> None:
    model = _model(proxy)

    @task
    def ask(question: str) -> str:
        return str(model.invoke(question).content)

    @entrypoint()
    def workflow(question: str) -> list[str]:
        return [future.result() for future in [ask(question + "1"), ask(question + "2")]]

    assert wrap(workflow, proxy=proxy.root).invoke("q") == ["echo: q1", "echo: q2"]
    _one_run(proxy)
    assert _roles(proxy) == ["workflow", "workflow"]
    assert [call.span["name"] for call in proxy.calls] == ["ask", "ask"]


def test_concurrent_runs_in_threads_do_not_mix(proxy: Any) -> None:
    gate = threading.Barrier(4)
    model = _model(proxy)

    def meet(state: State) -> dict[str, Any]:
        gate.wait(timeout=20)
        return {"answers": [model.invoke(state["question"]).content]}

    graph = wrap(_chain(("a", meet), ("b", meet)), proxy=proxy.root)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(graph.invoke, [_given(f"q{i}") for i in range(4)]))
    _not_mixed(proxy)


def test_concurrent_runs_in_asyncio_do_not_mix(proxy: Any) -> None:
    gate = asyncio.Barrier(4)
    model = _model(proxy)

    async def meet(state: State) -> dict[str, Any]:
        await asyncio.wait_for(gate.wait(), 20)
        return {"answers": [(await model.ainvoke(state["question"])).content]}

    graph = wrap(_chain(("a", meet), ("b", meet)), proxy=proxy.root)

    async def main() -> None:
        await asyncio.gather(*(graph.ainvoke(_given(f"q{i}")) for i in range(4)))

    asyncio.run(main())
    _not_mixed(proxy)


def test_streams_that_are_driven_in_turn_do_not_mix(proxy: Any) -> None:
    graph = wrap(_chain(("a", _asking(_model(proxy))), ("b", _asking(_model(proxy)))), proxy=proxy.root)
    streams = [graph.stream(_given(f"q{i}")) for i in range(4)]
    for chunks in zip(*streams, strict=True):
        assert len(chunks) == 4
    _not_mixed(proxy)


def _not_mixed(proxy: Any) -> None:
    assert len(proxy.runs) == 4
    assert {run["status"] for run in proxy.runs.values()} == {"closed"}
    pairs = sorted({(call.said, call.run_id) for call in proxy.calls})
    assert [said for said, _ in pairs] == ["q0", "q1", "q2", "q3"]
    assert len({run_id for _, run_id in pairs}) == 4
    assert len(proxy.calls) == 8


def test_a_graph_with_a_checkpointer_keeps_its_thread(proxy: Any) -> None:
    graph = wrap(_chain(("a", _asking(_model(proxy))), checkpointer=InMemorySaver()), proxy=proxy.root)
    config: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke(_given("q0"), config)
    assert graph.invoke(_given("q1"), config)["answers"] == ["echo: q0", "echo: q1"]
    assert graph.get_state(config).values["question"] == "q1"
    assert len(proxy.runs) == 2


def test_a_proxy_that_the_model_does_not_use_sees_runs_and_no_calls(proxy: Any, elsewhere: Any) -> None:
    wrap(_chain(("a", _asking(_model(elsewhere)))), proxy=proxy.root).invoke(_given())
    assert proxy.only_run()["status"] == "closed"
    assert not [name for name in elsewhere.calls[0].headers if name.startswith("x-tracegrad")]
