"""Worker groups in processes of their own: the same bits as in one process, and one death stops them all."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded_runs as recorded

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.errors import StepRefused, TrainerError, WorkerFailed
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.model_group import ModelGroup
from tracegrad.trainer.ray_groups import ray_groups
from tracegrad.trainer.samples import build_batch
from tracegrad.trainer.shares import Shares, share
from tracegrad.trainer.worker_groups import WorkerGroups

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long"),
    pytest.mark.timeout(600),
]
PLAN = BatchPlan(step=1, epoch=0, seed=3, run_ids=("r",))


def configured(folder: Path) -> Config:
    """The planner trains an adapter on the base, the writer a full model: two groups."""
    llama = str(recorded.random_llama(folder / "llama"))
    engine = {"dtype": "float32"}
    models = {
        "base": {"checkpoint": llama, "trained": False, "engine": engine},
        "p": {"adapter": {"of": "base", "rank": 4}},
        "solo": {"checkpoint": llama, "engine": engine},
    }
    rates = {"lr": 1e-2, "critic_lr": 1e-2}
    trainer: dict[str, Any] = {"precision": "fp32", "workers": {"threads": 1}, "optimizer": rates}
    return parse_config({"models": models, "roles": {"planner": "p", "writer": "solo"}, "trainer": trainer})


def shares_of(config: Config, folder: Path) -> Shares:
    scorer = Learner(recorded.configuration(folder / "llama", folder / "scorer"))
    scorer.create(str(folder / "scorer"))
    traces = [
        replace(
            trace,
            calls=tuple(replace(call, model=config.roles[str(call.attribution.role)]) for call in trace.calls),
        )
        for trace in recorded.traces_of(recorded.recorded_groups(2, score=scorer.score))
    ]
    build = lambda given, model: build_batch(given, lease_rule(config, model=model))  # noqa: E731
    return share(traces, config.trained_models(), build)


def step(workers: WorkerGroups, shares: Shares) -> None:
    results = workers.step(PLAN, shares, version_ids={"p": 1, "solo": 1}, probe_tokens=8)
    assert set(results) == {"p", "solo"}


def test_groups_in_processes_train_the_same_bits_and_one_death_stops_all(tmp_path: Path) -> None:
    config = configured(tmp_path)
    shares = shares_of(config, tmp_path)
    here = WorkerGroups({name: ModelGroup(config, name) for name in config.worker_groups()}, config.worker_groups())
    here.create(str(tmp_path / "here"))
    step(here, shares)
    expected = here.save(str(tmp_path / "here"), 1).checkpoint.hash

    with ray_groups(config) as (workers, groups):
        assert set(groups) == {"base", "solo"}
        start = workers.create(str(tmp_path / "there"))
        step(workers, shares)
        assert workers.save(str(tmp_path / "there"), 1).checkpoint.hash == expected

        first = shares.by_model["solo"].choices[0]
        bad = replace(first, behaviour_logprobs=(float("nan"),) * len(first.token_ids))
        samples = replace(shares.by_model["solo"], choices=(bad, *shares.by_model["solo"].choices[1:]))
        with pytest.raises(StepRefused, match="not finite"):
            step(workers, replace(shares, by_model={**shares.by_model, "solo": samples}))
        assert workers.load(start.checkpoint.path, start.checkpoint.hash) == 0
        step(workers, shares)
        assert workers.save(str(tmp_path / "again"), 1).checkpoint.hash == expected

        os.kill(groups["solo"].process(), signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="worker of group 'solo' died"):
            step(workers, shares)
        with pytest.raises(TrainerError, match="load a checkpoint"):
            workers.save(str(tmp_path / "there"), 2)
