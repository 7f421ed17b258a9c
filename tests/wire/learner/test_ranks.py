"""Several workers of one group (FSDP2 over gloo): they compute what one computes, and write what one writes."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import recorded_runs as recorded
from ranked import Canary, Crew, Ruined, Train
from safetensors.numpy import load_file

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.ranks import ALONE
from tracegrad.trainer.run_graph import linked
from tracegrad.trainer.samples import Samples, build_batch

PLANS = tuple(BatchPlan(step=step, epoch=0, seed=step, run_ids=("r",)) for step in (1, 2))


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    with Crew(tmp_path_factory.mktemp("crew")) as crew:
        yield crew


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded.random_llama(tmp_path_factory.mktemp("base"), tied=True)


@pytest.fixture(scope="module")
def samples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Five groups of four runs: an odd number, so that no division is even."""
    folder = tmp_path_factory.mktemp("scorer")
    config = recorded.configuration(base, folder)
    scorer = Learner(config)
    scorer.create(str(folder))
    return build_batch(recorded.traces_of(recorded.recorded_groups(5, score=scorer.score)), lease_rule(config))


def full(base: Path, **trainer: Any) -> Config:
    """One full model with a critic and a reference; gradients as they are, unclipped."""
    algorithm = {"credit": {"advantage": "gae"}, "loss": {"kl_coef": 0.1, "entropy_coef": 0.01}}
    settings = {"algorithm": algorithm, "optimizer": {"lr": 1e-3, "max_grad_norm": 1e6}, **trainer}
    return recorded.configuration(base, base, **settings)


def adapters(base: Path, **trainer: Any) -> Config:
    """Two adapters on one base, which train on the same samples."""
    raw = msgspec.to_builtins(full(base, **trainer))
    models = {
        "base": {"checkpoint": str(base), "trained": False, "engine": {"dtype": "float32"}},
        "p": {"adapter": {"of": "base", "rank": 4}},
        "w": {"adapter": {"of": "base", "rank": 2, "targets": ["q_proj", "v_proj"]}},
    }
    return parse_config({**raw, "models": models, "roles": {}, "trainer": {**raw["trainer"], "model": ""}})


def task(config: Config, samples: Samples, plans: tuple[BatchPlan, ...] = PLANS[:1], **more: Any) -> Train:
    (group,) = config.worker_groups()
    given = dict.fromkeys(config.trained_models(), samples)
    return Train(config=config, group=group, samples=given, plans=plans, **more)


def same_gradients(one: Mapping[str, Any], other: Mapping[str, Any], within: float) -> None:
    assert one["gradients"].keys() == other["gradients"].keys()
    for model, gradients in one["gradients"].items():
        assert gradients.keys() == other["gradients"][model].keys() and gradients
        for name, gradient in gradients.items():
            assert np.abs(gradient).max() > 0.0 or "value_head" in name or "lora_A" in name, name
            np.testing.assert_allclose(other["gradients"][model][name], gradient, rtol=0.0, atol=within, err_msg=name)


def same_metrics(one: Any, other: Any, within: float = 1e-5) -> None:
    """Numbers of one step, role by role; but for what counts computed tokens, time and memory."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "memory_bytes", "tokens_computed", "efficiency"}:
            same_metrics(one[name], other[name], within)
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            same_metrics(left, right, within)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=within, abs=within, nan_ok=True)
    else:
        assert one == other


@pytest.mark.parametrize(("make", "size"), [(full, 2), (full, 3), (adapters, 2)])
def test_gradients_and_metrics_are_those_of_one_worker(
    crew: Crew, base: Path, samples: Samples, make: Any, size: int
) -> None:
    given = task(make(base), samples)
    alone, together = given(ALONE), crew.run(size, given)
    for each in together:
        same_gradients(alone, each, 1e-5)
        same_metrics(alone["metrics"], each["metrics"])
        same_metrics(together[0]["metrics"], each["metrics"], within=0.0)
    for model in alone["shares"]:
        held = [each["shares"][model] for each in together]
        assert sum(held) == pytest.approx(1.0), "each holds a part of masters and moments"
        assert min(held) > 0.8 / size


def test_critics_tell_on_every_rank_what_they_tell_on_one(crew: Crew, base: Path, samples: Samples) -> None:
    """The planner's adapter is credited with what the critic of the writer's says of the call that follows."""

    def of(role: str) -> Samples:
        calls = {choice.call_id for choice in samples.choices if choice.role == role}
        return replace(
            samples,
            choices=tuple(choice for choice in samples.choices if choice.call_id in calls),
            consumption=tuple(entry for entry in samples.consumption if entry.call_id in calls),
            graphs={run_id: linked(g.nodes, [[n.call_id for n in g.nodes]]) for run_id, g in samples.graphs.items()},
        )

    def given(bootstrap: str) -> Train:
        credit = {"advantage": "gae", "scope": "graph", "bootstrap": bootstrap}
        config = adapters(base, algorithm={"credit": credit})
        return replace(task(config, samples), samples={"p": of("planner"), "w": of("writer")})

    alone, apart = given("all")(ALONE), given("own")(ALONE)
    assert alone["metrics"]["p"][0]["advantage_std"] != apart["metrics"]["p"][0]["advantage_std"]
    for each in crew.run(2, given("all")):
        same_gradients(alone, each, 1e-5)
        same_metrics(alone["metrics"], each["metrics"])


def test_a_rank_without_a_row_takes_part(crew: Crew, base: Path, samples: Samples) -> None:
    """One choice is one row: the others pass through the model without one."""
    config = full(base)
    one = replace(samples, choices=samples.choices[:1], consumption=samples.consumption[:1])
    given = task(config, one)
    for each in crew.run(3, given):
        same_gradients(given(ALONE), each, 1e-5)


@pytest.mark.parametrize("make", [full, adapters])
def test_recomputed_activations_give_the_same_gradients(crew: Crew, base: Path, samples: Samples, make: Any) -> None:
    batch = {"row_tokens": 64, "gradient_checkpointing": True}
    one, other = crew.run(2, task(make(base), samples))[0], crew.run(2, task(make(base, batch=batch), samples))[0]
    same_gradients(one, other, 1e-6)


@pytest.mark.parametrize("make", [full, adapters])
def test_masters_are_float32_where_bfloat16_computes(crew: Crew, base: Path, samples: Samples, make: Any) -> None:
    """Rounding differs with the rows, so gradients are compared at the scale of bfloat16's."""
    given = task(make(base, precision="bf16", dtype="bfloat16"), samples)
    alone, together = given(ALONE), crew.run(2, given)
    for model, gradients in alone["gradients"].items():
        for name, gradient in gradients.items():
            found = together[0]["gradients"][model][name]
            assert found.dtype == np.float32
            assert np.abs(found - gradient).max() <= 0.05 * np.abs(gradient).max() + 1e-4, name


