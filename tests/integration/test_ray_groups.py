"""Several workers in a group, as Ray actors: they train what one process trains, and the death of one stops nothing."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from typing import Any

import numpy as np
import pytest
import recorded_runs as recorded
from safetensors.numpy import load_file

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.checkpoints import list_checkpoints
from tracegrad.trainer.errors import StepRefused, WorkerDied, WorkerFailed
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.model_group import ModelGroup
from tracegrad.trainer.ray_cluster import places, ray_running
from tracegrad.trainer.ray_groups import ray_groups
from tracegrad.trainer.ray_team import RayTeam
from tracegrad.trainer.results import StepResult
from tracegrad.trainer.samples import build_batch
from tracegrad.trainer.shares import Shares, share
from tracegrad.trainer.worker_groups import WorkerGroups

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def cluster() -> Iterator[str]:
    """Two nodes of two CPUs, each with a Ray of its own; the address of the first."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    yield nodes.address
    nodes.shutdown()


PLAN = BatchPlan(step=1, epoch=0, seed=3, run_ids=("r",))


def configured(folder: Path, per_group: int) -> Config:
    """The planner trains an adapter on the base, the writer a full model: two groups, which tell their values."""
    llama = str(recorded.random_llama(folder / "llama"))
    engine = {"dtype": "float32"}
    models = {
        "base": {"checkpoint": llama, "trained": False, "engine": engine},
        "p": {"adapter": {"of": "base", "rank": 4}},
        "solo": {"checkpoint": llama, "engine": {**engine, "url": "http://127.0.0.1:8001"}},
    }
    workers = {"threads": 1, "per_group": per_group}
    trainer: dict[str, Any] = {"precision": "fp32", "workers": workers, "optimizer": {"lr": 1e-3, "critic_lr": 1e-3}}
    trainer["algorithm"] = {"credit": {"scope": "graph", "bootstrap": "all"}}
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


def step(workers: WorkerGroups, shares: Shares) -> dict[str, StepResult]:
    results = workers.step(PLAN, shares, version_ids={"p": 1, "solo": 1}, probe_tokens=8)
    assert set(results) == {"p", "solo"}
    return results


def poisoned(shares: Shares) -> Shares:
    samples = shares.by_model["solo"]
    first = samples.choices[0]
    bad = replace(first, behaviour_logprobs=(float("nan"),) * len(first.token_ids))
    return replace(shares, by_model={**shares.by_model, "solo": replace(samples, choices=(bad, *samples.choices[1:]))})


