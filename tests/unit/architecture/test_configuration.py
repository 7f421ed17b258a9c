"""The configuration file: unknown keys and names are refused with the near misses; printing it loses nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tracegrad.tracestore.config import dump_config, load_config, parse_config
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.records import ModelCalls
from tracegrad.tracestore.rules import lease_rule

GOOD = {
    "store": "sqlite:///trace.db",
    "models": {"small": {"checkpoint": "weights"}},
    "roles": {"planner": "small", "*": "small"},
    "trainer": {"model": "small", "optimizer": {"lr": 3e-5}},
}

API = {"url": "https://api.example.com/v1", "key_env": "EXAMPLE_KEY", "model": "big-1"}


def test_what_is_printed_reads_back_equal() -> None:
    config = parse_config(GOOD)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert config.trainer.optimizer.lr == 3e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainer": {"model": "small", "optimiser": {}}}, "did you mean optimizer"),
        ({"trainer": {"model": "smal"}}, "did you mean small"),
        ({"roles": {"planner": "smalll"}}, "did you mean small"),
        ({"trainer": {"model": "small", "steps": "ten"}}, "Expected `int`"),
        ({"trainer": {"algorithm": {"clip_low": 0.1}}}, "`clip_low`.*it stands under `trainer.algorithm.loss`"),
        ({"trainer": {"algorithm": {"loss": {"cliplow": 0.1}}}}, "did you mean clip_low"),
        ({"trainer": {"algorithm": {"advantage": "grpo"}}}, "it stands under `trainer.algorithm.credit`"),
        ({"trainer": {"algorithm": {"credit": {"gamma": 1.5}}}}, "<= 1.0 - at `\\$.trainer.algorithm.credit.gamma`"),
        ({"trainer": {"roles": {}}}, "it stands at the top"),
        ({"trainer": {"threads": 1}}, "it stands under `trainer.workers`"),
        ({"trainer": {"workers": {"per_group": 0}}}, ">= 1 - at `\\$.trainer.workers.per_group`"),
        ({"trainer": {"workers": {"device": "gpu"}}}, "Invalid enum value 'gpu'"),
        ({"trainer": {"dtype": "float32"}}, "it stands under `models.NAME.engine`"),
        ({"trainer": {"algorithm": {"loss": {"clip_low": -0.1}}}}, ">= 0.0 - at `\\$.trainer.algorithm.loss.clip_low`"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**GOOD, **change})


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        (
            {"loss": {"aggregate": "constant"}},
            r"trainer.algorithm.loss.aggregate is constant: set loss.aggregate_tokens",
        ),
        ({"loss": {"objective": "gpso"}}, "Invalid enum value 'gpso'"),
        ({"correction": {"anchor": "behaviour"}}, "set correction.weights to off"),
        ({"correction": {"reject": [{"level": "token"}]}}, r"reject\[0\] has no bound"),
        ({"correction": {"reject": [{"low": 2.0, "high": 0.5}]}}, r"reject\[0\] keeps nothing"),
        ({"correction": {"reject": [{"lowest": 2.0}]}}, "did you mean low"),
        ({"credit": {"bootstrap": "all"}}, r"bootstrap is all.*gae and credit.scope graph \(they are gae and call\)"),
        ({"credit": {"bootstrap": "all", "scope": "graph", "advantage": "grpo"}}, r"\(they are grpo and graph\)"),
    ],
)
def test_an_algorithm_that_cannot_be_meant_is_refused(algorithm: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**GOOD, "trainer": {"model": "small", "algorithm": algorithm}})


def test_each_objective_has_its_own_bounds_unless_told() -> None:
    def bounds(**loss: object) -> tuple[float, float]:
        return parse_config(
            {**GOOD, "trainer": {"model": "small", "algorithm": {"loss": loss}}}
        ).trainer.algorithm.loss.bounds

    assert bounds() == (0.2, 0.2)
    assert bounds(objective="gspo") == (3e-4, 4e-4)
    assert bounds(objective="cispo", clip_high=1.0) == (1.0, 1.0)


def test_sampling_for_an_unknown_role_is_refused() -> None:
    raw = {**GOOD, "roles": {"planner": "small"}, "proxy": {"sampling": {"planer": {"temperature": 0.8}}}}
    with pytest.raises(ConfigError, match="did you mean planner"):
        parse_config(raw)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        load_config(tmp_path / "no.yaml")


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tracegrad.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    config = load_config(path)
    assert config.store == f"sqlite:///{tmp_path}/trace.db"
    assert config.models["small"].checkpoint == f"{tmp_path}/weights"


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    raw = {**GOOD, "store": "sqlite:///~/t.db", "models": {"small": {"checkpoint": "~/weights"}}}
    config = parse_config(raw, base=Path("/etc"))
    assert (config.store, config.models["small"].checkpoint) == ("sqlite:////home/me/t.db", "/home/me/weights")


def test_the_role_map_falls_back_to_the_star() -> None:
    config = parse_config({**GOOD, "roles": {"planner": "small"}})
    assert (config.model_of("planner"), config.model_of("coder"), config.model_of(None)) == ("small", None, None)
    assert parse_config(GOOD).model_of("coder") == "small"


def test_each_replica_has_its_own_url_log_and_number() -> None:
    engine = {"url": "http://127.0.0.1:8000", "log": "/logs/e.log", "env": {"CUDA_VISIBLE_DEVICES": "{replica}"}}
    raw = {**GOOD, "models": {"small": {"checkpoint": "w", "engine": engine, "replicas": ["http://127.0.0.1:8001"]}}}
    first, second = parse_config(raw).models["small"].each_engine()
    assert (first.engine.url, first.engine.log) == ("http://127.0.0.1:8000", "/logs/e.log")
    assert (second.engine.url, second.engine.log) == ("http://127.0.0.1:8001", "/logs/e-1.log")
    assert [each.engine.env["CUDA_VISIBLE_DEVICES"] for each in (first, second)] == ["0", "1"]
    assert first.replicas == second.replicas == ()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({}, "neither `checkpoint`.*nor `api`"),
        ({"checkpoint": "w", "replicas": ["http://127.0.0.1:8000/"]}, "names one engine twice"),
        ({"api": API}, "cannot be trained: write `trained: false`"),
        ({"api": API, "trained": False, "checkpoint": "w"}, "so it has no `checkpoint`"),
        ({"api": API, "trained": False, "replicas": ["http://127.0.0.1:1"]}, "so it has no `checkpoint`"),
        ({"api": {**API, "url": "api.example.com"}, "trained": False}, "write https://HOST/v1"),
        ({"api": {**API, "key": "sk-secret"}, "trained": False}, r"did you mean .*key_env"),
    ],
)
def test_a_wrong_model_is_refused(model: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**GOOD, "models": {**GOOD["models"], "big": model}})  # type: ignore[dict-item]


def test_what_is_not_trained_cannot_be_named_by_the_trainer() -> None:
    models = {"small": {"checkpoint": "w"}, "big": {"api": API, "trained": False}}
    assert parse_config({**GOOD, "models": models, "roles": {"planner": "big"}}).models["big"].each_engine() == ()
    with pytest.raises(ConfigError, match="'big', which is not trained; name one of small"):
        parse_config({**GOOD, "models": models, "trainer": {"model": "big"}})
    only = parse_config({"models": {"big": models["big"]}, "roles": {"*": "big"}})
    assert only.trainer.model not in only.models, "with nothing to train, trainer.model names nothing"


def runs(**which: object) -> dict[str, object]:
    return {**GOOD, "trainer": {"model": "small", "batch": {"runs": which}}}


def test_which_runs_a_job_takes_is_checked_when_it_is_read(tmp_path: Path) -> None:
    """Bare dates in YAML are text here; an unknown role, purpose or time is said at once."""
    path = tmp_path / "tracegrad.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "  batch: {runs: {since: 2026-01-31, until: 2026-01-31T12:00+00:00}}\n")
    read = load_config(path)
    assert read.trainer.batch.runs.since == "2026-01-31"
    assert lease_rule(read).until == 1_769_860_800.0
    assert parse_config(yaml.safe_load(dump_config(read))) == read
    for which, says in (
        ({"since": "yesterday"}, "no ISO time"),
        ({"purposes": ["eval"]}, "Invalid enum value"),
        ({"grace_s": -1}, ">= 0"),
        ({"source": ["human"]}, "did you mean .*reward_sources"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse_config(runs(**which))
    with pytest.raises(ConfigError, match="names 'writer', which `roles` maps to no model that is trained"):
        parse_config({**runs(roles=["writer"]), "roles": {"planner": "small"}})


def test_the_lease_rule_takes_roles_from_the_map_and_from_the_job() -> None:
    """`*` means every role but those of other models; what the job names is fewer; other models' calls offline only."""
    models = {"small": {"checkpoint": "w"}, "big": {"checkpoint": "v", "engine": SECOND}}
    raw = {
        **runs(recorded_models=["old"]),
        "models": models,
        "roles": {"*": "small", "judge": "big", "planner": "small"},
    }
    online, offline = lease_rule(parse_config(raw)), lease_rule(parse_config(raw), offline=True)
    small = ModelCalls(model="small", other_roles=("judge",))
    assert (online.trained, online.recorded_models, offline.recorded_models) == ((small,), (), ("old",))
    named = lease_rule(parse_config({**raw, "trainer": runs(roles=["planner"])["trainer"]}))
    assert named.trained == (replace(small, roles=("planner",)),)
    trainer = {"batch": {"runs": {"roles": ["planner", "judge"]}}}
    both = lease_rule(parse_config({**raw, "trainer": trainer}))
    assert both.models == ("small", "big"), "each with those of the roles that are its own"
    big = ModelCalls(model="big", roles=("judge",), other_roles=("planner",))
    assert both.of("big").trained == (big,)


