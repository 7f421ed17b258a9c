"""The real proxy and store in front of a fake engine that speaks the wire, all under real servers, and two apps."""

import asyncio
import json
import os
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fake_completions import body_of, lifespan
from versions import go_live

from tracegrad.adapters import hook
from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.adapters.scope import RunScope
from tracegrad.tracestore.config import dump_config, parse_config
from tracegrad.tracestore.store import Store, open_store

GRAPH_APP = """
    from typing import TypedDict

    from langchain_openai import ChatOpenAI
    from langgraph.graph import END, START, StateGraph

    model = ChatOpenAI(model="gpt-4o-mini", temperature=0)


    class State(TypedDict, total=False):
        question: str
        draft: str
        answer: str


    def draft(state: State) -> State:
        return {"draft": model.invoke("draft " + state["question"]).text}


    async def answer(state: State) -> State:
        if "explode" in state["question"]:
            raise ValueError("the oven is too hot")
        return {"answer": (await model.ainvoke("answer " + state["question"])).text}


    builder = StateGraph(State)
    builder.add_node("drafter", draft)
    builder.add_node("answerer", answer)
    builder.add_edge(START, "drafter")
    builder.add_edge("drafter", "answerer")
    builder.add_edge("answerer", END)
    graph = builder.compile()


    def reward(task, output):
        if "unscorable" in task.input["question"]:
            raise KeyError("gold")
        right = float(output["answer"] == "0: answer " + task.input["question"])
        return [{"name": "right", "value": right}, {"name": "length", "value": 0.5, "role": "drafter"}]
"""

LIGHT_APP = """
    import json
    import os
    import urllib.request


    class Light:
        def invoke(self, given, config):
            body = {"model": "main", "messages": [{"role": "user", "content": given["question"]}]}
            url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
            request = urllib.request.Request(url, json.dumps(body).encode())
            request.add_header("x-tracegrad-run", config["configurable"]["thread_id"])
            with urllib.request.urlopen(request) as response:
                return {"answer": json.load(response)["choices"][0]["message"]["content"]}


    graph = Light()


    def reward(task, output):
        return float(output["answer"].endswith(task.input["question"]))
"""


class FakeEngine:
    """Answers `0: <last message>`, one token a byte, in the shape of vLLM's plain chat completion."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.delay_s = 0.0
        self.overloaded = False
        self.gate: threading.Event | None = None
        self.in_flight = 0
        self.finished = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["path"] != "/v1/chat/completions":
            await _reply(send, 200, {})
            return
        raw = await body_of(receive)
        self.requests.append(json.loads(raw))
        if self.overloaded:
            await _reply(send, 503, {"error": {"message": "overloaded", "type": "x", "param": None, "code": 503}})
            return
        self.in_flight += 1
        if self.gate is not None:
            await asyncio.to_thread(self.gate.wait, 20)
        await asyncio.sleep(self.delay_s)
        self.in_flight -= 1
        self.finished += 1
        await _reply(send, 200, _completion(len(self.requests), json.loads(raw)))


def _completion(number: int, body: dict[str, Any]) -> dict[str, Any]:
    prompt = "".join(message["content"] for message in body["messages"])
    text = f"0: {body['messages'][-1]['content']}"
    ids = [3 + byte for byte in text.encode()]
    tokens = [{"token": chr(i - 3), "logprob": -0.5, "bytes": [i - 3], "top_logprobs": []} for i in ids]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": tokens} if body.get("logprobs") else None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": ids if body.get("return_token_ids") else None,
    }
    prompt_ids = [3 + byte for byte in prompt.encode()]
    counts = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(ids)}
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
        "usage": counts | {"total_tokens": sum(counts.values())},
        "prompt_token_ids": prompt_ids if body.get("return_token_ids") else None,
    }


async def _reply(send: Any, status: int, answer: Any) -> None:
    raw = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an ASGI application under a real uvicorn in a thread; yields its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        config = uvicorn.Config(app, http="httptools", ws="none", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.002)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@dataclass(frozen=True, slots=True)
class Stack:
    """What a rollout talks to: `root` is the proxy's URL; `engine` remembers the requests it was sent."""

    engine: FakeEngine
    store: Store
    root: str
    config_path: Path


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    engine = FakeEngine()
    url = f"sqlite:///{tmp_path}/trace.db"
    store = open_store(url)
    go_live(store)  # what a trainer does first, with the weights that the engine was started with
    with served(engine) as upstream:
        raw: dict[str, Any] = {
            "store": url,
            "models": {"main": {"checkpoint": str(tmp_path), "engine": {"url": upstream}}},
            "roles": {"*": "main"},
            "trainer": {"output": str(tmp_path), "batch": {"groups": 2}},
        }
        config = parse_config(raw)
        with served(ProxyApp(config, store)) as root:
            raw["proxy"] = {"port": int(root.rpartition(":")[2])}
            path = tmp_path / "tracegrad.yaml"
            path.write_text(dump_config(parse_config(raw)))
            yield Stack(engine, store, root, path)
    store.close()


@pytest.fixture(autouse=True)
def own_process_state() -> Iterator[None]:
    """Loading an app points this process at a proxy; afterwards it points nowhere."""
    environ, path = dict(os.environ), list(sys.path)
    yield
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:] = path
    for name in ("graph_app", "light_app"):
        sys.modules.pop(name, None)
    hook.install(RunScope())


@pytest.fixture
def graph_app(tmp_path: Path) -> str:
    (tmp_path / "graph_app.py").write_text(textwrap.dedent(GRAPH_APP))
    return str(tmp_path / "graph_app.py")


@pytest.fixture
def light_app(tmp_path: Path) -> str:
    (tmp_path / "light_app.py").write_text(textwrap.dedent(LIGHT_APP))
    return str(tmp_path / "light_app.py")


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(f'{{"id": "q{i}", "input": {{"question": "what is {i}"}}}}\n' for i in range(6)))
    return path
