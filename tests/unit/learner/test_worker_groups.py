"""Several models in one job: two adapters on one base and a full model, trained, saved, loaded and stopped as one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import msgspec
import numpy as np
import pytest
import recorded_runs as recorded
import torch
from safetensors.torch import load_file
from watched_steps import watched

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import BatchPlan, RunTrace
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.checkpoints import prune, remove_orphans, verify_checkpoint
from tracegrad.trainer.comparison import Statistics
from tracegrad.trainer.errors import (
    CheckpointError,
    NothingToTrain,
    StepRefused,
    TrainerError,
    WorkerDied,
    WorkerFailed,
)
from tracegrad.trainer.exchange import Told
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.model_group import ModelGroup
from tracegrad.trainer.results import StepResult
from tracegrad.trainer.samples import build_batch
from tracegrad.trainer.shares import Shares, share
from tracegrad.trainer.worker_groups import SavedModels, WorkerGroups

VERSIONS = {"p": 1, "w": 1, "solo": 1}


@pytest.fixture
def config(llama: Path, configure: Callable[..., Config]) -> Config:
    """`p` and `w` are adapters on `base`, `solo` is a full model; the planner is p's, the writer solo's."""
    raw = msgspec.to_builtins(configure(algorithm={"loss": {"kl_coef": 0.1}}))
    models = {
        "base": {"checkpoint": str(llama), "trained": False, "engine": {"dtype": "float32"}},
        "p": {"adapter": {"of": "base", "rank": 4}},
        "w": {"adapter": {"of": "base", "rank": 2, "targets": ["q_proj", "v_proj"]}},
        "solo": {"checkpoint": str(llama), "engine": {"dtype": "float32", "url": "http://127.0.0.1:8001"}},
    }
    return mapped(parse_config({**raw, "models": models, "roles": {}, "trainer": {**raw["trainer"], "model": ""}}))


def mapped(config: Config, planner: str = "p", writer: str = "solo") -> Config:
    return msgspec.structs.replace(config, roles={"planner": planner, "writer": writer})


def groups_of(config: Config) -> dict[str, ModelGroup]:
    return {name: ModelGroup(config, name) for name in config.worker_groups()}


def groups_of_job(config: Config, groups: Mapping[str, Any] | None = None) -> WorkerGroups:
    return WorkerGroups(groups if groups is not None else groups_of(config), config)


@pytest.fixture(scope="module")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunTrace]:
    """Two groups of runs; their logprobs are the base's, which every model is at step 0."""
    folder = tmp_path_factory.mktemp("scorer")
    scorer = Learner(recorded.configuration(llama, folder))
    scorer.create(str(folder))
    return recorded.traces_of(recorded.recorded_groups(2, score=scorer.score))


def shares_of(config: Config, runs: list[RunTrace]) -> Shares:
    """The runs as recorded under the configuration's role map."""

    def as_recorded(trace: RunTrace) -> RunTrace:
        calls = tuple(replace(call, model=config.roles[str(call.attribution.role)]) for call in trace.calls)
        return replace(trace, calls=calls)

    return share(
        [as_recorded(trace) for trace in runs],
        config.trained_models(),
        lambda traces, model: build_batch(traces, lease_rule(config, model=model)),
    )


def plan(step: int = 1) -> BatchPlan:
    return BatchPlan(step=step, epoch=0, seed=5 + step, run_ids=("r",))


def apply(workers: WorkerGroups, shares: Shares, step: int = 1) -> dict[str, StepResult]:
    return workers.step(plan(step), shares, version_ids=VERSIONS, probe_tokens=8)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    state = {**learner.policy.lm_state(), **learner.policy.value_state()}
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def learners(groups: Mapping[str, ModelGroup]) -> dict[str, Learner]:
    return {model: learner for group in groups.values() for model, learner in group.learners.items()}


