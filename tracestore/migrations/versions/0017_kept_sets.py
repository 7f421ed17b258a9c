"""What top-p, top-k or min-p left when a token was sampled."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_TABLE, _COLUMNS = "choice_payloads", ("kept_counts", "kept_ids")


def upgrade() -> None:
    """Nothing was known of it until now."""
    for name in _COLUMNS:
        op.add_column(_TABLE, sa.Column(name, sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    """Take it back: the trainer sees by the parameters of such calls that they are no plain samples."""
    for name in reversed(_COLUMNS):
        op.drop_column(_TABLE, name)
