"""Four published LangGraph packages, unmodified, end to end: the right roles, edges and tool spans.

Each program is started by `tracegrad run` (the hook) or with nothing but LangSmith's environment variables, and talks
to a real proxy on a real store. The engine is the fake: what the agents decide must be the same each time.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_sampling
import fake_vllm
import pytest
import yaml

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.records import RunTrace
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.run_graph import run_graph

PUBLISHED = Path(__file__).resolve().parents[1] / "support" / "published"
HOW = ("hook", "langsmith")


def call(name: str, **arguments: Any) -> str:
    return f"{fake_sampling.OPEN}\n{json.dumps({'name': name, 'arguments': arguments})}\n{fake_sampling.CLOSE}"


def decided(body: dict[str, Any], choice: int) -> str:
    """What each agent says: it knows itself by its prompt, and where it stands by what tools have answered."""
    messages = body["messages"]
    said = [fake_sampling.message_text(message) for message in messages]
    prompt, tools = said[0], [message for message in messages if message["role"] == "tool"]
    if "CLERK" in prompt:
        return "2 million live there" if tools else call("population", city="Paris")
    if "SUPERVISOR" in prompt:
        return "it is 7" if tools else call("transfer_to_adder")
    if "ADDER" in prompt:
        return (
            "7"
            if any("add" in (message.get("name") or "") for message in tools) or "7" in said
            else call("add", a=3, b=4)
        )
    if "LEAD" in prompt:
        return "tea is older" if tools else call("TaskCreate", subject="age", description="find out which is older")
    if "RESEARCHER" in prompt:
        return "tea, by far"
    return str(fake_sampling.script(body, choice))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    yield store
    store.close()


@pytest.fixture
def proxy_url(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(fake_vllm, "script", decided)
    with fake_vllm.ServerThread(fake_vllm.FakeEngine("main")) as engine:
        served = {"checkpoint": "none", "engine": {"url": engine.url}}
        config = parse_config({"store": store.url, "models": {"main": served}, "roles": {"*": "main"}})
        with fake_vllm.ServerThread(ProxyApp(config, store)) as proxy:
            yield str(proxy.url)


@pytest.fixture
def run(proxy_url: str, store: Store, tmp_path: Path) -> Any:
    def start(how: str, program: str) -> tuple[str, RunTrace]:
        """Run a program to its end; return what it printed and the run of its graph."""
        command = [sys.executable, str(PUBLISHED / program)]
        env = {**os.environ, "OPENAI_API_KEY": "x", "HOME": str(tmp_path), "OPENAI_BASE_URL": f"{proxy_url}/v1"}
        if how == "hook":
            config = tmp_path / "tracegrad.yaml"
            config.write_text(yaml.safe_dump({"store": store.url, "proxy": {"port": int(proxy_url.rsplit(":", 1)[1])}}))
            command = [sys.executable, "-m", "tracegrad.adapters.cli", "run", "--config", str(config), "--", *command]
        else:
            endpoint = f"{proxy_url}/langsmith"
            env |= {"LANGSMITH_TRACING": "true", "LANGSMITH_ENDPOINT": endpoint, "LANGSMITH_API_KEY": "x"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        # What a program asks outside of its graph (rag7 looks at its documents first) is no part of the graph's run.
        listed = max(store.list_runs(limit=10), key=lambda summary: summary.n_calls)
        return done.stdout, store.trace(listed.run.run_id)

    return start


def names(trace: RunTrace) -> dict[str, str]:
    return {span.span_id: span.name for span in trace.spans}


def edge_names(trace: RunTrace) -> set[tuple[str, str]]:
    named = names(trace)
    return {(named[edge.source], named[edge.target]) for edge in edges(trace.spans)}


def check_chain(trace: RunTrace) -> None:
    """The calls follow one another, each on all before it: what the last one earns is credit of every call."""
    graph = run_graph(trace)
    place = graph.index()
    following = [graph.descendants[place[each.call_id]].bit_count() for each in trace.calls]
    assert following == list(range(len(trace.calls)))[::-1]


def check_whole(trace: RunTrace, how: str) -> None:
    """Every call is exact, in the run, of a role, under a span that is known, by the source that was there."""
    assert (trace.run.status, trace.run.error) == ("closed", None)
    for each in trace.calls:
        assert (each.status, each.quarantine) == ("complete", None)
        assert (each.attribution.run_source, each.attribution.role_source) == (how, how)
        assert each.attribution.span is not None
    assert not [
        span for span in trace.spans if span.parent_span_id is not None and span.parent_span_id not in names(trace)
    ]


@pytest.mark.parametrize("how", HOW)
def test_create_agent(run: Any, how: str) -> None:
    printed, trace = run(how, "clerk_app.py")
    assert printed.strip() == "2 million live there"
    check_whole(trace, how)
    assert [each.attribution.role for each in trace.calls] == ["clerk", "clerk"]
    check_chain(trace)
    assert {("model", "tools"), ("tools", "model")} <= edge_names(trace)
    (tool,) = [span for span in trace.spans if span.kind == "tool"]
    assert (tool.name, tool.input, tool.output) == ("population", {"city": "Paris"}, "Paris: 2 million")
    assert names(trace)[str(tool.parent_span_id)] == "tools"


@pytest.mark.parametrize("how", HOW)
def test_langgraph_supervisor(run: Any, how: str) -> None:
    printed, trace = run(how, "supervisor_app.py")
    assert printed.strip() == "it is 7"
    check_whole(trace, how)
    assert [each.attribution.role for each in trace.calls] == ["supervisor", "adder", "adder", "supervisor"]
    check_chain(trace)
    assert {("supervisor", "adder"), ("adder", "supervisor")} <= edge_names(trace)
    tools = {span.name: span for span in trace.spans if span.kind == "tool"}
    assert set(tools) == {"transfer_to_adder", "add"}
    assert (tools["add"].input, tools["add"].output) == ({"a": 3, "b": 4}, "7")


@pytest.mark.parametrize("how", HOW)
def test_rag7(run: Any, how: str) -> None:
    _, trace = run(how, "rag_app.py")
    check_whole(trace, how)
    roles = {str(each.attribution.role) for each in trace.calls}
    assert "generate" in roles
    assert roles <= {span.name for span in trace.spans if span.kind == "node"}
    assert ("generate", "final_grade") in edge_names(trace)


@pytest.mark.parametrize("how", HOW)
def test_langgraph_agent_teams(run: Any, how: str) -> None:
    printed, trace = run(how, "teams_app.py")
    assert "tea is older" in printed
    check_whole(trace, how)
    roles = Counter(each.attribution.role for each in trace.calls)
    assert set(roles) == {"team-lead", "researcher"}
    assert "TaskCreate" in {span.name for span in trace.spans if span.kind == "tool"}
