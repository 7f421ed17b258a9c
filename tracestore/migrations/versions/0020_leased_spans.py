"""The spans of a run as they were when it was leased, and which late fact gave a call its span."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A lease that is held meanwhile knows nothing of it: it reads the spans as they are, as it did."""
    op.add_column("holds", sa.Column("spans", sa.Text(), nullable=True))
    op.add_column("calls", sa.Column("span_by", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("calls", "span_by")
    op.drop_column("holds", "spans")
