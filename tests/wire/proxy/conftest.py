"""A real proxy under a real uvicorn, in front of the fake engine, on a real store."""

import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from databases import empty_file, store, store_url

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import Store

__all__ = ["empty_file", "store", "store_url"]


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module tests/support/fake_vllm.py."""
    return importlib.import_module("fake_vllm")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """For clients that ask at once."""
    with ThreadPoolExecutor(12) as threads:
        yield threads


@pytest.fixture(scope="session")
def served_engine(fake: ModuleType) -> Iterator[Any]:
    with fake.ServerThread(fake.FakeEngine("main")) as server:
        yield server


@pytest.fixture
def engine_url(served_engine: Any) -> str:
    return str(served_engine.url)


@pytest.fixture
def engine_app(served_engine: Any, fake: ModuleType) -> Any:
    """The fake engine, as new."""
    served_engine.app.__init__("main")
    return served_engine.app


@pytest.fixture
def start_proxy(
    fake: ModuleType, engine_url: str, store: Store, stack: ExitStack, engine_app: Any
) -> Callable[..., SimpleNamespace]:
    """Start a proxy; keyword arguments go over the configuration. Has url, app, config, client, server."""

    def start(**overrides: Any) -> SimpleNamespace:
        proxy = {"poll_s": 0.01, **overrides.pop("proxy", {})}
        raw = {
            "store": store.url,
            "models": {"main": {"checkpoint": "none", "engine": {"url": engine_url}}},
            "roles": {"*": "main"},
            "proxy": proxy,
            **{k: v for k, v in overrides.items() if k not in ("store_object", "sockets")},
        }
        config = parse_config(raw)
        app = ProxyApp(config, overrides.get("store_object", store), sockets=overrides.get("sockets"))
        server = stack.enter_context(fake.ServerThread(app))
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=20, verify=False))
        return SimpleNamespace(url=server.url, app=app, config=config, client=client, server=server)

    return start


@pytest.fixture
def proxy(start_proxy: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return start_proxy()


@pytest.fixture
def token_in(start_proxy: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return start_proxy(token_in=["default"])


@pytest.fixture
def direct(engine_url: str, stack: ExitStack) -> httpx.Client:
    return stack.enter_context(httpx.Client(base_url=engine_url, timeout=20, verify=False))


class BlockedStore:
    """A store whose `append_calls` waits until it is let go, and fails with `error` if one is set."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.let_go = threading.Event()
        self.reached = threading.Event()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append_calls(self, calls: Any) -> None:
        self.reached.set()
        assert self.let_go.wait(20)
        if self.error is not None:
            raise self.error
        self._store.append_calls(calls)


@pytest.fixture
def blocked_store(store: Store) -> Iterator[BlockedStore]:
    blocked = BlockedStore(store)
    yield blocked
    blocked.let_go.set()