def test_adapters_of_one_base_hold_it_once(config: Config, tmp_path: Path) -> None:
    groups = groups_of(config)
    groups_of_job(config, groups).create(str(tmp_path))
    assert set(groups) == {"base", "solo"}
    of = learners(groups)
    assert of["p"].policy.lm is of["w"].policy.lm is not of["solo"].policy.lm
    assert of["p"]._optimizer is not of["w"]._optimizer


def test_each_model_trains_on_its_own_tokens_and_the_rest_stay_bitwise(
    config: Config, runs: list[RunTrace], tmp_path: Path
) -> None:
    groups = groups_of(config)
    workers, of = groups_of_job(config, groups), learners(groups)
    workers.create(str(tmp_path))
    before = {model: weights(learner) for model, learner in of.items()}
    shares = shares_of(config, runs)
    results = apply(workers, shares)
    assert set(results) == {"p", "solo"}, "no role of these runs is w's"
    for model, result in results.items():
        assert result.metrics["tokens_trained"] == shares.by_model[model].n_trained_tokens > 0
    assert {model: not equal(before[model], weights(of[model])) for model in of} == {
        "p": True,
        "w": False,
        "solo": True,
    }


def test_an_adapter_in_company_learns_what_it_learns_alone(
    config: Config, runs: list[RunTrace], tmp_path: Path
) -> None:
    both = mapped(config, "p", "w")
    groups = groups_of(both)
    workers = groups_of_job(both, groups)
    workers.create(str(tmp_path / "workers"))
    shares = shares_of(both, runs)
    apply(workers, shares, 1)
    apply(workers, shares, 2)
    for model, together in learners(groups).items():
        if model != "solo":
            alone = Learner(both, model)
            alone.create(str(tmp_path / model))
            for step in (1, 2):
                alone.step(plan(step), shares.by_model[model], version_id=1, probe_tokens=8)
            assert equal(weights(alone), weights(together))


def test_one_manifest_holds_all_models_and_a_loaded_job_goes_on_bitwise(
    config: Config, runs: list[RunTrace], tmp_path: Path
) -> None:
    first, other = groups_of_job(config), groups_of_job(config)
    shares = shares_of(config, runs)
    first.create(str(tmp_path / "a"))
    apply(first, shares)
    saved = first.save(str(tmp_path / "a"), 1)
    folder = Path(saved.checkpoint.path)
    assert {model: each.path for model, each in saved.by_model.items()} == {
        m: str(folder / m) for m in ("p", "w", "solo")
    }
    assert all(len(saved.by_model[model].new) > 0 for model in ("p", "solo"))
    manifest = verify_checkpoint(folder / "p", saved.checkpoint.hash)
    assert set(manifest["facts"]["models"]) == {"p", "w", "solo"}
    assert {name.split("/")[0] for name in manifest["files"]} == {"p", "w", "solo"}
    assert (folder / "p/adapter_config.json").exists() and (folder / "solo/config.json").exists()
    assert other.load(saved.by_model["p"].path, saved.checkpoint.hash) == 1
    second = [
        apply(workers, shares, 2) and workers.save(str(tmp_path / n), 2) for n, workers in (("b", first), ("c", other))
    ]
    assert second[0].checkpoint.hash == second[1].checkpoint.hash, "weights, critics, moments and history are equal"


def test_recomputing_activations_changes_no_bit(config: Config, runs: list[RunTrace], tmp_path: Path) -> None:
    """Also of two adapters on one trunk, each of which must recompute as itself."""
    both = mapped(config, "p", "w")
    batch = msgspec.structs.replace(both.trainer.batch, gradient_checkpointing=True)
    thrifty = msgspec.structs.replace(both, trainer=msgspec.structs.replace(both.trainer, batch=batch))
    found = []
    for each in (both, thrifty):
        groups = groups_of(each)
        workers = groups_of_job(each, groups)
        workers.create(str(tmp_path / str(len(found))))
        apply(workers, shares_of(each, runs))
        assert groups["base"].learners["p"].policy.lm.is_gradient_checkpointing is (each is thrifty)
        found.append({model: weights(learner) for model, learner in learners(groups).items()})
    assert all(equal(found[0][model], found[1][model]) for model in found[0])


