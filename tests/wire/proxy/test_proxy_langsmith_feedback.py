"""Feedback that the real LangSmith client gives becomes rewards, each on what it is about."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypedDict

import langsmith
import pytest
from away_store import AwayStore
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langsmith.run_helpers import tracing_context
from langsmith.utils import LangSmithConflictError, LangSmithError, LangSmithNotFoundError
from langsmith_trees import MODEL, NODE, TRACE, form, tree

from tracegrad.adapters.langgraph import wrap
from tracegrad.adapters.proxy import langsmith_feedback
from tracegrad.adapters.proxy.langsmith_wire import read_feedback
from tracegrad.tracestore.store import Store

ASK = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}
FORM = {"content-type": "multipart/form-data; boundary=B"}
pytestmark = pytest.mark.filterwarnings("ignore::langsmith.utils.LangSmithWarning")


class State(TypedDict):
    text: str


@contextmanager
def client_of(proxy: SimpleNamespace, key: str = "x") -> Iterator[langsmith.Client]:
    client = langsmith.Client(api_url=proxy.url + "/langsmith", api_key=key)
    yield client
    client.cleanup()


def graph_of(proxy: SimpleNamespace) -> Any:
    """Node `one` is a graph that makes a call, node `two` makes two."""
    model = ChatOpenAI(model="main", base_url=proxy.url + "/v1", api_key="x", max_retries=0)
    inner = StateGraph(State).add_node("inside", lambda state: {"text": model.invoke(state["text"]).text})
    builder = StateGraph(State).add_node("one", inner.add_edge(START, "inside").compile(name="inner"))
    builder.add_node("two", lambda state: {"text": model.invoke("a").text + model.invoke("b").text})
    return builder.add_edge(START, "one").add_edge("one", "two").compile()


class Seen(langsmith.Client):
    """A client that remembers the runs it tells of."""

    def create_run(self, name: str, *args: Any, **more: Any) -> None:
        self.__dict__.setdefault("told", []).append((name, more.get("id"), more.get("run_type") or args[1]))
        super().create_run(name, *args, **more)

    def ids(self, name: str) -> list[uuid.UUID]:
        return [run_id for told, run_id, _ in self.__dict__["told"] if told == name]


def on(rewards: Any) -> set[tuple[str, float, str | None]]:
    return {(reward.name, reward.value, reward.call_id) for reward in rewards}


def test_the_real_client_gives_feedback_on_a_trace_a_model_run_and_a_node(proxy: SimpleNamespace, store: Store) -> None:
    client, trace_id = Seen(api_url=proxy.url + "/langsmith", api_key="x"), uuid.uuid4()
    with tracing_context(enabled=True, client=client):
        graph_of(proxy).invoke({"text": "go"}, {"run_id": trace_id})
    client.flush()
    first, second, third = store.trace(str(trace_id)).calls
    models = client.ids("ChatOpenAI")
    client.create_feedback(trace_id, "helpful", score=0.25, comment="so so")
    client.create_feedback(models[1], "style", score=True, trace_id=trace_id)
    for number, name in enumerate(("one", "inner", "inside")):
        client.create_feedback(client.ids(name)[0], f"relevant {number}", score=2)
    client.create_feedback(trace_id, "remark", value="a comment, and no score")
    trace = store.trace(str(trace_id))
    assert on(trace.rewards) == {
        ("helpful", 0.25, None), ("style", 1.0, second.call_id),
        *((f"relevant {number}", 2.0, first.call_id) for number in range(3)),
    }  # fmt: skip
    assert {(reward.source, reward.role) for reward in trace.rewards} == {("langsmith", None)}
    with pytest.raises(LangSmithError, match="2 calls were made in"):
        client.create_feedback(client.ids("two")[0], "relevant", score=1)
    assert store.trace(str(trace_id)).rewards == trace.rewards
    assert third.call_id not in {reward.call_id for reward in trace.rewards}
    client.cleanup()


def test_feedback_is_appended_and_a_changed_score_counts(proxy: SimpleNamespace, store: Store) -> None:
    assert post(proxy, tree(call(proxy))).status_code == 202
    feedback_id = uuid.uuid4()
    with client_of(proxy) as client:
        for _ in range(2):  # sent again it is the same
            client.create_feedback(TRACE, "helpful", score=0.5, feedback_id=feedback_id)
        with pytest.raises(LangSmithConflictError, match="append-only"):
            client.create_feedback(TRACE, "helpful", score=0.75, feedback_id=feedback_id)
        for score in (1.0, 0.5, 1.0):
            client.update_feedback(feedback_id, score=score)
            assert on(store.trace(TRACE).rewards) == {("helpful", score, None)}
        client.update_feedback(feedback_id, comment="nothing but words")
        with pytest.raises(LangSmithNotFoundError):
            client.update_feedback(uuid.uuid4(), score=1)
    with store._db.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM rewards").scalar() == 4
    assert on(store.trace(TRACE).rewards) == {("helpful", 1.0, None)}


def test_feedback_that_comes_before_its_tree_is_sent_again_by_the_client(
    proxy: SimpleNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            assert post(proxy, tree()).status_code == 202

    monkeypatch.setattr("langsmith.client.time.sleep", sleep)
    with client_of(proxy) as client:
        client.create_feedback(TRACE, "helpful", score=1)
    assert len(slept) == 2 and on(store.trace(TRACE).rewards) == {("helpful", 1.0, None)}


def test_with_the_hook_feedback_reaches_the_hooks_run(proxy: SimpleNamespace, store: Store) -> None:
    """Two graphs under one traced function are two runs: each graph's run of LangSmith means one of them."""
    client = Seen(api_url=proxy.url + "/langsmith", api_key="x")
    graph, outer = wrap(graph_of(proxy), proxy=proxy.url), uuid.uuid4()

    @langsmith.traceable
    def both() -> None:
        graph.invoke({"text": "1"})
        graph.invoke({"text": "2"})

    with tracing_context(enabled=True, client=client):
        both(langsmith_extra={"run_id": outer})
    client.flush()
    for score, graph_id in enumerate(client.ids("LangGraph")):
        client.create_feedback(graph_id, "helpful", score=score)
    newest_first = [on(store.trace(found.run.run_id).rewards) for found in store.list_runs()]
    assert newest_first == [{("helpful", 1.0, None)}, {("helpful", 0.0, None)}]
    with pytest.raises(LangSmithError, match="is several runs"):
        client.create_feedback(outer, "helpful", score=1)
    client.cleanup()


