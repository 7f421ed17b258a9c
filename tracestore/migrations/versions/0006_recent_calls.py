"""Which runs a version sampled, from an index: leases look among recent ones only."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_INDEX = "ix_calls_version_dispatched_run_id"


def upgrade() -> None:
    """Add the index."""
    op.create_index(op.f(_INDEX), "calls", ["version_dispatched", "run_id"])


def downgrade() -> None:
    """Take it back."""
    op.drop_index(op.f(_INDEX), table_name="calls")