def test_updates_in_turn_end_where_those_of_one_worker_end(crew: Crew, base: Path, samples: Samples) -> None:
    """Two epochs of two minibatches: a token is another rank's in each."""
    optimizer = {"epochs": 2, "minibatches": 2, "lr": 1e-4, "max_grad_norm": 0.5}
    given = task(full(base, optimizer=optimizer), samples, PLANS)
    alone, together = given(ALONE), crew.run(2, given)
    same_metrics(alone["metrics"], together[0]["metrics"], within=1e-3)


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {
        f"{file.relative_to(folder)}:{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("make", [full, adapters])
def test_checkpoints_are_alike_and_any_number_of_workers_goes_on_from_them(
    crew: Crew, base: Path, samples: Samples, make: Any, tmp_path: Path
) -> None:
    """Bit by bit with the same number, to rounding with another. The files are named alike and hold whole tensors."""
    config = make(base)

    def trained(name: str, size: int, plans: tuple[BatchPlan, ...], begin: str = "") -> Any:
        (tmp_path / name).mkdir()
        more = {"begin": str(tmp_path / begin), "facts": facts} if begin else {}
        given = task(config, samples, plans, end=str(tmp_path / name), **more)
        return (given(ALONE) if size == 1 else crew.run(size, given)[0])["written"]

    facts: Any = None
    through = trained("through", 2, PLANS)
    first = trained("first", 2, PLANS[:1])
    facts = {model: each.facts for model, each in first.items()}
    second = trained("second", 2, PLANS[1:], begin="first")
    assert {m: each.digests for m, each in through.items()} == {m: each.digests for m, each in second.items()}
    trained("alone", 1, PLANS)
    if make is full:
        trained("fewer", 1, PLANS[1:], begin="first")
        trained("more", 3, PLANS[1:], begin="first")
    expected = tensors(tmp_path / "alone")
    for name in ("through", "fewer", "more") if make is full else ("through",):
        files = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")}
        assert files == {str(path.relative_to(tmp_path / "alone")) for path in (tmp_path / "alone").rglob("*")}
        found = tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(found[tensor].shape == value.shape for tensor, value in expected.items())
        for tensor, value in expected.items():
            np.testing.assert_allclose(found[tensor], value, rtol=0.0, atol=2e-3, err_msg=tensor)


@pytest.mark.parametrize("make", [adapters])
def test_probe_canary_and_refusal_are_those_of_one_worker(
    crew: Crew, base: Path, samples: Samples, make: Any, tmp_path: Path
) -> None:
    config = make(base)
    first = samples.choices[0]
    bad = replace(first, behaviour_logprobs=(float("nan"),) * len(first.token_ids))
    (group,) = config.worker_groups()
    given = Canary(
        config=config,
        group=group,
        model=config.trained_models()[0],
        folder=str(tmp_path),
        poisoned=replace(samples, choices=(bad, *samples.choices[1:])),
        plan=PLANS[0],
    )
    alone, *together = given(ALONE), *crew.run(2, given)
    for each in together:
        assert [row.ids for row in each["probe"]] == [row.ids for row in alone["probe"]]
        for what in ("probe", "changed"):
            for one, other in zip(alone[what], each[what], strict=True):
                np.testing.assert_allclose(other.logprobs, one.logprobs, rtol=0.0, atol=1e-5)
        assert each["probe"] == each["after"] == each["again"], "the weights are as they were"
        assert "not finite" in each["refused"]


def test_what_one_rank_alone_holds_is_refused_by_all(crew: Crew, base: Path, samples: Samples) -> None:
    said = crew.run(3, Ruined(config=full(base), samples=samples, plan=PLANS[0]))
    assert "not finite in 1 of the parameters, first in model.norm.weight" in said[0]
    assert said[1:] == said[:1] * 2
