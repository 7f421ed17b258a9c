"""Publishes that calls in flight go through, and which version sampled which token of a choice."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Every publish until now drained, and no choice has two versions."""
    op.add_column("choices", sa.Column("version_spans", sa.Text(), nullable=True))
    op.add_column("publishes", sa.Column("in_flight", sa.Boolean(), server_default=sa.false(), nullable=False))


def downgrade() -> None:
    """Take it back: a call with several versions is quarantined, as it was before anybody could tell."""
    changed = "SELECT seq FROM choices WHERE version_spans IS NOT NULL"
    op.execute(f"UPDATE calls SET quarantine = 'version changed' WHERE quarantine IS NULL AND seq IN ({changed})")
    op.drop_column("publishes", "in_flight")
    op.drop_column("choices", "version_spans")
