"""How many times its model was trained to make a version, and from which first one: what staleness is counted in.

The steps of a job are not it: a step may train one model of several, and the next that trains the other is then several
steps on, but one update.
"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Count along the descent; what descends from nothing known has as many as its step says."""
    op.add_column("policy_versions", sa.Column("updates", sa.Integer(), server_default="0", nullable=False))
    op.add_column("policy_versions", sa.Column("line", sa.Integer(), nullable=True))
    versions = sa.table(
        "policy_versions",
        *(sa.column(name, sa.Integer) for name in ("version_id", "parent_id", "step", "updates", "line")),
        sa.column("kind", sa.String),
    )
    connection = op.get_bind()
    updates: dict[int, int] = {}
    lines: dict[int, int] = {}
    chosen = sa.select(versions.c.version_id, versions.c.parent_id, versions.c.step, versions.c.kind)
    for row in connection.execute(chosen.order_by(versions.c.version_id)):  # parents have the smaller number
        first = row.parent_id is None
        updates[row.version_id] = row.step if first else updates[row.parent_id] + (row.kind == "step")
        lines[row.version_id] = row.version_id if first else lines[row.parent_id]
    if updates:
        change = versions.update().where(versions.c.version_id == sa.bindparam("one"))
        change = change.values(updates=sa.bindparam("updates"), line=sa.bindparam("line"))
        rows = [
            {"one": one, "updates": updates[one], "line": None if one == line else line} for one, line in lines.items()
        ]
        connection.execute(change, rows)


def downgrade() -> None:
    """Take it back."""
    op.drop_column("policy_versions", "line")
    op.drop_column("policy_versions", "updates")
