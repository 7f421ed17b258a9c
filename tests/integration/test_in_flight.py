"""Calls that go on through a publish of the real vLLM: each token's logprob is that of the version it is said to be of.

The tiny model in fp32. What the proxy stored is scored by transformers with the weights of both versions.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fake_vllm
import httpx
import pytest
import tiny_model as tiny
from versions import add_version

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.preflight import preflight
from tracegrad.trainer.probe import ProbeSequence, ProbeSet, mean_abs
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.publish_report import PublishReport

pytestmark = pytest.mark.engine
PARITY = 1e-4
ATTEMPTS = 6
LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0}
CHAT = {**LONG, "messages": [{"role": "user", "content": "max of 3 and 5"}]}
ASKED: dict[str, dict[str, Any]] = {
    "stream": {**CHAT, "stream": True},
    "choices": {**CHAT, "n": 6},
    "completion": {**LONG, "prompt": [70, 71, 72], "stream": True},
}


def probe_of(client: Any, new: Path, previous: Path) -> ProbeSet:
    got = client.sample((70, 71), max_tokens=400, temperature=1.0, seed=3, ignore_eos=True)
    one = ((70, 71, *got.token_ids), 2)
    scores = {path: (tuple(tiny.reference_logprobs(path, [one])[0]),) for path in (new, previous)}
    return ProbeSet(
        sequences=(ProbeSequence(ids=one[0], n_prompt=2),), new_logprobs=scores[new], previous_logprobs=scores[previous]
    )


@pytest.fixture
def restored(engine: Any) -> Iterator[Any]:
    """The shared engine with its own weights, before and after."""
    engine.reset()
    yield engine
    engine.reset()


def test_each_span_has_the_logprobs_of_its_own_version(restored: Any, tmp_path: Path) -> None:
    """The tiny model needs a second for all of it, so calls may be over before the engine pauses: then once more."""
    engine = restored
    folders = (engine.model_path, tiny.perturbed(engine.model_path, tmp_path / "other", scale=0.02))
    config = parse_config(
        {
            "store": f"sqlite:///{tmp_path / 'store.db'}",
            "models": {"tiny": {"checkpoint": "none", "engine": {"url": engine.url, "max_model_len": 512}}},
            "roles": {"*": "tiny"},
            "proxy": {"poll_s": 0.02},
            "trainer": {"publish": {"mode": "in_flight", "probe_bound": PARITY, "probe_tokens": 100}},
        }
    )
    client, store = engine.process.client, open_store(config.store)
    assert preflight(client, config.models["tiny"], in_flight=True) == []
    publisher = Publisher(store, "tiny", [client], config.trainer.publish)
    publisher.publish(add_version(store, folders[0], 0).version_id)
    with (
        fake_vllm.ServerThread(ProxyApp(config, store)) as server,
        httpx.Client(base_url=server.url, timeout=120, verify=False) as http,
        ThreadPoolExecutor(4) as pool,
    ):
        for step in range(1, ATTEMPTS + 1):
            weights = folders if step % 2 else folders[::-1]
            probe, new = probe_of(client, *weights[::-1]), add_version(store, weights[1], step)
            exchange = partial(publisher.publish, new.version_id, probe)
            report = publish_under_calls(pool, http, f"/run/{step}", client.pause, exchange)
            assert report.probe is not None and report.probe.verdict == "new"
            calls = store.trace(str(step)).calls
            print(step, [(c.quarantine, c.error, [each.version_spans for each in c.choices]) for c in calls])
            if all(choice.version_spans for call in calls for choice in call.choices):
                break
    assert len(calls) == len(ASKED)
    spans = [span for call in calls for span in compared(call, (new.version_id - 1, new.version_id), weights)]
    print(f"drained in {report.drain_s:.3f} s, swapped in {report.swap_s:.3f} s; {spans}")
    store.close()


def publish_under_calls(
    pool: Executor, http: httpx.Client, run: str, pause: Callable[[], None], exchange: Callable[[], PublishReport]
) -> PublishReport:
    """Pause while all calls of the run are at work, publish, and see them end as if nothing had been."""

    def url(name: str) -> str:
        return f"{run}/v1/{'completions' if 'prompt' in ASKED[name] else 'chat/completions'}"

    asked = [pool.submit(http.post, url(name), json=ASKED[name]) for name in list(ASKED)[1:]]
    with http.stream("POST", url("stream"), json=ASKED["stream"]) as stream:
        lines = stream.iter_lines()
        seen = [next(lines) for _ in range(3)]  # its first token; the others are at work by then
        pause()
        report = exchange()
        seen += lines
    answers = [each.result(120) for each in asked]
    assert all(answer.status_code == 200 and "tracegrad-versions" not in answer.text for answer in answers)
    assert "data: [DONE]" in seen and not any("tracegrad-versions" in line for line in seen)
    return report


def compared(call: Call, versions: tuple[int, int], weights: tuple[Path, Path]) -> list[tuple[int, float, float]]:
    """Assert of a call that its spans are exact; return (tokens, mean |d| of its own version, of the other) of each."""
    assert (call.quarantine, call.version_dispatched, call.version_completed) == (None, *versions)
    assert call.prompt_ids is not None
    found = []
    for choice in call.choices:
        ((zero, first), (exchanged, second)) = choice.version_spans
        assert (zero, first, second) == (0, *versions) and 0 < exchanged < len(choice.token_ids) == LONG["max_tokens"]
        ids, n_prompt = (*call.prompt_ids, *choice.token_ids), len(call.prompt_ids)
        scores = [tiny.reference_logprobs(path, [(ids, n_prompt)])[0] for path in weights]
        assert choice.logprobs is not None
        for part, own in ((slice(0, exchanged), 0), (slice(exchanged, None), 1)):
            recorded = choice.logprobs[part]
            mine, others = (mean_abs(recorded, scores[which][part]) for which in (own, 1 - own))
            assert mine < PARITY and others > 100 * PARITY
            edge = slice(0, 1) if own else slice(-1, None)  # the token at the exchange, too
            assert abs(recorded[edge][0] - scores[own][part][edge][0]) < 10 * PARITY
            found.append((len(recorded), mine, others))
    return found
