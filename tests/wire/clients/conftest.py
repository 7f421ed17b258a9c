"""A real proxy in front of an engine that does what the words of a request say, for client programs of other kinds."""

from collections.abc import Iterator

import pytest
from client_programs import MoodyEngine, Served
from fake_vllm import ServerThread

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import open_store


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    url = f"sqlite:///{tmp_path_factory.mktemp('clients') / 'store.db'}"
    store = open_store(url)
    with ServerThread(MoodyEngine("main")) as engine:
        models = {"main": {"checkpoint": "none", "engine": {"url": engine.url}}}
        config = parse_config({"store": url, "models": models, "roles": {"*": "main"}, "proxy": {"poll_s": 0.01}})
        with ServerThread(ProxyApp(config, store)) as proxy:
            yield Served(proxy.url, store)
    store.close()
