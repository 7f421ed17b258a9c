"""`rule` is a source of roles: what a role rule decided is stored under its own name."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_KNOWN = "'header', 'path', 'key', 'hook', 'langsmith', 'inferred'"
_WITH_RULE = "'header', 'path', 'key', 'hook', 'langsmith', 'rule', 'inferred'"
_PLACES = (("calls", "role_source"), ("attributions", "source"))


def upgrade() -> None:
    """Widen the two CHECKs. SQLite cannot alter one: there both tables are copied (neither holds payload)."""
    for table, column in _PLACES:
        _change_check(table, column, _KNOWN, _WITH_RULE)


def downgrade() -> None:
    """Take it back; what a rule decided is then called inferred, its words beside a call are lost."""
    op.execute("UPDATE calls SET role_source = 'inferred' WHERE role_source = 'rule'")
    op.execute("DELETE FROM attributions WHERE source = 'rule'")
    for table, column in _PLACES:
        _change_check(table, column, _WITH_RULE, _KNOWN)


def _change_check(table: str, column: str, before: str, after: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        _rebuild(table, {f"({column} IN ({before}))": f"({column} IN ({after}))"})
    else:
        op.drop_constraint(op.f(f"ck_{table}_{column}"), table)
        op.create_check_constraint(op.f(f"ck_{table}_{column}"), table, f"{column} IN ({after})")


def _rebuild(table: str, changes: dict[str, str]) -> None:
    """Copy a table into one whose text is changed, as SQLite's own documentation does it; see `Database.restructure`.

    Foreign keys are off, so those that name the table go on naming it.
    """
    connection = op.get_bind()
    about = "SELECT sql FROM sqlite_master WHERE tbl_name = :table AND type = :type AND sql IS NOT NULL"
    made = connection.execute(sa.text(about), {"table": table, "type": "table"}).scalar_one()
    indexes = connection.execute(sa.text(about), {"table": table, "type": "index"}).scalars().all()
    head, _, body = made.partition("(")
    for before, after in changes.items():
        if before not in body:
            raise ValueError(f"the table {table} has no {before}: it is not what revision 0002 made")
        body = body.replace(before, after)
    op.execute(head.replace(table, f"{table}_new") + "(" + body)
    op.execute(f"INSERT INTO {table}_new SELECT * FROM {table}")
    op.execute(f"DROP TABLE {table}")
    op.execute(f"ALTER TABLE {table}_new RENAME TO {table}")
    for index in indexes:
        op.execute(index)