BASE = {"checkpoint": "w", "trained": False}
SECOND, THIRD = {"url": "http://127.0.0.1:8001"}, {"url": "http://127.0.0.1:8002"}
MODES = {
    "full sharing": ({"all": {"checkpoint": "w"}}, {"*": "all"}),
    "partial sharing": (
        {"thinks": {"checkpoint": "a"}, "writes": {"checkpoint": "b", "engine": SECOND}},
        {"planner": "thinks", "critic": "thinks", "writer": "writes"},
    ),
    "full separation": (
        {
            "p": {"checkpoint": "a"},
            "c": {"checkpoint": "b", "engine": SECOND},
            "w": {"checkpoint": "c", "engine": THIRD},
        },
        {"planner": "p", "critic": "c", "writer": "w"},
    ),
    "adapter per role": (
        {"base": BASE, "p": {"adapter": {"of": "base"}}, "c": {"adapter": {"of": "base", "rank": 4}}},
        {"planner": "p", "critic": "c", "writer": "base"},
    ),
}
"""Mode -> models, roles. In the last one the writer is frozen: served by the base, never trained."""


@pytest.mark.parametrize(
    ("mode", "groups"),
    [
        ("full sharing", {"all": ("all",)}),
        ("partial sharing", {"thinks": ("thinks",), "writes": ("writes",)}),
        ("full separation", {"p": ("p",), "c": ("c",), "w": ("w",)}),
        ("adapter per role", {"base": ("p", "c")}),
    ],
)
def test_a_job_trains_what_is_trained_one_group_for_each_model_that_holds_weights(
    mode: str, groups: dict[str, tuple[str, ...]]
) -> None:
    models, roles = MODES[mode]
    config = parse_config({"models": models, "roles": roles})
    assert config.worker_groups() == groups
    assert config.trained_models() == tuple(name for names in groups.values() for name in names)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_the_trainer_may_take_one_of_several_models_and_says_which_where_there_is_only_one() -> None:
    models, roles = MODES["partial sharing"]
    both = parse_config({"models": models, "roles": roles})
    one = parse_config({"models": models, "roles": roles, "trainer": {"model": "writes"}})
    assert (both.trainer.model, both.trained_models()) == ("", ("thinks", "writes"))
    assert one.trained_models() == ("writes",)
    assert parse_config({"models": {"solo": {"checkpoint": "w"}}}).trainer.model == "solo"


