"""Jobs of several models: which models a job trains, and the version that a step made of each of them."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_OF_ONE_MODEL = ("model", "roles", "other_roles")


def upgrade() -> None:
    """Every job so far trains one model, and every step made one version."""
    op.create_table(
        "job_models",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_job_models_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "model", name=op.f("pk_job_models")),
    )
    op.execute("INSERT INTO job_models (job_id, model) SELECT job_id, model FROM jobs")
    op.create_table(
        "step_versions",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "step"],
            ["checkpoints.job_id", "checkpoints.step"],
            name=op.f("fk_step_versions_job_id_step_checkpoints"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id", "model"],
            ["job_models.job_id", "job_models.model"],
            name=op.f("fk_step_versions_job_id_model_job_models"),
        ),
        sa.ForeignKeyConstraint(
            ["version_id", "model"],
            ["policy_versions.version_id", "policy_versions.model"],
            name=op.f("fk_step_versions_version_id_model_policy_versions"),
        ),
        sa.PrimaryKeyConstraint("job_id", "step", "model", name=op.f("pk_step_versions")),
        sa.UniqueConstraint("version_id", name=op.f("uq_step_versions_version_id")),
    )
    op.execute(
        "INSERT INTO step_versions (job_id, step, model, version_id) SELECT c.job_id, c.step, v.model, c.version_id"
        " FROM checkpoints c JOIN policy_versions v ON v.version_id = c.version_id"
    )
    with op.batch_alter_table("checkpoints") as table:
        table.drop_constraint("uq_checkpoints_version_id", type_="unique")
        table.drop_constraint("fk_checkpoints_version_id_policy_versions", type_="foreignkey")
        table.drop_column("version_id")
    _rewrite_rules(lambda rule: {"trained": [{name: rule.pop(name) for name in _OF_ONE_MODEL if name in rule}], **rule})
    op.drop_column("jobs", "model")
    op.add_column("consumption", sa.Column("model", sa.String(), nullable=True))


def downgrade() -> None:
    """Take it back: of several models the first by name stays."""
    op.drop_column("consumption", "model")
    op.add_column("jobs", sa.Column("model", sa.String(), nullable=True))
    op.execute("UPDATE jobs SET model = (SELECT min(m.model) FROM job_models m WHERE m.job_id = jobs.job_id)")
    with op.batch_alter_table("jobs") as table:
        table.alter_column("model", existing_type=sa.String(), nullable=False)
    _rewrite_rules(lambda rule: {**rule.pop("trained")[0], **rule})
    op.add_column("checkpoints", sa.Column("version_id", sa.Integer(), nullable=True))
    op.execute(
        "UPDATE checkpoints SET version_id = (SELECT s.version_id FROM step_versions s WHERE s.job_id ="
        " checkpoints.job_id AND s.step = checkpoints.step ORDER BY s.model LIMIT 1)"
    )
    with op.batch_alter_table("checkpoints") as table:
        table.alter_column("version_id", existing_type=sa.Integer(), nullable=False)
        table.create_unique_constraint("uq_checkpoints_version_id", ["version_id"])
        table.create_foreign_key(
            "fk_checkpoints_version_id_policy_versions", "policy_versions", ["version_id"], ["version_id"]
        )
    op.drop_table("step_versions")
    op.drop_table("job_models")


def _rewrite_rules(change: Any) -> None:
    connection = op.get_bind()
    stored = connection.execute(sa.text("SELECT job_id, rule FROM jobs WHERE rule IS NOT NULL")).all()
    for job_id, rule in stored:
        text = json.dumps(change(json.loads(rule)))
        connection.execute(sa.text("UPDATE jobs SET rule = :rule WHERE job_id = :job"), {"rule": text, "job": job_id})
