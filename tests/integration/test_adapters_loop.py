"""A LoRA adapter per role, real in every part: two roles on one vLLM, trained in one job, exchanged under load.

Two steps: what is looked at is the wiring, not what is learnt.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from whole_loop import run_loop

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.store import Store, open_store

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
STEPS, GROUPS, GROUP = 2, 4, 4
ADAPTERS = {"solver": "s", "checker": "c"}


@dataclass(frozen=True)
class Trained:
    store: Store
    metrics: list[dict[str, Any]]


def configuration(folder: Path, model: Path) -> dict[str, Any]:
    engine = {
        "url": f"http://127.0.0.1:{free_port()}",
        "dtype": "float32",
        "max_model_len": 256,
        "log": str(folder / "engine.log"),
    }
    return {
        "store": "sqlite:///trace.db",
        "models": {
            "tiny": {"checkpoint": str(model), "trained": False, "engine": engine},
            "s": {"adapter": {"of": "tiny", "rank": 8}},
            "c": {"adapter": {"of": "tiny", "rank": 4}},
        },
        "roles": ADAPTERS,
        "proxy": {"port": free_port(), "sampling": {"*": {"temperature": 1.0}}},
        "trainer": {
            "steps": STEPS,
            "output": str(folder),
            "precision": "fp32",
            "workers": {"threads": 1},
            "algorithm": {"credit": {"advantage": "grpo"}},
            "optimizer": {"lr": 1e-2},
            "batch": {"groups": GROUPS, "max_staleness": 1},
            "publish": {"probe_bound": 1e-3, "probe_tokens": 32},
        },
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("adapters")
    run_loop(folder, configuration(folder, tiny_model), group=GROUP, groups=GROUPS * STEPS, ahead=GROUPS)
    store = open_store(f"sqlite:///{folder / 'trace.db'}")
    metrics = [json.loads(line) for line in (folder / "main" / "metrics.jsonl").read_text().splitlines()]
    yield Trained(store, metrics)
    store.close()


def test_both_adapters_are_published_after_each_step_and_the_probes_see_them(trained: Trained) -> None:
    assert [line["step"] for line in trained.metrics] == [1, 2]
    for line in trained.metrics:
        assert set(line["publish"]) == {"s", "c"}
        for report in line["publish"].values():
            seen = report["result"]  # a digit and an end: too few tokens to be sure of a verdict, not of the figures
            assert seen["verdict"] in ("new", "unresolved") and seen["mean_abs_new"] < 1e-3 < seen["gap"], seen
        apart = [each["logprob_abs_diff"] for each in line["models"].values()]
        assert all(each is None or each < 1e-3 for each in apart), apart
    for model in ADAPTERS.values():
        live = trained.store.live_version(model)
        assert live is not None and live.step == STEPS
        canary = trained.store.list_publishes(model)[0].probe
        assert canary is not None and canary["canary"]["verdict"] == "new"


def test_every_call_knows_the_version_of_its_own_adapter(trained: Trained) -> None:
    """None failed or was quarantined while adapters were exchanged beside it; none was answered by the base."""
    runs = trained.store.list_runs(purpose="train", limit=1000)
    assert len(runs) == STEPS * GROUPS * GROUP
    seen: dict[str, set[int]] = {model: set() for model in ADAPTERS.values()}
    for trace in trained.store.traces([summary.run.run_id for summary in runs]):
        for call in trace.calls:
            assert (call.status, call.quarantine) == ("complete", None)
            assert call.model == ADAPTERS[str(call.attribution.role)]
            assert call.version_dispatched == call.version_completed is not None
            assert trained.store.get_version(call.version_dispatched).model == call.model
            seen[call.model].add(call.version_dispatched)
    assert all(len(versions) >= 2 for versions in seen.values()), seen


def test_tokens_are_conserved_over_both(trained: Trained) -> None:
    report = trained.store.consumption("main")
    assert report.conserved
    by_model = {m: sum(line["models"][m]["tokens_trained"] for line in trained.metrics) for m in ADAPTERS.values()}
    assert report.trained == sum(by_model.values()) and min(by_model.values()) > 0
