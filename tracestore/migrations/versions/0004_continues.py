"""Which earlier call of its run a call goes on from, and whether its prompt drifted from what was sampled."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_INDEX = "ix_calls_project_model_drift"


def upgrade() -> None:
    """Add columns in place; what was recorded before is not looked through."""
    columns: tuple[sa.Column[Any], ...] = (
        sa.Column("continues", sa.String(), nullable=True),
        sa.Column("continues_choice", sa.Integer(), nullable=True),
        sa.Column("drift", sa.String(), nullable=True),
        sa.Column("token_in", sa.Boolean(), nullable=True),
    )
    for column in columns:
        op.add_column("calls", column)
    goes_on = sa.text("continues IS NOT NULL")
    op.create_index(
        op.f(_INDEX), "calls", ["project", "model", "drift"], sqlite_where=goes_on, postgresql_where=goes_on
    )


def downgrade() -> None:
    """Take it back."""
    op.drop_index(op.f(_INDEX), table_name="calls")
    for name in ("token_in", "drift", "continues_choice", "continues"):
        op.drop_column("calls", name)
