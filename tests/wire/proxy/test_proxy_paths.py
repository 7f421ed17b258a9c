"""Whatever a client writes as a path, only the listed paths of an engine are ever asked for."""

import socket
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from tracegrad.tracestore.store import Store

FORBIDDEN = (
    "collective_rpc", "pause", "resume", "update_weights", "sleep", "v1/load_lora_adapter", "reset_prefix_cache",
    "is_paused", "wake_up", "v1/unload_lora_adapter", "update_weight_version", "weight_info", "server_info", "load",
    "inference/v1/generate", "v1/chat/completions/render", "v1/chat/completions/derender", "tokenize", "detokenize",
    "init_weight_transfer_engine", "abort_requests", "scale_elastic_ep", "start_profile", "docs", "openapi.json",
)  # fmt: skip
TRICKS = (
    "//{}", "/./{}", "/v1/../{}", "/v1/%2e%2e/{}", "/v1/..%2f{}", "/v1/%2E%2E%2F{}", "/v1%2f..%2f{}", "/v1/..\\{}",
    "/v1/chat/completions/../../../{}", "/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/{}", "/v1/models/../../{}",
    "/v1/models/%2e%2e/%2e%2e/{}", "/v1/models/..%2f..%2f{}", "/run/r/{}", "/run/r/role/a/{}", "/run/../{}",
    "/run/%2e%2e/role/%2e%2e/{}", "/role/x/../../{}", "/run/r/v1/../{}", "/tracegrad/v1/../../{}", "/tracegrad/v1/{}",
    "/health/../{}", "/health/{}", "/{}/", "/{}%00", "/{}?x=/v1/chat/completions", "/{}#/v1/models", "/{};/v1/models",
    "/v1/chat/completions?/../../{}", "/langsmith/../{}", "http://engine/{}", "http://127.0.0.1:1/v1/../{}",
    "HTTP://x@y/{}",
)  # fmt: skip
OPEN = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/health"}


class Watched:
    """An engine that remembers every path it was asked for."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.asked.append(scope["raw_path"].decode())
        await self.engine(scope, receive, send)


@pytest.fixture
def watched(fake: ModuleType) -> Iterator[SimpleNamespace]:
    app = Watched(fake.FakeEngine("main"))
    with fake.ServerThread(app) as server:
        yield SimpleNamespace(app=app, url=server.url)


def statuses(url: str, method: str, targets: list[str], headers: str = "") -> list[int]:
    """Send each target as it is written, on one connection (a client library would tidy it up)."""
    host, port = urlsplit(url).netloc.split(":")
    found: list[int] = []
    body = '{"messages":[{"role":"user","content":"x"}]}' if method == "POST" else ""
    connection, replies = None, None
    for target in targets:
        if connection is None or replies is None:
            connection = socket.create_connection((host, int(port)), timeout=10)
            replies = connection.makefile("rb")
        connection.sendall(
            f"{method} {target} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        found.append(int(replies.readline().split()[1]))
        length, closes = 0, False
        while (line := replies.readline().strip().lower()) != b"":
            length = int(line.split(b":")[1]) if line.startswith(b"content-length:") else length
            closes = closes or line == b"connection: close"
        replies.read(length)
        if closes:
            connection.close()
            connection = None
    if connection is not None:
        connection.close()
    return found


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_client_reaches_nothing_but_the_listed_paths(
    start_proxy: Callable[..., SimpleNamespace], watched: SimpleNamespace, method: str
) -> None:
    proxy = start_proxy(models={"main": {"checkpoint": "none", "engine": {"url": watched.url}}})
    targets = [f"/{name}" for name in FORBIDDEN] + [trick.format(name) for trick in TRICKS for name in FORBIDDEN[:7]]
    for target, status in zip(targets, statuses(proxy.url, method, targets), strict=True):
        if target.startswith("/v1/chat/completions?"):  # what follows the question mark is no path
            assert status == (200 if method == "POST" else 405)
        elif target.startswith("/v1/models/"):  # it is the name of a model, which may hold slashes; nobody has that one
            assert status == (405 if method == "POST" else 404), target
        else:
            assert status in (400, 404), (target, status)
    assert set(watched.app.asked) <= OPEN


def test_other_methods_reach_nothing(start_proxy: Callable[..., SimpleNamespace], watched: SimpleNamespace) -> None:
    proxy = start_proxy(models={"main": {"checkpoint": "none", "engine": {"url": watched.url}}})
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
        for path in ("/v1/chat/completions", "/v1/models", "/pause", "/tracegrad/v1/runs"):
            assert proxy.client.request(method, path).status_code in (404, 405)
    assert watched.app.asked == []


def test_no_path_opens_a_door_without_its_key(
    start_proxy: Callable[..., SimpleNamespace], watched: SimpleNamespace, store: Store
) -> None:
    """Neither to the engine nor to what only another scope may see."""
    proxy = start_proxy(
        proxy={"access": {"keys": "on"}}, models={"main": {"checkpoint": "none", "engine": {"url": watched.url}}}
    )
    doors = ("pause", "v1/chat/completions", "tracegrad/v1/backlog", "tracegrad/v1/tasks", "metrics")
    targets = [trick.format(door) for trick in ("/{}", *TRICKS) for door in doors]
    key = f"authorization: Bearer {store.create_key(scopes=('reward',))[0]}\r\n"
    for method in ("GET", "POST"):
        assert set(statuses(proxy.url, method, targets)) <= {400, 401}
        assert set(statuses(proxy.url, method, targets, key)) <= {400, 403}
    assert watched.app.asked == []