def tensors(folder: str) -> dict[str, np.ndarray[Any, Any]]:
    files = sorted(Path(folder).rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{name}": value for f in files for name, value in load_file(f).items()}


def test_two_workers_of_one_model_go_on_where_one_was_killed(tmp_path: Path) -> None:
    """Two steps of two workers; one is killed in the second, and the bits are those of an undisturbed job."""
    base = recorded.random_llama(tmp_path / "llama")
    config = recorded.configuration(base, tmp_path / "out", workers={"threads": 1, "per_group": 2})
    hashes: list[str] = []
    with ray_groups(config) as (workers, groups):
        workers.create(str(tmp_path / "made"))

        def score(sequences: Any, _temperature: float) -> Any:
            return groups[recorded.MODEL].score(recorded.MODEL, tuple(sequences))

        traces = recorded.traces_of(recorded.recorded_groups(2, score=score))
        rule = lease_rule(config)
        shares = share(traces, rule.models, lambda given, model: build_batch(given, rule.of(model)))

        def train(folder: str, plan: BatchPlan, killed: float | None = None) -> StepResult:
            if killed is not None:
                pid = groups[recorded.MODEL].processes()[1]
                Timer(killed, os.kill, (pid, signal.SIGKILL)).start()
            done = workers.step(plan, shares, version_ids={recorded.MODEL: 1}, probe_tokens=8)[recorded.MODEL]
            hashes.append(workers.save(str(tmp_path / folder), plan.step).checkpoint.hash)
            return done

        second = replace(PLAN, step=2)
        train("made", PLAN)
        first = list_checkpoints(tmp_path / "made")[-1]
        train("made", second)
        workers.load(str(first), hashes[0])
        assert train("killed", second, killed=0.0).metrics["workers_restarted"] == 1
        assert hashes[1] == hashes[2]


def test_a_job_joins_a_cluster_trains_there_and_leaves_it_running(tmp_path: Path, cluster: str) -> None:
    """A worker for each base model, on nodes that were there before: the bits that one process makes."""
    config = configured(tmp_path, per_group=1)
    shares = shares_of(config, tmp_path)
    here = WorkerGroups({name: ModelGroup(config, name) for name in config.worker_groups()}, config)
    here.create(str(tmp_path / "here"))
    step(here, shares)
    with ray_groups(config, address=cluster) as (workers, groups):
        assert os.getpid() not in {pid for group in groups.values() for pid in group.processes()}
        workers.create(str(tmp_path / "there"))
        step(workers, shares)
        made = workers.save(str(tmp_path / "there"), 1).checkpoint
    assert made.hash == here.save(str(tmp_path / "here"), 1).checkpoint.hash
    with ray_running(cluster, 1):
        import ray

        assert ray.cluster_resources()["CPU"] == 4, "the cluster went with the job that had joined it"


@pytest.mark.long
@pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long")
def test_groups_of_two_workers_train_what_one_process_trains(tmp_path: Path, cluster: str) -> None:
    """In a cluster of two nodes that was there before: four processes. A death in a step costs nothing but time."""
    config = configured(tmp_path, per_group=2)
    shares = shares_of(config, tmp_path)
    here = WorkerGroups({name: ModelGroup(config, name) for name in config.worker_groups()}, config)
    here.create(str(tmp_path / "here"))
    step(here, shares)
    expected = tensors(here.save(str(tmp_path / "here"), 1).checkpoint.path)

    with ray_groups(config, address=cluster) as (workers, groups):
        assert set(groups) == {"base", "solo"}
        assert len({pid for group in groups.values() for pid in group.processes()}) == 4
        start = workers.create(str(tmp_path / "there"))
        step(workers, shares)
        made = workers.save(str(tmp_path / "there"), 1).checkpoint
        found = tensors(made.path)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0.0, atol=1e-5, err_msg=name)

        workers.load(start.checkpoint.path, start.checkpoint.hash)
        with pytest.raises(StepRefused, match="not finite"):
            step(workers, poisoned(shares))
        before = groups["solo"].processes()
        assert workers.load(start.checkpoint.path, start.checkpoint.hash) == 0

        os.kill(groups["base"].processes()[1], signal.SIGKILL)
        results = step(workers, shares)
        assert {result.metrics["workers_restarted"] for result in results.values()} == {1}
        assert groups["solo"].processes() == before, "a refusal and another group's death end no process"
        assert workers.save(str(tmp_path / "again"), 1).checkpoint.hash == made.hash


def odd() -> Any:
    """Make what a worker holds, without weights, that fails where it is told to. Local, so that it travels by value."""

    class Odd:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def say(self) -> int:
            return self.rank

        def refuse(self, ranks: tuple[int, ...]) -> None:
            """These refuse, and the others wait for them as in a collective."""
            if self.rank in ranks:
                raise StepRefused("no")
            time.sleep(600.0)

        def fail(self) -> None:
            raise KeyError("a bug")

        def die(self, rank: int) -> None:
            if self.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600.0)

    return lambda _config, ranks: Odd(ranks.rank)


@pytest.mark.long
@pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long")
def test_what_one_worker_does_becomes_of_all(tmp_path: Path) -> None:
    """Refused by all: they live on. One that refuses, fails or dies alone takes the others along, and all come anew."""
    config = recorded.configuration(tmp_path, tmp_path, workers={"threads": 1, "per_group": 2})
    with ray_running(None, 2):
        ((_, where),) = places(["odd"], config.trainer.workers, address=None)
        team = RayTeam(odd(), config, what="model 'odd'", places=where)
        first = team.processes()
        assert team.call("say") == 0, "the first speaks for all"
        with pytest.raises(StepRefused, match="no"):
            team.call("refuse", (0, 1))
        assert team.processes() == first
        stop = Event()
        Timer(1.0, stop.set).start()
        with pytest.raises(WorkerFailed, match="refuse of model 'odd' is given up: another group has failed"):
            team.call("refuse", (), stop=stop)
        team.end()
        lives = [team.processes()]
        for method, arguments, error, says in (
            ("refuse", (1,), StepRefused, "no"),
            ("fail", None, WorkerFailed, "fail of model 'odd' failed in a worker: KeyError: 'a bug'"),
            ("die", 1, WorkerDied, "a worker died during die of model 'odd'"),
        ):
            with pytest.raises(error, match=says):
                team.call(method, *(() if arguments is None else (arguments,)))
            lives.append(team.processes())
        assert len({pid for processes in lives for pid in processes}) == 2 * len(lives), "all of them, each time"
        assert team.call("say") == 0
