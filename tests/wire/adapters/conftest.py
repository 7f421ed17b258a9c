"""A small proxy that speaks the wire (OpenAI chat, tracegrad API) over real HTTP and remembers what it was asked."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote

import fake_vllm
import pytest
from langchain_openai import ChatOpenAI

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import Store, open_store


@dataclass
class SeenCall:
    """One model call as it arrived, with its attribution decoded."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def run_id(self) -> str | None:
        return self._text("x-tracegrad-run")

    @property
    def role(self) -> str | None:
        return self._text("x-tracegrad-role")

    @property
    def source(self) -> str | None:
        return self._text("x-tracegrad-source")

    @property
    def span(self) -> dict[str, Any] | None:
        text = self._text("x-tracegrad-span")
        return None if text is None else json.loads(text)

    @property
    def said(self) -> str:
        return str(self.body["messages"][-1]["content"])

    def _text(self, name: str) -> str | None:
        return unquote(self.headers[name]) if name in self.headers else None


@dataclass
class FakeProxy:
    """Answers `echo: <last message>`; asks for the first tool where tools are offered and none has answered."""

    root: str = ""
    calls: list[SeenCall] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewards: list[dict[str, Any]] = field(default_factory=list)
    spans: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Run -> span id -> what its parts said."""
    log: list[str] = field(default_factory=list)
    refuse: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path prefix -> (status, how many times) to answer instead."""
    redirect_to: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def v1(self) -> str:
        return self.root + "/v1"

    def wait_ended(self, run_id: str, timeout_s: float = 5.0) -> dict[str, Any]:
        give_up = time.monotonic() + timeout_s
        while self.runs[run_id]["status"] == "open" and time.monotonic() < give_up:
            time.sleep(0.01)
        return self.runs[run_id]

    def only_run(self) -> dict[str, Any]:
        (run,) = self.runs.values()
        return run


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FakeProxy

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        with self.proxy.lock:
            self.proxy.log.append(f"GET {self.path}")
        if self._refused():
            return
        parts = self.path.strip("/").split("/")
        if parts[:3] == ["tracegrad", "v1", "groups"]:
            group = [run for run in self.proxy.runs.values() if run.get("group_id") == parts[3]]
            self._json({"runs": group})
        elif parts[:3] == ["tracegrad", "v1", "runs"] and unquote(parts[3]) in self.proxy.runs:
            self._json({"run": self.proxy.runs[unquote(parts[3])], "calls_summary": [], "rewards": []})
        elif self.path == "/health":
            self._json({"status": "ok"})
        else:
            self._json({"error": {"message": f"no {self.path}", "type": "x", "code": "not_found", "param": None}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.proxy.lock:
            self.proxy.log.append(f"POST {self.path}")
        if self._refused():
            return
        if self.path.endswith("/chat/completions"):
            seen = SeenCall(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            with self.proxy.lock:
                self.proxy.calls.append(seen)
            self._chat(body)
        elif self.path == "/tracegrad/v1/runs":
            self._open(body)
        elif self.path == "/tracegrad/v1/rewards":
            with self.proxy.lock:
                self.proxy.rewards.extend(body["rewards"])
            stored = [
                {"reward_id": r["reward_id"], "run_id": r.get("run_id"), "call_id": None, "late_for": []}
                for r in body["rewards"]
            ]
            self._json({"rewards": stored})
        elif self.path.endswith("/spans"):
            self._spans(unquote(self.path.split("/")[-2]), body)
        elif self.path.endswith("/end"):
            run = self.proxy.runs[unquote(self.path.split("/")[-2])]
            run |= {
                "status": body["status"],
                "ended_by": body["ended_by"],
                "error": body["error"],
                "ended_at": time.time(),
            }
            self._json(run)
        else:
            self._json({"ok": True})

    def _spans(self, run_id: str, body: dict[str, Any]) -> None:
        """Merge parts as the store does."""
        with self.proxy.lock:
            spans = self.proxy.spans.setdefault(run_id, {})
            for part in body["spans"]:
                said = {name: value for name, value in part.items() if value is not None}
                spans[part["span_id"]] = {**spans.get(part["span_id"], {}), **said}
        self._json({"spans": len(body["spans"])})

    def _open(self, body: dict[str, Any]) -> None:
        run = {"run_id": body["run_id"], "project": "default", "purpose": body["purpose"], "status": "open"}
        run |= {key: body.get(key) for key in ("task_id", "group_id", "member")}
        run |= {"ended_by": None, "error": None, "opened_at": time.time(), "ended_at": None, "field_of_tomorrow": 1}
        with self.proxy.lock:
            self._json(self.proxy.runs.setdefault(run["run_id"], run))

    def _refused(self) -> bool:
        if self.proxy.redirect_to is not None:
            self.send_response(307)
            self.send_header("location", self.proxy.redirect_to + self.path)
            self.send_header("content-length", "0")
            self.end_headers()
            return True
        with self.proxy.lock:
            for prefix, (status, times) in self.proxy.refuse.items():
                if self.path.startswith(prefix) and times > 0:
                    self.proxy.refuse[prefix] = (status, times - 1)
                    self._json({"error": {"message": "not now", "type": "x", "code": "said_no", "param": None}}, status)
                    return True
        return False

    def _chat(self, body: dict[str, Any]) -> None:
        messages = body["messages"]
        text = f"echo: {messages[-1]['content']}"
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if body.get("tools") and not any(m["role"] == "tool" for m in messages):
            call = {"name": body["tools"][0]["function"]["name"], "arguments": '{"question": "why"}'}
            message |= {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": call}]}
        head = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
        if body.get("stream"):
            self._stream(head, text)
            return
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self._json({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _stream(self, head: dict[str, Any], text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        words = [word + " " for word in text.split(" ")]
        for number, word in enumerate([*words, ""]):
            last = number == len(words)
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": "stop" if last else None}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _json(self, value: Any, status: int = 200) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def _serving() -> Iterator[FakeProxy]:
    proxy = FakeProxy()
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.root = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield proxy
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy() -> Iterator[FakeProxy]:
    yield from _serving()


@pytest.fixture
def elsewhere() -> Iterator[FakeProxy]:
    """Another server on this machine: nothing of ours may reach it."""
    yield from _serving()


class Served(NamedTuple):
    """The real proxy in front of the fake engine, and its store."""

    root: str
    store: Store

    def model(self) -> ChatOpenAI:
        return ChatOpenAI(model="main", base_url=self.root + "/v1", api_key="x", max_retries=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    url = f"sqlite:///{tmp_path_factory.mktemp('attribution') / 'store.db'}"
    store = open_store(url)
    with fake_vllm.ServerThread(fake_vllm.FakeEngine("main")) as engine:
        models = {"main": {"checkpoint": "none", "engine": {"url": engine.url}}}
        config = parse_config({"store": url, "models": models, "roles": {"*": "main"}, "proxy": {"poll_s": 0.01}})
        with fake_vllm.ServerThread(ProxyApp(config, store)) as proxy:
            yield Served(proxy.url, store)
    store.close()
