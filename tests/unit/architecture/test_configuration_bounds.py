"""The configuration file: numbers out of bounds, names that are no folders, shared engines, and how YAML is read."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tracegrad.tracestore.config import dump_config, load_config, parse_config
from tracegrad.tracestore.errors import ConfigError

ROOT = Path(__file__).parents[3]
NAN, INF = float("nan"), float("inf")
MAIN = {"main": {"checkpoint": "w"}}


def nested(place: str, value: Any) -> dict[str, Any]:
    """Return the file that says one thing, at a dotted place."""
    for key in reversed(place.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


OUT_OF_BOUNDS: dict[str, tuple[Any, ...]] = {
    "trainer.optimizer.lr": (-1.0, NAN, INF),
    "trainer.optimizer.critic_lr": (-1e-5, NAN, INF),
    "trainer.optimizer.weight_decay": (-0.1, NAN, INF),
    "trainer.optimizer.max_grad_norm": (0.0, NAN, INF),
    "trainer.optimizer.warmup_steps": (-1,),
    "trainer.optimizer.epochs": (0,),
    "trainer.optimizer.minibatches": (0,),
    "trainer.batch.groups": (0,),
    "trainer.batch.max_staleness": (-1,),
    "trainer.batch.min_group": (0,),
    "trainer.batch.row_tokens": (0,),
    "trainer.batch.lease_s": (0, -1.0, NAN, INF),
    "trainer.batch.poll_s": (0, NAN),
    "trainer.batch.runs.grace_s": (-1, NAN, INF),
    "trainer.batch.runs.purposes": ([],),
    "trainer.publish.probe_tokens": (0,),
    "trainer.publish.probe_bound": (0, NAN, INF),
    "trainer.publish.drain_timeout_s": (0,),
    "trainer.publish.swap_timeout_s": (0,),
    "trainer.steps": (-1,),
    "trainer.seed": (-1, 2**63),
    "trainer.keep_checkpoints": (0,),
    "trainer.job": ("", "a/b", "..", ".hidden", "a~next", "x" * 101),
    "trainer.algorithm.loss.kl_coef": (-0.1, NAN, INF),
    "trainer.algorithm.loss.entropy_coef": (NAN, INF),
    "trainer.algorithm.correction.cap": (0, NAN, INF),
    "trainer.algorithm.credit.gamma": (1.5, NAN),
    "trainer.algorithm.credit.reward_weights.a": (NAN, INF),
    "trainer.algorithm.refuse.grad_norm_factor": (0, NAN, INF),
    "proxy.port": (-1, 65536, 99999),
    "proxy.poll_s": (0,),
    "proxy.idle_close_s": (0, NAN),
    "proxy.hold_timeout_s": (-1, INF),
    "proxy.upstream_timeout_s": (0,),
    "proxy.heartbeat_expires_s": (0,),
    "proxy.limits.max_body_bytes": (0,),
    "proxy.limits.max_messages": (0,),
    "models.main.engine.max_model_len": (0,),
    "models.main.engine.max_num_seqs": (0,),
    "models.main.engine.start_timeout_s": (0, NAN),
    "models.main.engine.url": ("127.0.0.1:8000", "engine", "ftp://e:1", "http://:80", "http://e:99999", ""),
    "models.main.replicas": (["127.0.0.1:8001"],),
}


@pytest.mark.parametrize(
    ("place", "value"), [(place, value) for place, values in OUT_OF_BOUNDS.items() for value in values]
)
def test_what_cannot_be_meant_is_refused_where_it_stands(place: str, value: Any) -> None:
    said = nested(place, value)
    main = {**MAIN["main"], **said.get("models", {}).get("main", {})}
    with pytest.raises(ConfigError) as caught:
        parse_config({**said, "models": {"main": main}, "roles": {"*": "main"}})
    assert place.removeprefix("models.main.") in str(caught.value)


@pytest.mark.parametrize("betas", [[1.0, 0.95], [0.9, 1.0], [-0.1, 0.9], [0.9, NAN], [0.9, INF]])
def test_betas_lie_from_0_to_below_1(betas: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.optimizer\.betas\[[01]\]"):
        parse_config({"models": MAIN, "trainer": {"optimizer": {"betas": betas}}})


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", NAN), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("max_tokens", 0)],
)
def test_the_sampling_override_is_one_that_an_engine_takes(field: str, value: float) -> None:
    raw = {"models": MAIN, "roles": {"*": "main"}, "proxy": {"sampling": {"*": {field: value}}}}
    with pytest.raises(ConfigError, match=field):
        parse_config(raw)


def test_what_is_at_a_bound_is_taken() -> None:
    trainer = {
        "steps": 0,
        "seed": 2**63 - 1,
        "optimizer": {"lr": 0, "critic_lr": 0.0, "betas": [0.0, 0.0], "warmup_steps": 0},
        "batch": {"max_staleness": 0, "min_group": 1},
        "job": "rag qa: 7b@v1.2+x",
    }
    config = parse_config({"models": MAIN, "trainer": trainer, "proxy": {"port": 0, "hold_timeout_s": 0}})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("name", ["org/tiny", "..", ".", "", "a\\b", "a\nb", "/abs", " a", "a~next", "x" * 101])
def test_what_is_trained_has_the_name_of_a_folder(name: str) -> None:
    """Its checkpoints lie in a folder of its name. What is only served may be called as its maker calls it."""
    base = {"checkpoint": "w", "trained": False}
    for models in ({name: {"checkpoint": "w"}}, {"base": base, name: {"adapter": {"of": "base"}}}):
        with pytest.raises(ConfigError, match=r"models\.[^:]*, which is trained, names a folder: begin with"):
            parse_config({"models": models})
    served = parse_config({"models": {name: base, "p": {"adapter": {"of": name}}}})
    assert served.trained_models() == ("p",)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({}, r"models\.b\.engine\.url is http://127\.0\.0\.1:8000, the engine of models\.a: .*engines of its own"),
        ({"engine": {"external": True}}, r"models\.b\.engine\.url"),
        ({"trained": False}, r"models\.b\.engine\.url"),
        ({"engine": {"url": "http://localhost:8000/"}}, r"models\.b\.engine\.url is http://localhost:8000/"),
        ({"engine": {"url": "http://127.0.0.1:1"}, "replicas": ["http://127.0.0.1:8000"]}, r"models\.b\.replicas\[0\]"),
    ],
)
def test_two_models_cannot_have_one_engine(second: dict[str, Any], says: str) -> None:
    first = {"checkpoint": "w", "engine": {"external": True}}
    with pytest.raises(ConfigError, match=says):
        parse_config({"models": {"a": first, "b": {"checkpoint": "v", **second}}})


def test_adapters_share_the_engine_of_their_base_and_an_engine_may_lie_under_a_path() -> None:
    api = {"url": "http://127.0.0.1:8000", "key_env": "K", "model": "m"}
    models: dict[str, Any] = {
        "base": {"checkpoint": "w", "trained": False},
        **{name: {"adapter": {"of": "base"}} for name in "pq"},
        "a": {"checkpoint": "v", "engine": {"url": "https://engines/a"}},
        "b": {"checkpoint": "v", "engine": {"url": "https://engines/b"}},
        "judge": {"api": api, "trained": False},
    }
    assert parse_config({"models": models}).trained_models() == ("p", "q", "a", "b")


# -- the text


def written(folder: Path, text: str) -> Path:
    path = folder / "tracegrad.yaml"
    path.write_text("models: {main: {checkpoint: w}, b: {checkpoint: w, engine: {url: 'http://127.0.0.1:1'}}}\n" + text)
    return path


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("1.0e-5", 1e-5), ("1.e-5", 1e-5), (".1e-4", 1e-5), ("+1e-5", 1e-5), ("2e3", 2e3)],
)
def test_a_number_with_an_exponent_needs_no_point(tmp_path: Path, text: str, number: float) -> None:
    assert load_config(written(tmp_path, f"trainer: {{optimizer: {{lr: {text}}}}}")).trainer.optimizer.lr == number


def test_text_that_looks_like_a_number_stays_text_when_it_is_printed(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "project: '1e5'\nroles: {'2e-3': main, '1.0e-5': main}\nstore: sqlite:///x"))
    assert (config.project, list(config.roles)) == ("1e5", ["2e-3", "1.0e-5"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert parse_config(yaml.safe_load(again.read_text())) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("roles: {writer: main, writer: b}", r"tracegrad.yaml: line 2: 'writer' stands in line 2 already: keep one"),
        ("roles: {writer: main}\ntrainer: {steps: 1}\nroles: {writer: b}", "line 4: 'roles' stands in line 2 already"),
        ("roles: {'*': main, \"*\": b}", r"'\*' stands in line 2"),
        ("trainer:\n  optimizer:\n    lr: 1e-5\n    lr: 1e-4", "line 5: 'lr' stands in line 4 already"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(written(tmp_path, text))


def test_a_key_may_stand_beside_a_merge_that_brings_it(tmp_path: Path) -> None:
    text = "trainer:\n  optimizer: {<<: &usual {lr: 1e-5, epochs: 2}, lr: 2e-5}\n  batch: {groups: 3}\n"
    optimizer = load_config(written(tmp_path, text)).trainer.optimizer
    assert (optimizer.lr, optimizer.epochs) == (2e-5, 2)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("examples/**/*.yaml"), ROOT / "docker" / "tracegrad.yaml"]), ids=str
)
def test_every_configuration_of_the_repository_is_taken(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
