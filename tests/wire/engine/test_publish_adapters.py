"""Adapters on the engine of their base: exchanged one by one, probed by name, put back, and there after a restart."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, logprobs, save_weight
from versions import add_version

from tracegrad.tracestore.config import EngineConfig, ModelConfig, PublishConfig
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store
from tracegrad.trainer.adapter_client import AdapterClient
from tracegrad.trainer.engine import EngineProcess
from tracegrad.trainer.engine_errors import EngineNotReady, PublishFailed
from tracegrad.trainer.preflight import check
from tracegrad.trainer.probe import ProbeSequence, ProbeSet
from tracegrad.trainer.publish import Perturbed, Publisher

SETTINGS = PublishConfig(probe_tokens=8, probe_bound=0.001, drain_timeout_s=1.0, swap_timeout_s=1.0)
IDS = (1, 4, 7, 2, 9, 3, 5, 8, 6, 10, 0, 2, 4)
FAKE = str(Path(__file__).parents[2] / "support" / "fake_engine.py")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with FakeEngine(save_weight(tmp_path / "base", 1.0), "base") as running:
        running.busy = True  # calls to other models of the engine never end
        yield running


@pytest.fixture
def add(store: Store, tmp_path: Path) -> Callable[[str, float], PolicyVersion]:
    """Add a version of an adapter: the toy's weight in a folder of its own."""

    def made(model: str, weight: float) -> PolicyVersion:
        step = len(store.list_versions(model))
        folder = save_weight(tmp_path / f"{model}-{step}", weight)
        return add_version(store, folder, step, model=model)

    return made


def publisher(store: Store, engine: FakeEngine, model: str) -> Publisher:
    return Publisher(store, model, [AdapterClient(engine.url, model, "base")], SETTINGS)


def probe(new: float, previous: float | None = None) -> ProbeSet:
    def scored(weight: float) -> tuple[tuple[float, ...], ...]:
        return (tuple(logprobs(weight, IDS, 2)),)

    before = None if previous is None else scored(previous)
    sequence = ProbeSequence(ids=IDS, n_prompt=2)
    return ProbeSet(sequences=(sequence,), new_logprobs=scored(new), previous_logprobs=before)


def test_two_adapters_are_exchanged_beside_each_other(
    store: Store, engine: FakeEngine, add: Callable[[str, float], PolicyVersion]
) -> None:
    """Each by its own publisher, with its own probe; neither the base nor the other changes, nor has to stand still."""
    for model, weights in (("p", (1.0, 1.5)), ("w", (1.0, 0.5))):
        own = publisher(store, engine, model)
        for before, weight in zip((None, *weights), weights, strict=False):
            report = own.publish(add(model, weight).version_id, probe(weight, before))
            assert report.probe is not None and report.probe.verdict == "new"
    live = {model: store.live_version(model) for model in "pw"}
    assert {model: engine.adapters[model] for model in "pw"} == {
        model: version.checkpoint_path for model, version in live.items() if version is not None
    }
    assert (engine.weight, engine.version) == (1.0, "default")
    assert "reset_prefix_cache" not in engine.events and not engine.read_at_each_step


def test_an_adapter_is_proven_beside_the_one_that_serves_and_a_bad_one_holds_nobody(
    store: Store, engine: FakeEngine, add: Callable[[str, float], PolicyVersion]
) -> None:
    """Under a name of its own, gone afterwards; no proxy was asked to drain, and the adapter was not touched."""
    own, first = publisher(store, engine, "p"), add("p", 1.0)
    own.publish(first.version_id, probe(1.0))
    states: list[str] = []
    own.on_state = states.append
    engine.loaded.clear()
    second = add("p", 1.5)
    with pytest.raises(PublishFailed, match="nothing was swapped: the engine does not serve"):
        own.publish(second.version_id, probe(2.5, 1.0))
    assert (states, engine.loaded) == (["failed"], [second.checkpoint_path])
    assert (engine.adapters, engine.adapter_weights["p"]) == ({"p": first.checkpoint_path}, 1.0)
    report = own.publish(second.version_id, probe(1.5, 1.0))
    assert report.probe is not None and report.probe.n_tokens == len(IDS) - 2
    assert states == ["failed", "draining", "swapping", "live"]
    assert engine.loaded == [second.checkpoint_path] * 3
    assert (engine.adapters, engine.adapter_weights["p"]) == ({"p": second.checkpoint_path}, 1.5)


def test_an_adapter_whose_publisher_slept_too_long_is_gone_and_was_never_served(
    store: Store, engine: FakeEngine, add: Callable[[str, float], PolicyVersion]
) -> None:
    own, first, second = publisher(store, engine, "p"), add("p", 1.0), add("p", 1.5)
    own.publish(first.version_id, probe(1.0))
    engine.loaded.clear()

    def sleeps(state: str) -> None:
        last = store.last_publish("p")
        assert last is not None and (state == "failed" or store.end_unswapped(last.publish_id))

    own.on_state = sleeps
    with pytest.raises(PublishFailed, match="its publisher died while it was draining"):
        own.publish(second.version_id, probe(1.5, 1.0))
    assert (engine.adapters, engine.loaded) == ({"p": first.checkpoint_path}, [second.checkpoint_path])


