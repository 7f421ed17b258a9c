"""Which earlier call of its run a call goes on from, and whether its prompt drifted from what was sampled."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NAMES = ("continues", "continues_choice", "drift", "token_in")
_INDEX = "ix_calls_project_model_drift"


def upgrade() -> None:
    """Add columns in place; what was recorded before is not looked through."""
    for name, kind in zip(_NAMES, (sa.String(), sa.Integer(), sa.String(), sa.Boolean()), strict=True):
        op.add_column("calls", sa.Column(name, kind, nullable=True))
    goes_on = sa.text("continues IS NOT NULL")
    op.create_index(
        op.f(_INDEX), "calls", ["project", "model", "drift"], sqlite_where=goes_on, postgresql_where=goes_on
    )


def downgrade() -> None:
    """Take it back."""
    op.drop_index(op.f(_INDEX), table_name="calls")
    for name in reversed(_NAMES):
        op.drop_column("calls", name)