def test_a_key_without_the_scope_and_another_projects_key_give_nothing(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    proxy = start_proxy(proxy={"access": {"keys": "on"}})
    keys = {
        name: store.create_key(scopes=scopes, project=project)[0]
        for name, scopes, project in (
            ("caller", ("call",), "ours"),
            ("judge", ("call", "reward"), "ours"),
            ("theirs", ("call", "reward"), "theirs"),
        )
    }
    completion_id = call(proxy, authorization=f"Bearer {keys['caller']}")
    assert post(proxy, tree(completion_id), **{"x-api-key": keys["caller"]}).status_code == 202
    asked = {"id": str(uuid.uuid4()), "run_id": TRACE, "key": "helpful", "score": 1}
    for name, status in (("caller", 403), ("theirs", 404), ("judge", 202)):
        answer = proxy.client.post("/langsmith/feedback", json=asked, headers={"x-api-key": keys[name]})
        assert answer.status_code == status, answer.text
    assert proxy.client.post("/langsmith/feedback", json=asked).status_code == 401
    path = f"/langsmith/feedback/{asked['id']}"
    for name, status in (("caller", 403), ("theirs", 404), ("judge", 202)):
        answer = proxy.client.patch(path, json={"score": 0.5}, headers={"x-api-key": keys[name]})
        assert answer.status_code == status, answer.text
    assert on(store.trace(TRACE).rewards) == {("helpful", 0.5, None)}
    beside = with_feedback([tree()[0]], score=0)
    assert post(proxy, beside, **{"x-api-key": keys["caller"]}).status_code == 403
    assert on(store.trace(TRACE).rewards) == {("helpful", 0.5, None)}
    with client_of(proxy, keys["judge"]) as client:
        client.create_feedback(MODEL, "style", score=0.75)
    (found,) = store.trace(TRACE).calls
    assert ("style", 0.75, found.call_id) in on(store.trace(TRACE).rewards)


def test_feedback_in_a_form_waits_for_the_runs_it_is_about(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the client sends it to servers of newer versions: serialised by the client itself."""
    proxy = start_proxy()
    assert post(proxy, with_feedback(tree(ended=False)[:1], score=0.5)).status_code == 202
    assert store.list_runs() == []
    assert post(proxy, with_feedback(tree(), score=None, about=NODE)).status_code == 202
    waiting = proxy.app.langsmith._feedback
    waiting.try_again()
    assert on(store.trace(TRACE).rewards) == {("helpful", 0.5, None)} and waiting._waiting == []
    nobody = str(uuid.uuid4())
    assert post(proxy, with_feedback([], score=1, about=nobody)).status_code == 202
    assert len(waiting._waiting) == 1
    monkeypatch.setattr(langsmith_feedback, "WAIT_S", -1.0)
    waiting.try_again()
    assert waiting._waiting == []


def test_a_store_that_is_away_loses_no_feedback(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    away = AwayStore(store, "add_rewards")
    proxy = start_proxy(store_object=away)
    assert post(proxy, with_feedback(tree(), score=0.5)).status_code == 503
    away.away = False
    proxy.app.langsmith._feedback.try_again()
    assert on(store.trace(TRACE).rewards) == {("helpful", 0.5, None)}


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({"score": "good"}, 400, "must be a number"),
        ({"score": [1]}, 400, "must be a number"),
        ({"score": 10**400}, 400, ""),
        ({"key": ""}, 400, "must be a word"),
        ({"id": "no-uuid"}, 400, "cannot be read"),
        ({"run_id": None, "session_id": str(uuid.uuid4())}, 400, "on no run"),
        ({"run_id": str(uuid.uuid4())}, 404, "has told of the run"),
        ({"run_id": str(uuid.UUID(int=20))}, 400, "belongs to no run"),
        ({"run_id": str(uuid.UUID(int=4))}, 400, "is no node, tool, graph or model"),
        ({"run_id": NODE}, 202, ""),
        ({"run_id": NODE, "score": None}, 202, ""),
    ],
)
def test_what_can_be_no_reward(
    proxy: SimpleNamespace, store: Store, changed: dict[str, Any], status: int, says: str
) -> None:
    runs = tree(call(proxy))
    step = {**runs[1], "id": str(uuid.UUID(int=4)), "name": "RunnableSequence", "tags": []}
    assert post(proxy, [*runs, {**step, "parent_run_id": NODE}]).status_code == 202
    alone = {**runs[2], "id": str(uuid.UUID(int=20)), "trace_id": str(uuid.UUID(int=20)), "parent_run_id": None}
    alone |= {"dotted_order": f"20261122T182117036547Z{uuid.UUID(int=20)}", "extra": {}}
    assert post(proxy, [{**alone, "outputs": {"llm_output": {"id": call(proxy)}}}]).status_code == 202
    asked = {"id": str(uuid.uuid4()), "run_id": TRACE, "key": "helpful", "score": 1, **changed}
    answer = proxy.client.post("/langsmith/feedback", content=json.dumps(asked))
    assert answer.status_code == status and says in answer.text, answer.text
    given = status == 202 and asked["score"] is not None
    assert len(store.trace(TRACE).rewards) == given
    assert (answer.json().get("reward_id") is not None) == given


def test_a_models_run_alone_is_rewarded_in_the_run_that_its_call_has(proxy: SimpleNamespace, store: Store) -> None:
    client = Seen(api_url=proxy.url + "/langsmith", api_key="x")
    model = ChatOpenAI(model="main", base_url=proxy.url + "/run/mine/v1", api_key="x")
    with tracing_context(enabled=True, client=client):
        model.invoke("alone")
    client.flush()
    client.create_feedback(client.ids("ChatOpenAI")[0], "helpful", score=1)
    (found,) = store.trace("mine").calls
    assert on(store.trace("mine").rewards) == {("helpful", 1.0, found.call_id)}
    client.cleanup()


def test_false_is_nought_and_nothing_is_nothing() -> None:
    asked: dict[str, Any] = {"id": str(uuid.uuid4()), "trace_id": TRACE, "key": "k"}
    scores = [read_feedback(json.dumps({**asked, "score": score}).encode()).score for score in (False, None, 0, 0.5)]
    assert scores == [0.0, None, 0.0, 0.5]
    assert read_feedback(json.dumps(asked).encode()).score is None


def call(proxy: SimpleNamespace, **headers: str) -> str:
    return str(proxy.client.post("/v1/chat/completions", json=ASK, headers=headers).json()["id"])


def post(proxy: SimpleNamespace, runs: list[dict[str, Any]] | bytes, **headers: str) -> Any:
    body = runs if isinstance(runs, bytes) else form(runs)
    return proxy.client.post("/langsmith/runs/multipart", content=body, headers={**FORM, **headers})


def with_feedback(runs: list[dict[str, Any]], *, score: float | None, about: str = TRACE) -> bytes:
    """A form with runs, and feedback as langsmith's own code serialises it."""
    from langsmith._internal._operations import (
        serialize_feedback_dict,
        serialized_feedback_operation_to_multipart_parts_and_context,
    )

    said = {"id": uuid.uuid4(), "run_id": uuid.UUID(about), "trace_id": uuid.UUID(TRACE), "key": "helpful"}
    operation = serialize_feedback_dict({**said, "score": score})
    ((name, (_, raw, _, _)),) = serialized_feedback_operation_to_multipart_parts_and_context(operation).parts
    part = b'--B\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + raw + b"\r\n"
    return part + form(runs)
