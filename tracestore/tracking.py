"""The configuration of experiment trackers (`tracking`): who else gets the numbers of `metrics.jsonl`.

Credentials are the trackers' own (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN): never in this file. Called by `config`.
"""

from typing import Literal

from tracegrad.tracestore.section import Section


class WandbConfig(Section, frozen=True, kw_only=True):
    """Weights & Biases. The package `wandb` is installed beside tracegrad."""

    project: str = "tracegrad"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"
    """offline: under the job's folder, for `wandb sync` later."""


class MlflowConfig(Section, frozen=True, kw_only=True):
    """MLflow. The package `mlflow` or `mlflow-skinny` is installed beside tracegrad."""

    uri: str
    """The tracking server, or a store of its own: http://127.0.0.1:5000, sqlite:////runs/mlflow.db"""
    experiment: str = "tracegrad"


class TrackingConfig(Section, frozen=True, kw_only=True):
    """Both, either or none. TensorBoard and `metrics.jsonl` are always written."""

    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
