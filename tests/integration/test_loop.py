"""The whole loop on the tiny model, real in every part: app -> proxy -> store -> Ray PPO -> vLLM -> app.

`tracegrad up` supervises engine, proxy and trainer; `tracegrad rollout` drives an unmodified LangGraph app with two
roles on one shared model, sampling ahead so that weights are published under load. With the critic; without one, and
with other role maps, it learns in test_roles_learn.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from whole_loop import GROUP, GROUPS, LR, STEPS, configuration, gain, metrics_of, run_loop

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.store import Store, open_store

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]


@dataclass(frozen=True)
class Trained:
    """What a finished loop left behind."""

    store: Store
    metrics: list[dict[str, Any]]
    rollout: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Trained]:
    """Run the loop to its last step."""
    folder = tmp_path_factory.mktemp("loop")
    engine = {
        "url": f"http://127.0.0.1:{free_port()}",
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 64,
        "log": "engine.log",
    }
    configured = configuration(
        folder,
        {"tiny": {"checkpoint": str(tiny_model), "engine": engine}},
        {"solver": "tiny", "checker": "tiny"},
        lr=LR,
        credit={"advantage": "gae"},
    )
    configured["trainer"]["publish"] = {"probe_bound": 1e-4, "probe_tokens": 64}
    rollout = run_loop(folder, configured, reward="together")
    store = open_store(f"sqlite:///{folder / 'trace.db'}")
    yield Trained(store, metrics_of(folder), rollout)
    store.close()


def test_two_roles_that_must_cooperate_learn_on_one_model(trained: Trained) -> None:
    """Only where both do their part does either earn anything, and the parts differ."""
    assert [line["step"] for line in trained.metrics] == list(range(1, STEPS + 1))
    before, after = gain(trained.metrics, "checker")
    assert before < 0.25 and after > 0.4


def test_the_trainer_agrees_with_the_engine_after_every_publish(trained: Trained) -> None:
    """fp32: what vLLM said when it sampled is what the trainer computes, version after version."""
    differences = [line["logprob_abs_diff"] for line in trained.metrics]
    measured = [value for value in differences if value is not None]
    assert len(measured) >= STEPS // 2
    assert max(measured) < 1e-4, differences


def test_what_top_k_left_of_the_checkers_digits_is_replayed(trained: Trained) -> None:
    """So its choices train, and the figures above hold for them; the solver sampled from everything."""
    for summary in trained.store.list_runs(purpose="train", limit=20):
        solver, checker = (call.choices[0] for call in trained.store.trace(summary.run.run_id).calls)
        assert solver.kept_ids is None and checker.kept_ids is not None
        assert all(1 <= len(kept) <= 9 for kept in checker.kept_ids)
    assert "truncated sampling" not in trained.store.consumption("main").excluded


def test_every_version_went_live_and_the_probes_saw_the_new_weights(trained: Trained) -> None:
    """Late steps repeat themselves: few distinct answers make a small probe, which may only say "unresolved"."""
    verdicts = [line["publish"]["result"]["verdict"] for line in trained.metrics]
    assert set(verdicts) <= {"new", "unresolved"}
    assert verdicts.count("new") >= STEPS * 3 // 4, verdicts
    live = trained.store.live_version("tiny")
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
    runs = trained.store.list_runs(purpose="train", limit=GROUPS * STEPS * GROUP + 1)
    assert len(runs) == GROUPS * STEPS * GROUP
    versions = set()
    for trace in trained.store.traces([summary.run.run_id for summary in runs]):
        assert [call.attribution.role for call in trace.calls] == ["solver", "checker"]
        for call in trace.calls:
            assert call.quarantine is None
            assert call.version_dispatched == call.version_completed is not None
            versions.add(call.version_dispatched)
    assert len(versions) >= STEPS // 2
