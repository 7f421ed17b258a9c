"""Whose calls a posted tree may speak of, and what the role rules make of its names."""

import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypedDict

import langsmith
import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langsmith.run_helpers import tracing_context
from langsmith_trees import TRACE, form, tree

from tracegrad.adapters.fingerprint import fingerprint_of
from tracegrad.adapters.langgraph import wrap
from tracegrad.tracestore.records import Attribution
from tracegrad.tracestore.store import Store

CHAT = "/v1/chat/completions"
ASK = {
    "model": "alias",
    "messages": [{"role": "system", "content": "You write."}, {"role": "user", "content": "hello"}],
}
FORM = {"content-type": "multipart/form-data; boundary=B"}


def call(proxy: SimpleNamespace, path: str = "", **headers: str) -> tuple[str, str]:
    """Make a call; return its id and its completion's."""
    answer = proxy.client.post(path + CHAT, json=ASK, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-tracegrad-call"], answer.json()["id"]


def post(proxy: SimpleNamespace, runs: list[dict[str, Any]], **headers: str) -> None:
    answer = proxy.client.post("/langsmith/runs/multipart", content=form(runs), headers={**FORM, **headers})
    assert answer.status_code == 202, answer.text


def who(store: Store, call_id: str) -> tuple[str | None, str | None]:
    found = store.get_call(call_id).attribution
    return found.role, found.role_source


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"node": "writer"}, ("ruled", "rule")),
        ({"agent": "writer"}, ("ruled", "rule")),
        ({"agent": "writer", "model": "alias"}, ("ruled", "rule")),
        ({"node": "writer", "fingerprint": fingerprint_of(ASK)}, ("ruled", "rule")),
        ({"node": "writer", "model": "another"}, ("writer", "langsmith")),
        ({"node": "writer", "header": {"x-app": "shop"}}, ("writer", "langsmith")),  # headers are not stored
        ({"node": "reader"}, ("writer", "langsmith")),
    ],
)
def test_a_trees_names_pass_through_the_rules(
    start_proxy: Callable[..., SimpleNamespace], store: Store, rule: dict[str, Any], expected: Any
) -> None:
    proxy = start_proxy(role_rules=[{"role": "ruled", **rule}])
    call_id, completion_id = call(proxy)
    for _ in range(2):  # told again it is the same
        post(proxy, tree(completion_id))
        assert who(store, call_id) == expected
    assert store.get_call(call_id).attribution.run_source == "langsmith"
    assert store.attribution_conflicts() == []


def test_a_role_that_was_said_asks_no_rule_and_one_that_a_rule_gave_stays(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    proxy = start_proxy(role_rules=[{"role": "aliased", "model": "alias"}, {"role": "ruled", "node": "writer"}])
    said, completion_id = call(proxy, "/role/said")
    post(proxy, tree(completion_id))
    assert who(store, said) == ("said", "path")
    assert [(c.kept, c.said, c.said_source) for c in store.attribution_conflicts()] == [("said", "writer", "langsmith")]
    ruled, completion_id = call(proxy)
    post(proxy, tree(completion_id))
    assert who(store, ruled) == ("aliased", "rule")
    assert len(store.attribution_conflicts()) == 1, "a rule replaces a name: that is no disagreement"


def test_a_rule_holds_for_a_call_that_comes_after_its_tree(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    """What the tree knows of it decides: the model's name, as LangChain was told it."""
    proxy = start_proxy(role_rules=[{"role": "ruled", "node": "writer", "model": "alias"}])
    runs = tree("chatcmpl-early")
    runs[2]["extra"] = {"metadata": {**runs[2]["extra"]["metadata"], "ls_model_name": "alias"}}
    post(proxy, runs)
    call_id, _ = call(proxy, **{"x-request-id": "early"})
    store.resolve_attributions()
    assert who(store, call_id) == ("ruled", "rule")
    assert store.get_call(call_id).attribution.run_id == TRACE


class State(TypedDict):
    text: str


def test_hook_and_tree_agree_on_what_a_rule_decides(start_proxy: Callable[..., SimpleNamespace], store: Store) -> None:
    """A real graph under the real LangSmith client: with tracing alone, and with the hook as well."""
    proxy = start_proxy(role_rules=[{"role": "author", "node": "writer"}])
    model = ChatOpenAI(model="main", base_url=proxy.url + "/v1", api_key="x")
    inner = StateGraph(State).add_node("draft", lambda s: {"text": model.invoke(s["text"]).text})
    inner.add_edge(START, "draft")
    graph = StateGraph(State).add_node("writer", inner.compile()).add_edge(START, "writer").compile()
    client = langsmith.Client(api_url=proxy.url + "/langsmith", api_key="x")
    trace_id = uuid.uuid4()
    with tracing_context(enabled=True, client=client):
        graph.invoke({"text": "traced"}, {"run_id": trace_id})
        wrap(graph, proxy=proxy.url).invoke({"text": "hooked"})
    client.flush()
    client.cleanup()
    runs = [summary.run.run_id for summary in store.list_runs()]
    assert len(runs) == 2 and str(trace_id) in runs
    for trace in store.traces(runs):
        assert [(c.attribution.role, c.attribution.role_source) for c in trace.calls] == [("author", "rule")]
    assert store.attribution_conflicts() == []


def test_a_tree_says_nothing_of_another_projects_calls(
    start_proxy: Callable[..., SimpleNamespace], store: Store
) -> None:
    """Neither run, role nor conflict; by completion id or by ours; before the call or after it."""
    proxy = start_proxy(proxy={"access": {"keys": "on"}}, role_rules=[{"role": "ruled", "node": "writer"}])
    ours, theirs = (
        {"authorization": f"Bearer {store.create_key(scopes=('call',), project=project)[0]}"}
        for project in ("ours", "theirs")
    )
    loose, completion_id = call(proxy, **ours)
    placed, placed_completion = call(proxy, "/run/r/role/a", **ours)
    runs = tree(completion_id)
    runs[2]["outputs"] = {"llm_output": {"id": completion_id, "system_fingerprint": placed}}
    runs.append({**runs[2], "id": str(uuid.UUID(int=9)), "outputs": {"llm_output": {"id": placed_completion}}})
    runs.append({**runs[2], "id": str(uuid.UUID(int=10)), "outputs": {"llm_output": {"id": "chatcmpl-later"}}})
    post(proxy, runs, **theirs)
    later, _ = call(proxy, **ours, **{"x-request-id": "later"})
    assert store.resolve_attributions() == 0
    assert {store.get_call(call_id).attribution for call_id in (loose, later)} == {Attribution()}
    assert store.get_call(placed).attribution.run_id == "r"
    assert store.attribution_conflicts() == []
    assert (store.get_run(TRACE).project, store.trace(TRACE).calls) == ("theirs", ())
    assert proxy.client.get("/health").status_code == 200
    own, completion_id = call(proxy, **theirs)
    runs = tree(completion_id)
    post(proxy, runs, **theirs)
    assert store.get_call(own).attribution.run_id == TRACE
