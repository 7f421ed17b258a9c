"""The publish gate: new states of a publish, its terms and its decision; evaluations, evaluators and pins."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_BEFORE = ("requested", "draining", "swapping", "live", "failed")
_AFTER = ("requested", "draining", "swapping", "evaluating", "settling", "live", "failed", "rejected", "skipped")
_NEW_TIMES = ("evaluating_at", "settling_at", "rejected_at", "skipped_at")
_INDEX = "uq_publishes_unfinished"


def upgrade() -> None:
    """Widen the states; an acknowledgement says which of the two drains it is of. Old publishes had no gate."""
    for name in ("gate", "decision"):
        op.add_column("publishes", sa.Column(name, sa.Text(), nullable=True))
    for name in _NEW_TIMES:
        op.add_column("publishes", sa.Column(name, sa.Double(), nullable=True))
    _change_states(_BEFORE, _AFTER, unfinished=_AFTER[:5])
    op.add_column("publish_acks", sa.Column("phase", sa.String(), server_default="draining", nullable=False))
    _change_key("publish_id, proxy_id", "publish_id, proxy_id, phase")
    _create_evaluations()
    op.create_table(
        "evaluators",
        sa.Column("evaluator_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("tasks_hash", sa.String(), nullable=False),
        sa.Column("score", sa.String(), nullable=False),
        sa.Column("registered_at", sa.Double(), nullable=False),
        sa.Column("beat_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("evaluator_id", name=op.f("pk_evaluators")),
    )
    op.create_table(
        "pins",
        sa.Column("pin_id", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        _of_a_version("pins"),
        sa.PrimaryKeyConstraint("pin_id", name=op.f("pk_pins")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_pins_model"), "pins", ["model"])


def downgrade() -> None:
    """Take it back: a rejected publish has failed, one that was skipped was never asked for."""
    for table in ("pins", "evaluators", "evaluations"):
        op.drop_table(table)
    op.execute("DELETE FROM publish_acks WHERE phase <> 'draining'")
    _change_key("publish_id, proxy_id, phase", "publish_id, proxy_id")
    op.drop_column("publish_acks", "phase")
    op.execute(
        "DELETE FROM publish_acks WHERE publish_id IN (SELECT publish_id FROM publishes WHERE state = 'skipped')"
    )
    op.execute("DELETE FROM publishes WHERE state = 'skipped'")
    op.execute(
        "UPDATE publishes SET state = 'failed', failed_at = COALESCE(rejected_at, settling_at, evaluating_at)"
        " WHERE state IN ('rejected', 'settling', 'evaluating')"
    )
    _change_states(_AFTER, _BEFORE, unfinished=_BEFORE[:3])
    for name in (*_NEW_TIMES, "gate", "decision"):
        op.drop_column("publishes", name)


def _create_evaluations() -> None:
    op.create_table(
        "evaluations",
        sa.Column("evaluation_id", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("publish_id", sa.Integer(), nullable=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("tasks_hash", sa.String(), nullable=False),
        sa.Column("score", sa.String(), nullable=False),
        sa.Column("n_runs", sa.Integer(), nullable=False),
        sa.Column("n_failed", sa.Integer(), nullable=False),
        sa.Column("values", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=True) for name in ("mean", "low", "high")),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        _of_a_version("evaluations"),
        sa.ForeignKeyConstraint(
            ["publish_id"], ["publishes.publish_id"], name=op.f("fk_evaluations_publish_id_publishes")
        ),
        sa.CheckConstraint("n_failed BETWEEN 0 AND n_runs", name=op.f("ck_evaluations_n_failed")),
        sa.CheckConstraint(
            "(mean IS NULL) = (low IS NULL) AND (mean IS NULL) = (high IS NULL)",
            name=op.f("ck_evaluations_interval"),
        ),
        sa.CheckConstraint("error IS NULL OR mean IS NULL", name=op.f("ck_evaluations_error_or_mean")),
        sa.PrimaryKeyConstraint("evaluation_id", name=op.f("pk_evaluations")),
        sa.UniqueConstraint("name", name=op.f("uq_evaluations_name")),
        sqlite_autoincrement=True,
    )
    for column in ("version_id", "publish_id"):
        op.create_index(op.f(f"ix_evaluations_{column}"), "evaluations", [column])


def _of_a_version(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["version_id", "model"],
        ["policy_versions.version_id", "policy_versions.model"],
        name=op.f(f"fk_{table}_version_id_model_policy_versions"),
    )


def _change_states(before: tuple[str, ...], after: tuple[str, ...], *, unfinished: tuple[str, ...]) -> None:
    op.drop_index(_INDEX, table_name="publishes")
    if op.get_bind().dialect.name == "sqlite":
        _rebuild("publishes", {f"(state IN ({_words(before)}))": f"(state IN ({_words(after)}))"})
    else:
        op.drop_constraint(op.f("ck_publishes_state"), "publishes")
        op.create_check_constraint(op.f("ck_publishes_state"), "publishes", f"state IN ({_words(after)})")
    where = sa.text(f"state IN ({_words(unfinished)})")
    op.create_index(_INDEX, "publishes", ["model"], unique=True, sqlite_where=where, postgresql_where=where)


def _change_key(before: str, after: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        _rebuild("publish_acks", {f"PRIMARY KEY ({before})": f"PRIMARY KEY ({after})"})
    else:
        op.drop_constraint(op.f("pk_publish_acks"), "publish_acks")
        op.create_primary_key(op.f("pk_publish_acks"), "publish_acks", after.split(", "))


def _words(states: tuple[str, ...]) -> str:
    return ", ".join(f"'{state}'" for state in states)


def _rebuild(table: str, changes: dict[str, str]) -> None:
    """Copy a table into one whose text is changed (see `Database.restructure`); it has ids that are never reused."""
    connection = op.get_bind()
    about = "SELECT sql FROM sqlite_master WHERE tbl_name = :table AND type = :type AND sql IS NOT NULL"
    made = connection.execute(sa.text(about), {"table": table, "type": "table"}).scalar_one()
    indexes = connection.execute(sa.text(about), {"table": table, "type": "index"}).scalars().all()
    counts = "SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'"
    known = connection.execute(sa.text(counts)).first() is not None
    last = sa.text("SELECT seq FROM sqlite_sequence WHERE name = :table")
    reached = connection.execute(last, {"table": table}).scalar() if known else None
    head, _, body = made.partition("(")
    for before, after in changes.items():
        if before not in body:
            raise ValueError(f"the table {table} has no {before}: it is not what the revision before made")
        body = body.replace(before, after)
    op.execute(head.replace(table, f"{table}_new") + "(" + body)
    op.execute(f"INSERT INTO {table}_new SELECT * FROM {table}")
    op.execute(f"DROP TABLE {table}")
    op.execute(f"ALTER TABLE {table}_new RENAME TO {table}")
    if reached is not None:
        # An AUTOINCREMENT starts anew in a copy; ids of rows that were deleted must not come back.
        op.execute(f"DELETE FROM sqlite_sequence WHERE name = '{table}'")
        op.execute(f"INSERT INTO sqlite_sequence (name, seq) VALUES ('{table}', {int(reached)})")
    for index in indexes:
        op.execute(index)
