"""The tables of the publish gate: what evaluations found, who evaluates and who trains, and where serving is held.

Evaluations and pins are append-only: the newest row of a model is its pin, and a NULL version means none. An
evaluation names the publish it was made for (NULL: a baseline), and has a mean only where it has values; `versions` are
those of all models that were judged as one (NULL: of its own alone). Called by `evaluations`, `trainers` and `pins`.
"""

from sqlalchemy import (
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    String,
    Table,
    Text,
)

from tracegrad.tracestore.codec import JsonText
from tracegrad.tracestore.schema import metadata

evaluations = Table(
    "evaluations",
    metadata,
    Column("evaluation_id", Integer, Identity(), primary_key=True),
    Column("model", String, nullable=False),
    Column("version_id", Integer, nullable=False),
    Column("publish_id", Integer, ForeignKey("publishes.publish_id")),
    Column("name", String, nullable=False, unique=True),
    Column("tasks_hash", String, nullable=False),
    Column("score", String, nullable=False),
    Column("n_runs", Integer, nullable=False),
    Column("n_failed", Integer, nullable=False),
    Column("values", JsonText, nullable=False),
    Column("mean", Double),
    Column("low", Double),
    Column("high", Double),
    Column("error", Text),
    Column("started_at", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("versions", JsonText),
    ForeignKeyConstraint(["version_id", "model"], ["policy_versions.version_id", "policy_versions.model"]),
    CheckConstraint("n_failed BETWEEN 0 AND n_runs", name="n_failed"),
    CheckConstraint("(mean IS NULL) = (low IS NULL) AND (mean IS NULL) = (high IS NULL)", name="interval"),
    CheckConstraint("error IS NULL OR mean IS NULL", name="error_or_mean"),
    Index(None, "version_id"),
    Index(None, "publish_id"),
    sqlite_autoincrement=True,
)

evaluators = Table(
    "evaluators",
    metadata,
    Column("evaluator_id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("tasks_hash", String, nullable=False),
    Column("score", String, nullable=False),
    Column("registered_at", Double, nullable=False),
    Column("beat_at", Double, nullable=False),
)

trainers = Table(
    "trainers",
    metadata,
    Column("job_id", String, primary_key=True),
    Column("phase", String, nullable=False),
    Column("step", Integer),
    Column("phase_at", Double, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("beat_at", Double, nullable=False),
)

pins = Table(
    "pins",
    metadata,
    Column("pin_id", Integer, Identity(), primary_key=True),
    Column("model", String, nullable=False),
    Column("version_id", Integer),
    Column("reason", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    ForeignKeyConstraint(["version_id", "model"], ["policy_versions.version_id", "policy_versions.model"]),
    Index(None, "model"),
    sqlite_autoincrement=True,
)
