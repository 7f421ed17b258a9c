"""Two real engines behind one model: both serve, both are published to, and no call spans two versions.

The first is the one that all tests share; it gets its own weights back.
"""

import re
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vllm
import httpx
import pytest
import tiny_model as tiny
from versions import add_version

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import PublishConfig, parse_config
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.engine import EngineProcess
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.probe import mean_abs
from tracegrad.trainer.publish import Publisher

pytestmark = pytest.mark.engine
WORKERS = 8
CALLS = 12
"""Of each worker, each a run of its own. The publish begins when a third of all are answered."""


def answered(url: str) -> int:
    """Requests that an engine has finished, by its own count."""
    page = httpx.get(f"{url}/metrics", timeout=10).text
    return round(sum(float(n) for n in re.findall(r"^vllm:request_success_total\{[^}]*\} ([\d.e+]+)$", page, re.M)))


def ask_all(url: str, third: threading.Event, failures: list[Any]) -> None:
    done = []

    def work(worker: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            for turn in range(CALLS):
                body = {"model": "tiny", "messages": [{"role": "user", "content": f"max {worker} {turn % 10}"}]}
                path = f"/run/run-{worker}-{turn}/role/solver/v1/chat/completions"
                answer = client.post(path, json={**body, "max_tokens": 8, "temperature": 1.0, "seed": turn})
                if answer.status_code != 200:
                    failures.append(answer.text)
                done.append(1)
                if len(done) >= WORKERS * CALLS // 3:
                    third.set()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.timeout(300)
def test_two_engines_serve_one_model_and_change_weights_together(
    engine: Any, tiny_model: Path, tmp_path: Path, start_engine: Callable[[Path, Path], EngineProcess]
) -> None:
    other = tiny.perturbed(tiny_model, tmp_path / "other", scale=0.02)
    second = start_engine(tiny_model, tmp_path / "engine.log")
    engine.reset()
    urls = [engine.url, second.client.url]
    before = [answered(url) for url in urls]
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    try:
        served = {"checkpoint": str(tiny_model), "engine": {"url": urls[0], "external": True}, "replicas": [urls[1]]}
        config = parse_config(
            {"store": store.url, "models": {"tiny": served}, "roles": {"*": "tiny"}, "trainer": {"model": "tiny"}}
        )
        weights = {
            add_version(store, tiny_model).version_id: tiny_model,
            add_version(store, other, 1).version_id: other,
        }
        old, new = sorted(weights)
        publisher = Publisher(store, "tiny", [EngineClient(url, "tiny") for url in urls], PublishConfig())
        publisher.publish(old)
        failures: list[Any] = []
        third = threading.Event()
        with fake_vllm.ServerThread(ProxyApp(config, store)) as proxy:
            load = threading.Thread(target=ask_all, args=(proxy.url, third, failures))
            load.start()
            assert third.wait(120)
            publisher.publish(new)
            load.join()
        assert failures == []
        answers = [answered(url) - earlier for url, earlier in zip(urls, before, strict=True)]
        assert min(answers) > WORKERS * CALLS // 6, "both serve"
        assert [EngineClient(url, "tiny").version() for url in urls] == [str(new)] * 2
        runs = [summary.run.run_id for summary in store.list_runs(limit=1000)]
        by_version: dict[int | None, list[Call]] = defaultdict(list)
        for trace in store.traces(runs):
            for call in trace.calls:
                assert (call.status, call.quarantine) == ("complete", None)
                assert call.version_dispatched == call.version_completed
                by_version[call.version_dispatched].append(call)
        assert sum(map(len, by_version.values())) == WORKERS * CALLS
        assert set(by_version) == {old, new}
        for version, calls in by_version.items():
            assert version is not None
            drawn = [
                ((call.prompt_ids or ()) + call.choices[0].token_ids, len(call.prompt_ids or ())) for call in calls
            ]
            wanted = [value for row in tiny.reference_logprobs(weights[version], drawn) for value in row]
            recorded = [value for call in calls for value in call.choices[0].logprobs or ()]
            assert mean_abs(recorded, wanted) < 1e-4, "whichever engine answered, it sampled from its version's weights"
    finally:
        store.close()
        second.stop()
        engine.reset()