def test_a_switch_that_is_not_made_after_a_good_rehearsal_is_caught(
    store: Store, engine: FakeEngine, add: Callable[[str, float], PolicyVersion]
) -> None:
    own, first = publisher(store, engine, "p"), add("p", 1.0)
    own.publish(first.version_id, probe(1.0))

    def entered(state: str) -> None:
        engine.ignore_reload = state == "swapping"

    own.on_state = entered
    with pytest.raises(PublishFailed, match="stale"):
        own.publish(add("p", 1.5).version_id, probe(1.5, 1.0))
    assert engine.adapters["p"] == first.checkpoint_path


def test_an_adapter_that_stays_as_it_was_is_caught_and_the_last_one_put_back(
    store: Store, engine: FakeEngine, add: Callable[[str, float], PolicyVersion]
) -> None:
    own, first = publisher(store, engine, "p"), add("p", 1.0)
    own.publish(first.version_id, probe(1.0))
    engine.ignore_reload = True
    with pytest.raises(PublishFailed, match="stale"):
        own.publish(add("p", 1.5).version_id, probe(1.5, 1.0))
    assert engine.adapters["p"] == first.checkpoint_path
    assert store.live_version("p") == store.get_version(first.version_id)


def test_a_first_version_that_fails_leaves_no_adapter_behind(
    store: Store, engine: FakeEngine, add: Callable[[str, float], PolicyVersion]
) -> None:
    """Nobody knows what it is: calls to it are refused, or the base answers them, until one is live."""
    with pytest.raises(PublishFailed, match="mismatch"):
        publisher(store, engine, "p").publish(add("p", 1.0).version_id, probe(3.0))
    assert (engine.adapters, store.live_version("p")) == ({}, None)


def test_the_canary_of_an_adapter_is_seen(
    store: Store, engine: FakeEngine, add: Callable[[str, float], PolicyVersion], tmp_path: Path
) -> None:
    folder = save_weight(tmp_path / "canary", 4.0)
    canary = Perturbed(checkpoint_path=str(folder), checkpoint_hash="c", logprobs=(tuple(logprobs(4.0, IDS, 2)),))
    first = add("p", 1.0)
    report = publisher(store, engine, "p").publish(first.version_id, probe(1.0), canary=canary)
    assert report.canary is not None and report.canary.verdict == "new"
    assert engine.loaded == [str(folder), first.checkpoint_path]


def test_an_engine_that_loads_no_adapters_is_refused(engine: FakeEngine) -> None:
    client = AdapterClient(engine.url, "p", "base")
    check(client, ModelConfig(checkpoint=engine.root, engine=EngineConfig(max_model_len=64)))
    engine.products = False
    with pytest.raises(EngineNotReady, match=r"lora_products: .*'base' is not served; add tracegrad's plugin"):
        check(client, ModelConfig(checkpoint=engine.root, engine=EngineConfig(max_model_len=64)))
    engine.takes_adapters = False
    with pytest.raises(EngineNotReady, match=r"adapters: .*'p' is one; add --enable-lora"):
        check(client, ModelConfig(checkpoint=engine.root, engine=EngineConfig(max_model_len=64)))


def test_an_engine_that_died_comes_back_with_the_live_adapters(
    store: Store, add: Callable[[str, float], PolicyVersion], tmp_path: Path
) -> None:
    """From its start on, so that nobody is answered by another version; what went live meanwhile is loaded after it."""
    from tracegrad.adapters.serving import free_port

    base = save_weight(tmp_path / "base", 1.0)
    launch = EngineConfig(url=f"http://127.0.0.1:{free_port()}", launch=("{python}", FAKE), start_timeout_s=20.0)
    live: dict[str, PolicyVersion] = {}
    process = EngineProcess("base", ModelConfig(checkpoint=str(base), engine=launch), adapters=lambda: dict(live))
    until = threading.Event()
    with process:
        client = AdapterClient(launch.url, "p", "base")
        assert client.loaded() is None
        live["p"] = add("p", 1.5)
        watcher = threading.Thread(target=process.watch, args=(until,))
        watcher.start()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        while process.restarts == 0:
            until.wait(0.05)
        assert client.serves(live["p"].checkpoint_path, "1")
        assert client.score(IDS, 2) == pytest.approx(logprobs(1.5, IDS, 2))
        argv = json.loads((base / "argv.json").read_text())["argv"]
        assert argv[argv.index("--lora-modules") + 1] == f"p={live['p'].checkpoint_path}"
        until.set()
        watcher.join()
