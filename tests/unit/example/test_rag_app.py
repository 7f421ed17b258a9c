"""The app as its user has it: two model calls and a search, over the OpenAI wire, sync and async, untouched by us."""

import ast
import asyncio
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "rag_qa"


class FakeOpenAI(ThreadingHTTPServer):
    """Speaks /v1/chat/completions: keywords for the rewriter's prompt, the capital for the answerer's."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append({**body, "path": self.path})  # type: ignore[attr-defined]
        text = " canada capital" if "keywords" in body["messages"][0]["content"] else "Ottawa\n"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        data = json.dumps({**answer, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def openai() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def graph(openai: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    corpus = {
        "Canada": {"title": "Canada", "extract": "Canada is a country. Its capital is Ottawa."},
        "Belize": {"title": "Belize", "extract": "Belize is a country of Central America."},
        "Boxing": {"title": "Boxing", "extract": "A sport of two people in a ring."},
    }
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    monkeypatch.setenv("RAG_QA_CORPUS", str(tmp_path / "corpus.json"))
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{openai.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    importlib.import_module("examples.rag_qa.search")._build_wikipedia.cache_clear()
    sys.modules.pop("examples.rag_qa.app", None)
    yield importlib.import_module("examples.rag_qa.app").graph
    importlib.import_module("examples.rag_qa.search")._build_wikipedia.cache_clear()
    sys.modules.pop("examples.rag_qa.app", None)


def test_the_whole_workflow_over_the_wire(graph: Any, openai: FakeOpenAI) -> None:
    result = graph.invoke({"question": "What is the capital of Canada?"})
    assert result["keywords"] == "canada capital"
    assert result["passages"] == "Canada: Canada is a country. Its capital is Ottawa."
    assert result["answer"] == "Ottawa"
    rewriter, answerer = openai.bodies
    assert [body["path"] for body in openai.bodies] == ["/v1/chat/completions"] * 2
    assert [body["temperature"] for body in openai.bodies] == [0, 0]
    assert (rewriter["max_completion_tokens"], answerer["max_completion_tokens"]) == (12, 20)
    assert rewriter["messages"][1]["content"] == "What is the capital of Canada?"
    assert answerer["messages"][1]["content"].startswith(result["passages"])


def test_the_async_interface_gives_the_same(graph: Any) -> None:
    question = {"question": "What is the capital of Canada?"}
    assert asyncio.run(graph.ainvoke(question)) == graph.invoke(question)


def test_the_nodes_are_the_roles(graph: Any) -> None:
    assert set(graph.get_graph().nodes) == {"__start__", "rewriter", "retrieve", "answerer", "__end__"}


@pytest.mark.parametrize("name", ["app.py", "search.py", "reward.py"])
def test_the_app_imports_nothing_of_tracegrad(name: str) -> None:
    tree = ast.parse((EXAMPLE / name).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported
    assert not [module for module in imported if module.split(".")[0] == "tracegrad"]
    assert "base_url" not in {
        keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords
    }
