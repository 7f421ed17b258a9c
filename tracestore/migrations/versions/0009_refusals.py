"""Runs that a job refused, so that it leases them no more; the runs of a step from an index."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table and the index."""
    op.create_table(
        "refusals",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("reasons", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_refusals_job_id_jobs")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_refusals_run_id_runs")),
        sa.PrimaryKeyConstraint("job_id", "run_id", "epoch", name=op.f("pk_refusals")),
    )
    op.create_index(op.f("ix_refusals_run_id"), "refusals", ["run_id"])
    op.create_index(op.f("ix_ledger_job_id_step"), "ledger", ["job_id", "step"])


def downgrade() -> None:
    """Take them back."""
    op.drop_index(op.f("ix_ledger_job_id_step"), table_name="ledger")
    op.drop_table("refusals")
