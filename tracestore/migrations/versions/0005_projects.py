"""A late fact is of a project; what LangSmith's runs became is kept, for its feedback; what spans wrote, for edges."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NAMES = ("call_id", "completion_id")


def upgrade() -> None:
    """Facts are told apart by project. SQLite cannot alter a key: there their table is copied (it holds no payload)."""
    op.add_column("attributions", sa.Column("project", sa.String(), server_default="default", nullable=False))
    # Whoever said it meant a run of its own project; a fact without a run is of the project of the call it found.
    op.execute(
        "UPDATE attributions SET project = COALESCE("
        "(SELECT runs.project FROM runs WHERE runs.run_id = attributions.run_id), "
        "(SELECT MIN(calls.project) FROM calls WHERE calls.call_id = attributions.call_id"
        " OR calls.completion_id = attributions.completion_id), 'default')"
    )
    _change_keys([["source", name] for name in _NAMES], [["project", "source", name] for name in _NAMES])
    op.create_table(
        "langsmith_runs",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("langsmith_id", sa.String(), nullable=False),
        sa.Column("trace_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("span_id", sa.String(), nullable=True),
        sa.Column("named", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_langsmith_runs_run_id_runs")),
        sa.PrimaryKeyConstraint("project", "langsmith_id", name=op.f("pk_langsmith_runs")),
    )
    op.create_index(op.f("ix_langsmith_runs_project_trace_id"), "langsmith_runs", ["project", "trace_id"])
    op.add_column("spans", sa.Column("wrote", sa.Text(), nullable=True))


def downgrade() -> None:
    """Take it back: of what a source said of a call, whatever its project, the first stays."""
    op.drop_column("spans", "wrote")
    op.drop_table("langsmith_runs")
    op.execute(
        "DELETE FROM attributions WHERE seq NOT IN"
        " (SELECT MIN(seq) FROM attributions GROUP BY source, call_id, completion_id)"
    )
    _change_keys([["project", "source", name] for name in _NAMES], [["source", name] for name in _NAMES])
    op.drop_column("attributions", "project")


def _change_keys(before: list[list[str]], after: list[list[str]]) -> None:
    if op.get_bind().dialect.name == "sqlite":
        _rebuild({_constraint(old): _constraint(new) for old, new in zip(before, after, strict=True)})
        return
    for old, new in zip(before, after, strict=True):
        op.drop_constraint(_name(old), "attributions")
        op.create_unique_constraint(_name(new), "attributions", new)


def _name(columns: list[str]) -> str:
    return op.f("uq_attributions_" + "_".join(columns))


def _constraint(columns: list[str]) -> str:
    return f"CONSTRAINT {_name(columns)} UNIQUE ({', '.join(columns)})"


def _rebuild(changes: dict[str, str]) -> None:
    """Copy the facts into a table whose text is changed (see `Database.restructure`)."""
    connection = op.get_bind()
    about = "SELECT sql FROM sqlite_master WHERE tbl_name = 'attributions' AND type = :type AND sql IS NOT NULL"
    made = connection.execute(sa.text(about), {"type": "table"}).scalar_one()
    indexes = connection.execute(sa.text(about), {"type": "index"}).scalars().all()
    _, _, body = made.partition("(")
    for before, after in changes.items():
        if before not in body:
            raise ValueError(f"the table attributions has no {before}: it is not what revision 0004 knows")
        body = body.replace(before, after)
    op.execute(f"CREATE TABLE attributions_new ({body}")
    op.execute("INSERT INTO attributions_new SELECT * FROM attributions")
    op.execute("DROP TABLE attributions")
    op.execute("ALTER TABLE attributions_new RENAME TO attributions")
    for index in indexes:
        op.execute(index)