def test_bf16_masters_survive_the_checkpoint_bitwise(config: Config, runs: list[RunTrace], tmp_path: Path) -> None:
    engine = msgspec.structs.replace(config.models["base"].engine, dtype="bfloat16")
    models = {**config.models, "base": msgspec.structs.replace(config.models["base"], engine=engine)}
    rounded = msgspec.structs.replace(
        config, models=models, trainer=msgspec.structs.replace(config.trainer, precision="bf16")
    )
    groups, again = groups_of(rounded), groups_of(rounded)
    workers = groups_of_job(rounded, groups)
    workers.create(str(tmp_path))
    apply(workers, shares_of(rounded, runs))
    saved = workers.save(str(tmp_path), 1)
    groups_of_job(rounded, again).load(saved.checkpoint.path)
    assert equal(weights(learners(groups)["p"]), weights(learners(again)["p"]))
    served = load_file(Path(saved.by_model["p"].path) / "adapter_model.safetensors")
    masters = learners(groups)["p"].policy.lm_state()
    assert all(torch.equal(served[name], master.bfloat16()) for name, master in masters.items())


def test_a_damaged_file_of_one_model_refuses_them_all(config: Config, tmp_path: Path) -> None:
    saved = groups_of_job(config).create(str(tmp_path))
    broken = Path(saved.by_model["w"].path) / "adapter_model.safetensors"
    raw = bytearray(broken.read_bytes())
    raw[-1] ^= 1
    broken.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match=r"w/adapter_model\.safetensors differ"):
        groups_of_job(config).load(saved.checkpoint.path, saved.checkpoint.hash)


def test_a_checkpoint_of_other_models_is_refused(config: Config, tmp_path: Path) -> None:
    saved = groups_of_job(config).create(str(tmp_path))
    fewer = msgspec.structs.replace(config, models={name: m for name, m in config.models.items() if name != "w"})
    with pytest.raises(CheckpointError, match="holds p, solo, w, the job trains p, solo"):
        groups_of_job(fewer).load(saved.checkpoint.path)


def test_a_checkpoint_of_one_model_as_they_were_first_is_gone_on_from(config: Config, tmp_path: Path) -> None:
    """It holds its model at its top."""
    alone = msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, model="solo"))
    learner = Learner(alone, "solo")
    made = learner.create(str(tmp_path))
    groups = groups_of(alone)
    assert groups_of_job(alone, groups).load(made.path, made.hash) == 0
    assert equal(weights(learner), weights(learners(groups)["solo"]))
    with pytest.raises(CheckpointError, match="holds solo, the job trains p, w, solo"):
        groups_of_job(config).load(made.path, made.hash)


def poisoned(shares: Shares, model: str) -> Shares:
    samples = shares.by_model[model]
    first = samples.choices[0]
    bad = replace(first, behaviour_logprobs=(float("nan"),) * len(first.token_ids))
    return replace(shares, by_model={**shares.by_model, model: replace(samples, choices=(bad, *samples.choices[1:]))})


@pytest.mark.parametrize("model", ["p", "solo"])
def test_one_model_that_refuses_stops_the_step_for_all(
    config: Config, runs: list[RunTrace], tmp_path: Path, model: str
) -> None:
    """Afterwards nothing but a load is taken; then the job goes on as if the bad step had never been."""
    shares = shares_of(config, runs)
    workers, undisturbed = groups_of_job(config), groups_of_job(config)
    start = workers.create(str(tmp_path / "a"))
    undisturbed.create(str(tmp_path / "b"))
    with pytest.raises(StepRefused, match="not finite"):
        apply(workers, poisoned(shares, model))
    for refused in (lambda: apply(workers, shares), lambda: workers.save(str(tmp_path / "a"), 1)):
        with pytest.raises(TrainerError, match="load a checkpoint"):
            refused()
    workers.load(start.checkpoint.path, start.checkpoint.hash)
    made = [apply(each, shares) and each.save(str(tmp_path / "c"), 1) for each in (workers, undisturbed)]
    assert made[0].checkpoint.hash == made[1].checkpoint.hash


