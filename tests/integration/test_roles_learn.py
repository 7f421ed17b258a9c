"""Tests that must learn, through the real vLLM: two roles of one app, mapped to weights in other ways than by sharing.

Two tasks. In one the roles must cooperate: only where both do their part does either earn anything. In the other the
reward stands on the later role's call and the earlier role decides it: only credit along the run's graph reaches who
can do anything about it. Shared weights learn in test_loop.py, with everything else that belongs to a loop.

Two engines: the one that all tests share, and one with room for adapters that `tracegrad engine` starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from whole_loop import ADAPTER_LR, GROUP, GROUPS, LR, STEPS, configuration, gain, learn, running, wait_for

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.adapter_client import AdapterClient

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]
ADAPTERS = {"solver": "s", "checker": "c"}
LORA: dict[str, Any] = {"s": {"adapter": {"of": "base", "rank": 16}}, "c": {"adapter": {"of": "base", "rank": 16}}}
HANDED_ON_STEPS = 7


@dataclass(frozen=True)
class Learnt:
    store: Store
    metrics: list[dict[str, Any]]


def served(url: str, model: Path) -> dict[str, Any]:
    return {
        "checkpoint": str(model),
        "engine": {"url": url, "external": True, "dtype": "float32", "max_model_len": 256},
    }


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[str]:
    """An engine that serves the tiny model as `base`, with room for two adapters on it."""
    folder = tmp_path_factory.mktemp("base")
    url = f"http://127.0.0.1:{free_port()}"
    base = served(url, tiny_model)
    base["engine"] |= {"external": False, "log": str(folder / "engine.log")}
    config = folder / "tracegrad.yaml"
    models = {"base": {**base, "trained": False}, **LORA}
    config.write_text(yaml.safe_dump({"store": "sqlite:///none.db", "models": models, "roles": ADAPTERS}))
    with running("engine", "--config", str(config), log=folder / "command.log") as engine:
        wait_for(f"{url}/health", engine, folder / "engine.log")
        yield url


def adapters(folder: Path, model: Path, base_url: str, credit: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """The configuration of an adapter for each role. What a job before left of the adapters is taken off the engine."""
    for name in LORA:
        AdapterClient(base_url, name, "base").disown("")
    models = {"base": {**served(base_url, model), "trained": False}, **LORA}
    return configuration(folder, models, ADAPTERS, lr=ADAPTER_LR, credit=credit, steps=steps)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, base_url: str) -> Iterator[Learnt]:
    folder = tmp_path_factory.mktemp("adapters")
    metrics = learn(folder, adapters(folder, tiny_model, base_url, {"advantage": "grpo"}), reward="together")
    store = open_store(f"sqlite:///{folder / 'trace.db'}")
    yield Learnt(store, metrics)
    store.close()


def test_two_roles_that_must_cooperate_learn_on_adapters_of_their_own(adapted: Learnt) -> None:
    before, after = gain(adapted.metrics, "checker")
    assert before < 0.25 and after > 0.4


def test_both_adapters_are_published_after_each_step_and_the_probes_see_them(adapted: Learnt) -> None:
    assert [line["step"] for line in adapted.metrics] == list(range(1, STEPS + 1))
    for line in adapted.metrics:
        assert set(line["publish"]) == {"s", "c"}
        for report in line["publish"].values():
            seen = report["result"]  # a digit and an end: too few tokens to be sure of a verdict, not of the figures
            assert seen["verdict"] in ("new", "unresolved") and seen["mean_abs_new"] < 1e-3, seen
        apart = [each["logprob_abs_diff"] for each in line["models"].values()]
        assert all(each is None or each < 1e-3 for each in apart), apart
    for model in ADAPTERS.values():
        live = adapted.store.live_version(model)
        assert live is not None and live.step == STEPS
        canary = adapted.store.list_publishes(model)[0].probe
        assert canary is not None and canary["canary"]["verdict"] == "new"


def test_every_call_knows_the_version_of_its_own_adapter(adapted: Learnt) -> None:
    """None failed or was quarantined while adapters were exchanged beside it; none was answered by the base."""
    runs = adapted.store.list_runs(purpose="train", limit=1000)
    assert len(runs) == STEPS * GROUPS * GROUP
    seen: dict[str, set[int]] = {model: set() for model in ADAPTERS.values()}
    for trace in adapted.store.traces([summary.run.run_id for summary in runs]):
        for call in trace.calls:
            assert (call.status, call.quarantine) == ("complete", None)
            assert call.model == ADAPTERS[str(call.attribution.role)]
            assert call.version_dispatched == call.version_completed is not None
            assert adapted.store.get_version(call.version_dispatched).model == call.model
            seen[call.model].add(call.version_dispatched)
    assert all(len(versions) >= STEPS // 2 for versions in seen.values()), seen


def test_tokens_are_conserved_over_both(adapted: Learnt) -> None:
    report = adapted.store.consumption("main")
    assert report.conserved
    by_model = {m: sum(line["models"][m]["tokens_trained"] for line in adapted.metrics) for m in ADAPTERS.values()}
    assert report.trained == sum(by_model.values()) and min(by_model.values()) > 0


def test_a_choice_that_a_later_call_is_rewarded_for_is_learnt_by_graph_credit_only(
    tmp_path: Path, tiny_model: Path, base_url: str
) -> None:
    after: dict[str, float] = {}
    for scope in ("graph", "call"):
        folder = tmp_path / scope
        folder.mkdir()
        credit = {"advantage": "grpo", "scope": scope}
        configured = adapters(folder, tiny_model, base_url, credit, HANDED_ON_STEPS)
        before, after[scope] = gain(learn(folder, configured, reward="handed_on"), "checker")
        assert before < 0.45, "a quarter of 64 answers, by chance; 0.45 is four deviations away"
    assert after["graph"] > 0.45, after
    assert after["call"] < 0.38, after


def test_two_roles_that_must_cooperate_learn_on_models_of_their_own(
    tmp_path: Path, tiny_model: Path, engine: Any, base_url: str
) -> None:
    """Each on an engine of its own."""
    engine.reset()
    models = {"tiny": served(engine.url, tiny_model), "base": served(base_url, tiny_model)}
    roles = {"solver": "tiny", "checker": "base"}
    configured = configuration(tmp_path, models, roles, lr=LR, credit={"advantage": "grpo"})
    try:
        before, after = gain(learn(tmp_path, configured, reward="together"), "checker")
    finally:
        engine.reset()
    assert before < 0.25 and after > 0.4
