"""Trackers against modules that speak their API, and against the real packages where they are installed."""

import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import recorded_runs as recorded
from click.testing import CliRunner
from in_process import InProcess

from tracegrad.tracestore.config import Config, dump_config, parse_config
from tracegrad.tracestore.tracking import MlflowConfig, TrackingConfig, WandbConfig
from tracegrad.trainer.command import train
from tracegrad.trainer.errors import TrackingError
from tracegrad.trainer.metrics import MetricsLog
from tracegrad.trainer.trackers import open_trackers

LINE = {"step": 3, "reward": 0.5, "roles": {"writer @ 2": {"kl_to": {"proximal": {"k3": 0.25}}}}, "publish": None}
SETTINGS = {"job": "main", "optimizer": {"lr": 1e-5}}


class FakeWandb(types.ModuleType):
    """What of W&B is used: `init(...)` gives a run with `log(values, step=)` and `finish()`."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished, self.down = 0, False

    def init(self, **arguments: Any) -> "FakeWandb":
        if self.down:
            raise self.Error("api_key not configured")
        self.inits.append(arguments)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        if self.down:
            raise self.Error("gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


class FakeMlflow(types.ModuleType):
    """What of MLflow is used: `MlflowClient`, `entities.Metric`, `exceptions`; it checks keys as that does."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        fake = self

        class MlflowException(Exception):
            pass

        class Metric:
            def __init__(self, key: str, value: float, timestamp: int, step: int) -> None:
                self.key, self.value, self.step = key, value, step

        class MlflowClient:
            def __init__(self, tracking_uri: str) -> None:
                fake.uris.append(tracking_uri)

            def get_experiment_by_name(self, name: str) -> Any:
                return next((e for e in fake.experiments if e.name == name), None)

            def create_experiment(self, name: str) -> str:
                fake.experiments.append(types.SimpleNamespace(name=name, experiment_id=str(len(fake.experiments))))
                return fake.experiments[-1].experiment_id

            def create_run(self, experiment_id: str, *, run_name: str) -> Any:
                fake.runs.append((experiment_id, run_name))
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run-{len(fake.runs)}"))

            def log_param(self, run_id: str, key: str, value: str) -> None:
                fake.params[key] = value

            def update_run(self, run_id: str, *, status: str) -> None:
                fake.states.append((run_id, status))

            def log_batch(self, run_id: str, *, metrics: list[Any]) -> None:
                if any("@" in metric.key for metric in metrics):
                    raise MlflowException("Invalid metric name")
                fake.logged += [(run_id, metric.step, metric.key, metric.value) for metric in metrics]

            def set_terminated(self, run_id: str) -> None:
                fake.states.append((run_id, "FINISHED"))

        self.exceptions = types.SimpleNamespace(MlflowException=MlflowException)
        self.entities = types.SimpleNamespace(Metric=Metric)
        self.MlflowClient = MlflowClient
        self.uris: list[str] = []
        self.experiments: list[Any] = []
        self.runs: list[Any] = []
        self.params: dict[str, str] = {}
        self.states: list[tuple[str, str]] = []
        self.logged: list[tuple[str, int, str, float]] = []


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def test_a_job_is_one_wandb_run_also_across_restarts(wandb: FakeWandb, tmp_path: Path) -> None:
    config = TrackingConfig(wandb=WandbConfig(project="p", mode="offline"))
    for step in (1, 2):
        log = MetricsLog(tmp_path, open_trackers(config, tmp_path, job="main", settings=SETTINGS))
        log.record({**LINE, "step": step})
        log.close()
    first, second = wandb.inits
    assert (first["project"], first["name"], first["mode"], first["resume"]) == ("p", "main", "offline", "allow")
    assert first["id"] == second["id"] == json.loads((tmp_path / "tracking.json").read_text())["wandb"]
    assert first["config"] == SETTINGS
    assert wandb.logged == [
        (step, {"step": step, "reward": 0.5, "roles/writer @ 2/kl_to/proximal/k3": 0.25}) for step in (1, 2)
    ]
    assert wandb.finished == 2