def test_nothing_to_train_for_any_model_is_refused_and_changes_nothing(
    config: Config, runs: list[RunTrace], tmp_path: Path
) -> None:
    workers = groups_of_job(config)
    workers.create(str(tmp_path))
    silent = shares_of(config, [replace(trace, rewards=()) for trace in runs])
    with pytest.raises(NothingToTrain, match=r"nothing to train in 1 runs.*no reward"):
        apply(workers, silent)
    apply(workers, shares_of(config, runs))


class Fake:
    """A group that meets the other in `step`, or fails there."""

    def __init__(self, meet: Barrier, fails: Exception | None = None) -> None:
        self._meet, self._fails = meet, fails

    def start(self) -> None: ...

    def write(self, folder: str) -> dict[str, Any]:
        return {}

    def step(self, *_: Any, **__: Any) -> dict[str, StepResult]:
        self._meet.wait(timeout=5.0)
        if self._fails is not None:
            raise self._fails
        return {}


def test_groups_step_in_parallel(config: Config, runs: list[RunTrace], tmp_path: Path) -> None:
    """Each waits inside its step for the other: one after the other would never end."""
    meet = Barrier(2)
    workers = groups_of_job(config, {"base": Fake(meet), "solo": Fake(meet)})
    workers.create(str(tmp_path))
    apply(workers, shares_of(config, runs))
    assert not meet.broken


def test_a_group_that_waits_is_told_when_another_has_failed(
    config: Config, runs: list[RunTrace], tmp_path: Path
) -> None:
    meet, stop = Barrier(2), Event()

    class Waits(Fake):
        def step(self, *_: Any, **__: Any) -> dict[str, StepResult]:
            self._meet.wait(timeout=5.0)
            assert stop.wait(timeout=5.0), "nobody said that the step is over"
            raise WorkerFailed("given up")

    groups = {"base": Waits(meet), "solo": Fake(meet, WorkerFailed("the worker of solo died"))}
    workers = WorkerGroups(groups, config, stop)
    workers.create(str(tmp_path))
    with pytest.raises(WorkerFailed, match="solo died"):
        apply(workers, shares_of(config, runs))


def with_algorithm(config: Config, credit: Mapping[str, Any], **loss: Any) -> Config:
    raw = msgspec.to_builtins(config)
    raw["trainer"]["algorithm"] = {"credit": {"advantage": "gae", **credit}, "loss": loss}
    return parse_config(raw)


