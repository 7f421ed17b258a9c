"""The command line: what it refuses before anything heavy starts, and what its process does not import."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.command import train
from tracegrad.trainer.crash_points import CrashPoints
from tracegrad.trainer.errors import (
    EngineError,
    NothingToTrain,
    PublishError,
    StepRefused,
    TrainerError,
    WorkerFailed,
)
from tracegrad.trainer.ray_cluster import ray_running

FILE = "models: {main: {checkpoint: base}}\nroles: {'*': main}\ntrainer: {steps: 7}\n"


def write(tmp_path: Path, text: str = FILE) -> str:
    path = tmp_path / "tracegrad.yaml"
    path.write_text(text)
    return str(path)


def test_show_config_prints_what_is_resolved(tmp_path: Path) -> None:
    result = CliRunner().invoke(train, ["--config", write(tmp_path), "--steps", "3", "--show-config"])
    assert result.exit_code == 0
    shown = parse_config(yaml.safe_load(result.output))
    assert shown.trainer.steps == 3
    assert shown.models["main"].checkpoint == str(tmp_path / "base")


def test_the_command_line_says_which_runs(tmp_path: Path) -> None:
    """Under the checks of the file; an age becomes a time, which is printed."""
    path = write(tmp_path)
    said = ["--job", "again", "--epoch", "2", "--until", "2026-01-31", "--since", "7d", "--recorded-model", "old"]
    result = CliRunner().invoke(train, ["--config", path, *said, "--show-config"])
    shown = parse_config(yaml.safe_load(result.output)).trainer
    assert (shown.job, shown.steps, shown.batch.runs.epoch, shown.batch.runs.recorded_models) == (
        "again",
        7,
        2,
        ("old",),
    )
    rule = lease_rule(parse_config(yaml.safe_load(result.output)), offline=True)
    assert rule.since is not None and rule.until is not None
    assert abs(time.time() - 7 * 86_400 - rule.since) < 60
    assert (rule.models, rule.recorded_models, rule.epoch) == (("main",), ("old",), 2)
    wrong = CliRunner().invoke(train, ["--config", path, "--since", "last week"])
    assert (wrong.exit_code, "--since 'last week' is no age" in wrong.output) == (1, True)


def test_unknown_keys_and_missing_files_are_said_plainly(tmp_path: Path) -> None:
    result = CliRunner().invoke(train, ["--config", write(tmp_path, FILE + "stpes: 3\n")])
    assert result.exit_code == 1
    assert "stpes" in result.output
    result = CliRunner().invoke(train, ["--config", str(tmp_path / "none.yaml")])
    assert (result.exit_code, "cannot read" in result.output) == (1, True)


def test_no_models_is_a_usage_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(train, ["--config", write(tmp_path, "project: x\n")]).exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"), [(StepRefused, 4), (NothingToTrain, 1), (PublishError, 1), (EngineError, 1)]
)
def test_a_refused_step_has_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[TrainerError], code: int
) -> None:
    """What is refused would be refused again, and `tracegrad up` does not start it anew; runs of which nothing may be
    trained are put aside, and the next start takes others."""

    def refuse(*_: object, **__: object) -> None:
        raise error("step 3: why")

    monkeypatch.setattr("tracegrad.trainer.ray_groups.ray_groups", refuse)
    (tmp_path / "base").mkdir()
    path = write(tmp_path, FILE + f"store: sqlite:///{tmp_path}/store.db\n")
    result = CliRunner().invoke(train, ["--config", path, "--offline"])
    assert (result.exit_code, "tracegrad train: step 3: why" in result.output) == (code, True)


def test_crash_points_refuse_what_they_do_not_know() -> None:
    for text in ("after-lunch:1", "after-step", "after-step:x"):
        with pytest.raises(ConfigError, match="POINT:STEP"):
            CrashPoints.from_environment({"TRACEGRAD_KILL_AT": text})
    CrashPoints.from_environment({}).reached("after-step", 1)
    CrashPoints.from_environment({"TRACEGRAD_KILL_AT": "after-step:2"}).reached("after-step", 1)


def test_a_cluster_that_is_not_there_is_said_plainly() -> None:
    """Ray itself would try for many minutes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(WorkerFailed, match=f"cannot join a Ray cluster at '{address}'.*ray start --head"):
            ray_running(address, 1).__enter__()


def test_the_controllers_process_has_no_torch() -> None:
    code = "import sys, tracegrad.trainer.controller, tracegrad.trainer.ray_groups; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
