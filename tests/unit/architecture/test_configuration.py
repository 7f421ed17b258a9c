"""The configuration file: unknown keys and names are refused with the near misses; printing it loses nothing."""

from pathlib import Path

import pytest
import yaml

from tracegrad.tracestore.config import dump_config, load_config, parse_config
from tracegrad.tracestore.errors import ConfigError

GOOD = {
    "store": "sqlite:///trace.db",
    "models": {"small": {"checkpoint": "weights"}},
    "roles": {"planner": "small", "*": "small"},
    "trainer": {"model": "small", "optimizer": {"lr": 3e-5}},
}


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
    ],
)
def test_mistakes_are_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**GOOD, **change})


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


def test_the_role_map_falls_back_to_the_star() -> None:
    config = parse_config({**GOOD, "roles": {"planner": "small"}})
    assert (config.model_of("planner"), config.model_of("coder"), config.model_of(None)) == ("small", None, None)
    assert parse_config(GOOD).model_of("coder") == "small"
