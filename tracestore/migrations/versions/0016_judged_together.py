"""The versions of all models that an evaluation judged as one. Those that are there were of one model."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("evaluations", sa.Column("versions", sa.Text(), nullable=True))


def downgrade() -> None:
    """Take it back."""
    with op.batch_alter_table("evaluations") as table:
        table.drop_column("versions")