def test_an_adapter_is_served_by_the_engines_of_its_base() -> None:
    engine = {"url": "http://127.0.0.1:8005"}
    models = {
        "base": {**BASE, "engine": engine, "replicas": ["http://127.0.0.1:8006"]},
        "p": {"adapter": {"of": "base"}},
    }
    config = parse_config({"models": models, "roles": {"*": "p"}})
    assert config.models["p"].each_engine() == ()
    assert [each.engine.url for each in config.engines_of("p")] == ["http://127.0.0.1:8005", "http://127.0.0.1:8006"]
    assert config.engines_of("p") == config.engines_of("base")


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (
            {"base": BASE, "p": {"adapter": {"of": "bas"}}},
            "models.p.adapter.of names the model 'bas'.*did you mean base",
        ),
        ({"base": BASE, "p": {"adapter": {"of": "base", "rnak": 8}}}, "did you mean rank"),
        ({"base": BASE, "p": {"adapter": {"of": "base", "rank": 0}}}, "Expected `int` >= 1"),
        ({"base": {"checkpoint": "w"}, "p": {"adapter": {"of": "base"}}}, "write `trained: false` in models.base"),
        (
            {"base": BASE, "p": {"adapter": {"of": "base"}, "checkpoint": "w"}},
            "has `adapter`, so it has no `checkpoint`",
        ),
        ({"base": BASE, "p": {"adapter": {"of": "base"}, "trained": False}}, "map its roles to 'base'"),
        (
            {"base": BASE, "p": {"adapter": {"of": "base"}}, "q": {"adapter": {"of": "p"}}},
            "an adapter itself; name what that one lies on, 'base'",
        ),
        ({"judge": {"api": API, "trained": False}, "p": {"adapter": {"of": "judge"}}}, "takes no adapter"),
    ],
)
def test_a_wrong_adapter_is_refused(models: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({"models": models})


@pytest.mark.parametrize(
    ("models", "publish", "says"),
    [
        ({"base": BASE, "p": {"adapter": {"of": "base"}}}, {}, r"which weights of an adapter sampled a token \(p\)"),
        (
            {"main": {"checkpoint": "w"}},
            {"gate": {"app": "a", "tasks": "t", "reward": "r", "rule": {"minimum": 0.1}}},
            "a gate lets nobody but its evaluation meet a candidate",
        ),
        ({"main": {"checkpoint": "w"}}, {"mode": "inflight"}, "Invalid enum value 'inflight'"),
    ],
)
def test_where_calls_cannot_go_on_through_a_publish(
    models: dict[str, object], publish: dict[str, object], says: str
) -> None:
    raw = {"models": models, "trainer": {"publish": {"mode": "in_flight", **publish}}}
    with pytest.raises(ConfigError, match=says):
        parse_config(raw)