@pytest.mark.parametrize(
    "credit",
    [{"normalise": "batch"}, {"normalise": "model"}, {"normalise": "batch", "bootstrap": "all", "scope": "graph"}],
)
def test_advantages_of_a_batch_are_normalised_over_all_its_models(
    config: Config, runs: list[RunTrace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credit: dict[str, str]
) -> None:
    """Also where a model's group learns the others' only by asking; nothing is evaluated twice for it."""
    seen = watched(monkeypatch)
    config = with_algorithm(config, credit, kl_coef=0.1, kl_in="reward")
    workers = groups_of_job(config)
    workers.create(str(tmp_path))
    apply(workers, shares_of(config, runs))
    assert sorted(seen.evaluations) == ["policy"] * 2 + ["reference"] * 2
    given = [step.credit.advantages_N for step in seen.steps]
    assert len(given) == 2
    for together in [np.concatenate(given)] if credit["normalise"] == "batch" else given:
        assert abs(together.mean()) < 1e-9 and abs(together.std(ddof=1) - 1) < 1e-4
    if credit["normalise"] == "batch":
        assert max(abs(apart.mean()) for apart in given) > 0.01


def test_a_step_that_was_not_begun_cannot_go_on(config: Config, runs: list[RunTrace], tmp_path: Path) -> None:
    groups = groups_of(config)
    groups_of_job(config, groups).create(str(tmp_path))
    samples, told = shares_of(config, runs).by_model, Told(batch=Statistics(3, 0.0, 1.0))
    with pytest.raises(TrainerError, match="step 2 was not begun"):
        groups["solo"].step(plan(2), samples, version_ids=VERSIONS, told=told)
    groups["solo"].appraise(plan(1), samples)
    with pytest.raises(TrainerError, match="step 2 was not begun"):
        groups["solo"].step(plan(2), samples, version_ids=VERSIONS, told=told)


@pytest.mark.parametrize(("deaths", "at"), [(1, "step"), (2, "step"), (1, "values")])
def test_a_step_in_which_a_worker_died_is_begun_again_once(
    config: Config, runs: list[RunTrace], tmp_path: Path, deaths: int, at: str
) -> None:
    """From the checkpoint that it began with: the other group, which had gone on by then, forgets it."""

    class Dies(ModelGroup):
        left = deaths

        def die(self, where: str) -> None:
            if self.left and at == where:
                self.left -= 1
                raise WorkerDied("a worker of base died")

        def values(self, *args: Any, **kwargs: Any) -> Any:
            self.die("values")
            return super().values(*args, **kwargs)

        def step(self, *args: Any, **kwargs: Any) -> dict[str, StepResult]:
            self.die("step")
            return super().step(*args, **kwargs)

    if at == "values":
        config = with_algorithm(config, {"scope": "graph", "bootstrap": "all"})
    shares = shares_of(config, runs)
    undisturbed = groups_of_job(config)
    undisturbed.create(str(tmp_path / "a"))
    apply(undisturbed, shares)
    workers = groups_of_job(config, {"base": Dies(config, "base"), "solo": ModelGroup(config, "solo")})
    workers.create(str(tmp_path / "b"))
    if deaths == 2:
        with pytest.raises(WorkerDied, match="of base died"):
            apply(workers, shares)
        with pytest.raises(TrainerError, match="load a checkpoint"):
            workers.save(str(tmp_path / "b"), 1)
        return
    results = apply(workers, shares)
    assert {result.metrics["workers_restarted"] for result in results.values()} == {1}
    made = [each.save(str(tmp_path / "c"), 1).checkpoint.hash for each in (undisturbed, workers)]
    assert made[0] == made[1]


def test_folders_of_several_models_are_kept_by_the_path_of_any(config: Config, tmp_path: Path) -> None:
    workers = groups_of_job(config)
    workers.create(str(tmp_path))
    made = [workers.save(str(tmp_path), step) for step in (1, 2, 3)]

    def folder(saved: SavedModels) -> str:
        return Path(saved.checkpoint.path).name

    removed = prune(tmp_path, keep_last=1, protected=[made[0].by_model["w"].path])
    assert removed == [folder(made[1])]
    assert remove_orphans(tmp_path, [made[2].by_model["p"].path])[-1] == folder(made[0])
    assert Path(made[2].checkpoint.path).exists()


def test_the_canary_of_a_new_adapter_is_seen(config: Config, tmp_path: Path) -> None:
    """B is all zeros: noise relative to its spread would change nothing. Afterwards the adapter is as it was."""
    groups = groups_of(config)
    groups_of_job(config, groups).create(str(tmp_path))
    learner = learners(groups)["p"]
    before = weights(learner)
    saved = groups["base"].perturbed("p", str(tmp_path), 0.02, learner.probe_sequences(16, 0), 0)
    assert (Path(saved.checkpoint.path) / "adapter_model.safetensors").exists()
    assert equal(before, weights(learner))
