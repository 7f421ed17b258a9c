"""When the publisher of a publish was last heard of."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing is known of older ones: they are never taken for silent."""
    op.add_column("publishes", sa.Column("beat_at", sa.Double(), nullable=True))


def downgrade() -> None:
    """Take it back: a publish that nobody ends waits for a trainer again."""
    op.drop_column("publishes", "beat_at")