def test_a_job_is_one_mlflow_run_with_its_settings_and_allowed_keys(mlflow: FakeMlflow, tmp_path: Path) -> None:
    config = TrackingConfig(mlflow=MlflowConfig(uri="http://127.0.0.1:5000", experiment="e"))
    for step in (1, 2):
        log = MetricsLog(tmp_path, open_trackers(config, tmp_path, job="main", settings=SETTINGS))
        log.record({**LINE, "step": step})
        log.close()
    assert (mlflow.uris[0], mlflow.runs) == ("http://127.0.0.1:5000", [("0", "main")])
    assert mlflow.params == {"job": "main", "optimizer.lr": "1e-05"}
    assert ("run-1", 2, "roles/writer _ 2/kl_to/proximal/k3", 0.25) in mlflow.logged
    assert mlflow.states == [("run-1", "FINISHED"), ("run-1", "RUNNING"), ("run-1", "FINISHED")]


def test_a_tracker_that_goes_away_is_said_once_and_training_goes_on(wandb: FakeWandb, tmp_path: Path) -> None:
    said: list[str] = []
    trackers = open_trackers(TrackingConfig(wandb=WandbConfig()), tmp_path, job="main", settings={})
    log = MetricsLog(tmp_path, trackers, said.append)
    wandb.down = True
    log.record({**LINE, "step": 1})
    log.record({**LINE, "step": 2})
    wandb.down = False
    log.record({**LINE, "step": 3})
    log.close()
    assert said == ["W&B did not take step 1: gone; training goes on, metrics.jsonl has the numbers"]
    assert [step for step, _ in wandb.logged] == [3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_cannot_be_opened_is_refused_before_training(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    both = TrackingConfig(wandb=WandbConfig(), mlflow=MlflowConfig(uri="x"))
    with pytest.raises(TrackingError, match=r"tracking.mlflow is configured .*pip install mlflow-skinny"):
        open_trackers(both, tmp_path, job="main", settings={})
    assert wandb.finished == 1, "what was opened is closed again"
    wandb.down = True
    with pytest.raises(TrackingError, match=r"tracking.wandb: api_key not configured; .*mode: offline"):
        open_trackers(TrackingConfig(wandb=WandbConfig()), tmp_path / "new", job="main", settings={})
    assert not (tmp_path / "new" / "tracking.json").exists()


def test_the_section_names_no_credentials() -> None:
    section = {"wandb": {"project": "p"}, "mlflow": {"uri": "sqlite:///m.db"}}
    config = parse_config({"tracking": section})
    assert config.tracking.wandb == WandbConfig(project="p")
    with pytest.raises(Exception, match="api_key"):
        parse_config({"tracking": {"wandb": {"api_key": "secret"}}})


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrackingConfig(wandb=WandbConfig(mode="offline"))
    log = MetricsLog(tmp_path, open_trackers(config, tmp_path, job="main", settings=SETTINGS))
    log.record(LINE)
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_the_real_mlflow_in_a_file(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    config = TrackingConfig(mlflow=MlflowConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    for step in (3, 4):
        try:
            trackers = open_trackers(config, tmp_path, job="main", settings=SETTINGS)
        except TrackingError as error:  # mlflow-skinny has no store of its own
            pytest.skip(str(error))
        log = MetricsLog(tmp_path, trackers)
        log.record({**LINE, "step": step})
        log.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads((tmp_path / "tracking.json").read_text())["mlflow"]
    history = client.get_metric_history(run_id, "roles/writer _ 2/kl_to/proximal/k3")
    assert [(each.step, each.value) for each in history] == [(3, 0.25), (4, 0.25)]


@contextmanager
def in_process(config: Config, *, address: str | None = None) -> Iterator[tuple[InProcess, dict[str, Any]]]:
    """Stand for Ray."""
    yield InProcess(config), {}


def test_the_command_tells_the_configured_tracker(
    wandb: FakeWandb, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recorded.configuration(llama, tmp_path / "out", store=f"sqlite:///{tmp_path}/store.db", steps=2)
    config = msgspec.structs.replace(config, tracking=TrackingConfig(wandb=WandbConfig(project="p")))
    recorded.sample_groups(config, tmp_path / "sampler", 4)
    (tmp_path / "tracegrad.yaml").write_text(dump_config(config))
    monkeypatch.setattr("tracegrad.trainer.ray_groups.ray_groups", in_process)
    result = CliRunner().invoke(train, ["--config", str(tmp_path / "tracegrad.yaml"), "--offline"])
    assert result.exit_code == 0, result.output
    assert [step for step, _ in wandb.logged] == [1, 2]
    assert {"kl_to/proximal/k3", "roles/writer/entropy", "weight_max", "grad_norm"} < wandb.logged[0][1].keys()
    assert wandb.finished == 1
