"""What hangs on a run or a call, from an index: deleting one would otherwise look through whole tables for it."""

from alembic import op
from sqlalchemy import text

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ALWAYS = (("ledger", "run_id"), ("consumption", "call_id"), ("holds", "run_id"), ("groups", "task_id"))
_WHERE_KNOWN = (("rewards", "call_id"), ("langsmith_runs", "run_id"))


def upgrade() -> None:
    """Add the indexes."""
    for table, column in _ALWAYS:
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])
    for table, column in _WHERE_KNOWN:
        known = text(f"{column} IS NOT NULL")
        name = op.f(f"ix_{table}_{column}")
        op.create_index(name, table, [column], sqlite_where=known, postgresql_where=known)


def downgrade() -> None:
    """Take them back."""
    for table, column in (*_ALWAYS, *_WHERE_KNOWN):
        op.drop_index(op.f(f"ix_{table}_{column}"), table_name=table)
