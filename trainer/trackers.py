"""Experiment trackers: W&B and MLflow, where configured and installed. Imported only then.

A job is one run of a tracker, also across restarts: the run's id is kept in `<job folder>/tracking.json`. It refuses,
before anything heavy starts, a tracker that is configured and not installed, or that cannot be opened. Afterwards a
tracker is a shadow of a shadow: what it refuses of a step is said, once, and training goes on. Called by
`tracegrad.trainer.command` and `tracegrad.trainer.metrics`.
"""

import importlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tracegrad.tracestore.tracking import MlflowConfig, TrackingConfig, WandbConfig
from tracegrad.trainer.errors import TrackingError

_NOT_IN_MLFLOW_KEYS = re.compile(r"[^/\w.\- :]")


class Tracker(Protocol):
    """Takes the numbers of steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one step's numbers.

        Raises:
            TrackingError: the tracker refused them.
        """
        ...

    def close(self) -> None:
        """Send what is left. Raises TrackingError."""
        ...


def open_trackers(
    config: TrackingConfig, folder: Path, *, job: str, settings: Mapping[str, Any]
) -> tuple[Tracker, ...]:
    """Open the configured trackers, going on with the job's runs where it has them. `settings` are shown there.

    Raises:
        TrackingError: one is not installed or cannot be opened; what was opened is closed again.
    """
    known = _Ids(folder / "tracking.json")
    opened: list[Tracker] = []
    try:
        if config.wandb is not None:
            opened.append(WandbTracker(config.wandb, folder, known, job=job, settings=settings))
        if config.mlflow is not None:
            opened.append(MlflowTracker(config.mlflow, known, job=job, settings=settings))
    except TrackingError:
        for tracker in opened:
            tracker.close()
        raise
    return tuple(opened)


class WandbTracker:
    """A run of W&B. It sends in the background and keeps its own files under `<job folder>/wandb`."""

    def __init__(
        self, config: WandbConfig, folder: Path, known: "_Ids", *, job: str, settings: Mapping[str, Any]
    ) -> None:
        wandb = _installed("wandb", "wandb")
        self._errors = (wandb.Error, OSError)
        folder.mkdir(parents=True, exist_ok=True)
        run_id = known.get("wandb") or uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                dir=str(folder),
                name=job,
                id=run_id,
                resume="allow",
                config=dict(settings),
            )
        except self._errors as error:
            raise TrackingError(f"tracking.wandb: {error}; mend it, or write `mode: offline`") from error
        known.set("wandb", run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        try:
            self._run.log(dict(values), step=step)
        except self._errors as error:
            raise TrackingError(f"W&B did not take step {step}: {error}") from error

    def close(self) -> None:
        """As `Tracker.close`."""
        try:
            self._run.finish()
        except self._errors as error:
            raise TrackingError(f"W&B could not be finished: {error}") from error


class MlflowTracker:
    """A run of MLflow, through its client: nothing global is set."""

    def __init__(self, config: MlflowConfig, known: "_Ids", *, job: str, settings: Mapping[str, Any]) -> None:
        mlflow = _installed("mlflow", "mlflow-skinny")
        self._errors = (mlflow.exceptions.MlflowException, OSError)
        self._metric = mlflow.entities.Metric
        try:
            self._client = mlflow.MlflowClient(tracking_uri=config.uri)
            run_id = known.get("mlflow")
            if run_id is None:
                found = self._client.get_experiment_by_name(config.experiment)
                experiment = self._client.create_experiment(config.experiment) if found is None else found.experiment_id
                run_id = str(self._client.create_run(experiment, run_name=job).info.run_id)
                for name, value in _flat(settings):
                    self._client.log_param(run_id, name, value)
            else:
                self._client.update_run(run_id, status="RUNNING")
        except self._errors as error:
            raise TrackingError(f"tracking.mlflow: {config.uri}: {error}") from error
        known.set("mlflow", run_id)
        self._run_id = run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`. Characters that MLflow allows in no key become `_`."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_NOT_IN_MLFLOW_KEYS.sub("_", key), value, now, step) for key, value in values.items()]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except self._errors as error:
            raise TrackingError(f"MLflow did not take step {step}: {error}") from error

    def close(self) -> None:
        """As `Tracker.close`."""
        try:
            self._client.set_terminated(self._run_id)
        except self._errors as error:
            raise TrackingError(f"MLflow could not be finished: {error}") from error


class _Ids:
    """The trackers' run ids of a job, in a small file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, tracker: str) -> str | None:
        return self._ids.get(tracker)

    def set(self, tracker: str, run_id: str) -> None:
        self._ids[tracker] = run_id
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".writing")
        temporary.write_text(json.dumps(self._ids))
        temporary.replace(self._path)


def _installed(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrackingError(
            f"tracking.{module} is configured and cannot be imported ({error}): "
            f"pip install {distribution}, or take the section out"
        ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten to ("a.b", text), as MLflow's parameters are."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", str(value)[:500]))
    return found
