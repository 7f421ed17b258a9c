"""The whole loop on the tiny model, real in every part: app -> proxy -> store -> Ray PPO -> vLLM -> app.

`tracegrad up` supervises engine, proxy and trainer; `tracegrad rollout` drives an unmodified LangGraph app with two
roles on one shared model, sampling ahead so that weights are published under load. Once with the critic, once with
group-relative advantages.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from whole_loop import run_loop

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.store import Store, open_store

pytestmark = pytest.mark.engine

STEPS = 18
GROUPS = 16
GROUP = 8
RISE = 0.15
"""The mean sampled reward of the last quarter of the steps must exceed that of the first quarter by this."""


@dataclass(frozen=True)
class Trained:
    """What a finished loop left behind."""

    advantage: str
    store: Store
    metrics: list[dict[str, Any]]
    rollout: dict[str, Any]
    model: str = "tiny"


def _configuration(folder: Path, model: Path, advantage: str) -> dict[str, Any]:
    return {
        "store": "sqlite:///trace.db",
        "models": {
            "tiny": {
                "checkpoint": str(model),
                "engine": {
                    "url": f"http://127.0.0.1:{free_port()}",
                    "dtype": "float32",
                    "max_model_len": 256,
                    "max_num_seqs": 64,
                    "log": "engine.log",
                },
            }
        },
        "roles": {"solver": "tiny", "checker": "tiny"},
        "proxy": {"port": free_port(), "sampling": {"*": {"temperature": 1.0}}},
        "trainer": {
            "model": "tiny",
            "steps": STEPS,
            "output": str(folder),
            "precision": "fp32",
            "workers": {"threads": 1},
            "algorithm": {"credit": {"advantage": advantage}},
            "optimizer": {"lr": 4e-4, "critic_lr": 3e-3, "epochs": 2, "minibatches": 4},
            "batch": {"groups": GROUPS, "max_staleness": 1},
            "publish": {"probe_bound": 1e-4, "probe_tokens": 64},
        },
    }


@pytest.fixture(scope="module", params=["gae", "grpo"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Trained]:
    """Run the loop to its last step."""
    advantage: Literal["gae", "grpo"] = request.param
    folder = tmp_path_factory.mktemp(f"loop-{advantage}")
    rollout = run_loop(
        folder, _configuration(folder, tiny_model, advantage), group=GROUP, groups=GROUPS * STEPS, ahead=GROUPS * 3 // 2
    )
    store = open_store(f"sqlite:///{folder / 'trace.db'}")
    metrics = [json.loads(line) for line in (folder / "main" / "metrics.jsonl").read_text().splitlines()]
    yield Trained(advantage, store, metrics, rollout)
    store.close()


@pytest.mark.timeout(420)
def test_the_sampled_reward_rises(trained: Trained) -> None:
    rewards = [line["reward"] for line in trained.metrics]
    assert [line["step"] for line in trained.metrics] == list(range(1, STEPS + 1))
    quarter = STEPS // 4
    before, after = sum(rewards[:quarter]) / quarter, sum(rewards[-quarter:]) / quarter
    print(f"{trained.advantage}: sampled reward {before:.3f} -> {after:.3f}")
    assert after - before >= RISE, rewards


def test_the_trainer_agrees_with_the_engine_after_every_publish(trained: Trained) -> None:
    """fp32: what vLLM said when it sampled is what the trainer computes, version after version."""
    differences = [line["logprob_abs_diff"] for line in trained.metrics]
    measured = [value for value in differences if value is not None]
    assert len(measured) >= STEPS // 2
    assert max(measured) < 1e-4, differences


def test_every_version_went_live_and_the_probes_saw_the_new_weights(trained: Trained) -> None:
    """Late steps repeat themselves: few distinct answers make a small probe, which may only say "unresolved"."""
    verdicts = [line["publish"]["result"]["verdict"] for line in trained.metrics]
    assert set(verdicts) <= {"new", "unresolved"}
    assert verdicts.count("new") >= STEPS * 3 // 4, verdicts
    live = trained.store.live_version(trained.model)
    assert live is not None
    assert live.step == STEPS


def test_every_sampled_token_is_trained_or_excluded_for_a_reason(trained: Trained) -> None:
    report = trained.store.consumption("main")
    assert report.stored > 0
    assert report.stored == report.trained + sum(report.excluded.values())
    assert report.trained == sum(line["tokens_trained"] for line in trained.metrics)


def test_publishing_under_load_harmed_no_call(trained: Trained) -> None:
    """No run failed, no call spans two versions, and every one knows its version and its role."""
    assert trained.rollout["runs_failed"] == 0
    runs = trained.store.list_runs(purpose="train", limit=GROUPS * STEPS * GROUP)
    assert len(runs) == GROUPS * STEPS * GROUP
    versions = set()
    for trace in trained.store.traces([summary.run.run_id for summary in runs]):
        assert [call.attribution.role for call in trace.calls] == ["solver", "checker"]
        for call in trace.calls:
            assert call.quarantine is None
            assert call.version_dispatched == call.version_completed is not None
            versions.add(call.version_dispatched)
    assert len(versions) >= STEPS // 2
