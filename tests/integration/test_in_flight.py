"""Calls that go on through a publish of the real vLLM: each token's logprob is that of the version it is said to be of.

The tiny model in fp32. What the proxy stored is scored by transformers with the weights of both versions.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_vllm
import httpx
import pytest
import tiny_model as tiny
from versions import add_version

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.preflight import preflight
from tracegrad.trainer.probe import ProbeSequence, ProbeSet, mean_abs
from tracegrad.trainer.publish import Publisher

pytestmark = pytest.mark.engine
PARITY = 1e-4
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


def test_each_span_has_the_logprobs_of_its_own_version(engine: Any, tmp_path: Path) -> None:
    engine.reset()
    other = tiny.perturbed(engine.model_path, tmp_path / "other", scale=0.02)
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
    old, new = (add_version(store, path, step) for step, path in enumerate((engine.model_path, other)))
    publisher.publish(old.version_id)
    probe = probe_of(client, other, engine.model_path)
    with fake_vllm.ServerThread(ProxyApp(config, store)) as server, ThreadPoolExecutor(4) as pool:

        def url(name: str) -> str:
            return f"{server.url}/run/{name}/v1/{'completions' if 'prompt' in ASKED[name] else 'chat/completions'}"

        asked = [pool.submit(httpx.post, url(name), json=ASKED[name], timeout=120) for name in list(ASKED)[1:]]
        time.sleep(0.1)
        with httpx.stream("POST", url("stream"), json=ASKED["stream"], timeout=120) as stream:
            lines = stream.iter_lines()
            seen = [next(lines) for _ in range(9)]  # the others are at work by then
            client.pause()  # at once: the tiny model needs a second for all of it
            report = publisher.publish(new.version_id, probe)
            seen += lines
        answers = [each.result(120) for each in asked]
    assert all(answer.status_code == 200 and "tracegrad-versions" not in answer.text for answer in answers)
    assert "data: [DONE]" in seen and not any("tracegrad-versions" in line for line in seen)
    assert report.probe is not None and report.probe.verdict == "new"
    spans = [span for name in ASKED for span in compared(store, name, (engine.model_path, other))]
    print(f"drained in {report.drain_s:.3f} s, swapped in {report.swap_s:.3f} s; {spans}")
    store.close()
    engine.reset()


def compared(store: Store, run_id: str, weights: tuple[Path, Path]) -> list[tuple[int, float, float]]:
    """Assert of a call that its spans are exact; return (tokens, mean |d| of its own version, of the other) of each."""
    (call,) = store.trace(run_id).calls
    print(run_id, call.quarantine, call.error, [(len(c.token_ids), c.version_spans) for c in call.choices])
    assert (call.quarantine, call.version_dispatched, call.version_completed) == (None, 1, 2)
    assert call.prompt_ids is not None
    found = []
    for choice in call.choices:
        ((zero, first), (exchanged, second)) = choice.version_spans
        assert (zero, first, second) == (0, 1, 2) and 0 < exchanged < len(choice.token_ids) == LONG["max_tokens"]
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
