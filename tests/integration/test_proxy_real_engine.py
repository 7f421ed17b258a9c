"""The proxy in front of the real vLLM: the client gets the direct answer's bytes, and the record is exact.

Where `TRACEGRAD_ENGINE_URL` is set that engine is asked instead of the shared tiny one.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import httpx
import pytest

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import open_store

pytestmark = pytest.mark.engine

ASKED: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "token ids": {"return_token_ids": True},
    "two choices": {"n": 2, "temperature": 0.9, "seed": 5},
    "a stop string": {"stop": ["1"]},
    "an error": {"tools": []},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}
FINGERPRINT = re.compile(rb',"system_fingerprint":"[^"]*"')


@pytest.fixture(scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The engine, a proxy in front of it, and its store."""
    url = os.environ.get("TRACEGRAD_ENGINE_URL") or request.getfixturevalue("engine").url
    folder: Path = tmp_path_factory.mktemp("proxy")
    name = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    config = parse_config(
        {
            "store": f"sqlite:///{folder / 'store.db'}",
            "models": {name: {"checkpoint": "none", "engine": {"url": url}}},
            "roles": {"*": name},
            "trainer": {"model": name},
        }
    )
    store = open_store(config.store)
    with (
        fake_vllm.ServerThread(ProxyApp(config, store)) as server,
        httpx.Client(base_url=server.url, timeout=120, verify=False) as proxy,
        httpx.Client(base_url=url, timeout=120, verify=False) as engine,
    ):
        yield SimpleNamespace(name=name, store=store, proxy=proxy, engine=engine)
    store.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ASKED)
def test_the_client_gets_the_bytes_of_the_direct_answer(both: SimpleNamespace, what: str, stream: bool) -> None:
    messages = [{"role": "user", "content": "max of 3 and 5"}]
    body = {"model": both.name, "messages": messages, "max_tokens": 8, "temperature": 0, "stream": stream}
    answers = [
        client.post("/v1/chat/completions", json={**body, **ASKED[what]}, headers={"x-request-id": "same"})
        for client in (both.proxy, both.engine)
    ]
    through, direct = (re.sub(rb'"created":\d+', b'"created":0', answer.content) for answer in answers)
    if what == "two choices" and stream:  # the first choice's fingerprint is a listed exception
        through, direct = FINGERPRINT.sub(b"", through), FINGERPRINT.sub(b"", direct)
    assert through == direct
    assert answers[0].status_code == answers[1].status_code


@pytest.mark.parametrize("stream", [False, True])
def test_the_record_is_what_the_engine_says_it_sampled(both: SimpleNamespace, stream: bool) -> None:
    """Seeded, so that asking the engine again for ids and logprobs gives the sample that the proxy recorded."""
    body = {
        "model": both.name,
        "messages": [{"role": "user", "content": "max of 7 and 2"}],
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 11,
        "n": 2,
    }
    answer = both.proxy.post(f"/run/exact-{stream}/role/a/v1/chat/completions", json={**body, "stream": stream})
    assert answer.status_code == 200
    (call,) = both.store.trace(f"exact-{stream}").calls
    assert (call.status, call.quarantine) == ("complete", None)
    truth = both.engine.post("/v1/chat/completions", json={**body, "return_token_ids": True, "logprobs": True}).json()
    assert list(call.prompt_ids) == truth["prompt_token_ids"]
    for choice, said in zip(call.choices, truth["choices"], strict=True):
        assert list(choice.token_ids) == said["token_ids"]
        assert choice.message["content"] == said["message"]["content"]
        assert choice.logprobs == pytest.approx([t["logprob"] for t in said["logprobs"]["content"]], abs=1e-2)
