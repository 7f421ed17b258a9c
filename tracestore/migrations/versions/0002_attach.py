"""Late attribution, spans with inputs and outputs, retries, endpoints, API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_SOURCES = "'header', 'path', 'key', 'hook', 'langsmith', 'inferred'"


def upgrade() -> None:
    """Add columns in place: no table is copied, however large it is."""
    for column in (
        sa.Column("endpoint", sa.String(), server_default="chat", nullable=False),
        sa.Column("project", sa.String(), server_default="default", nullable=False),
        sa.Column("request_hash", sa.String(), nullable=True),
        sa.Column("retry_of", sa.String(), nullable=True),
        sa.Column("placed_by", sa.BigInteger(), nullable=True),
        sa.Column("role_by", sa.BigInteger(), nullable=True),
    ):
        op.add_column("calls", column)
    op.create_index(op.f("ix_calls_request_hash"), "calls", ["request_hash"])
    op.create_index(op.f("ix_calls_retry_of"), "calls", ["retry_of"])
    for column in (
        sa.Column("input", sa.Text(), nullable=True),
        sa.Column("output", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("source", sa.String(), nullable=True),
    ):
        op.add_column("spans", column)
    op.create_index(op.f("ix_spans_span_id"), "spans", ["span_id"])
    op.add_column("leases", sa.Column("attributions_through", sa.BigInteger(), server_default="0", nullable=False))
    # Runs opened by a call lay in "default" before calls had a project; the run knows better where there is one.
    op.execute(
        "UPDATE calls SET project = (SELECT runs.project FROM runs WHERE runs.run_id = calls.run_id) "
        "WHERE run_id IS NOT NULL"
    )
    op.create_table(
        "attributions",
        sa.Column("seq", _SERIAL, sa.Identity(always=False), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("call_id", sa.String(), nullable=True),
        sa.Column("completion_id", sa.String(), nullable=True),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("span_id", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint(f"source IN ({_SOURCES})", name=op.f("ck_attributions_source")),
        sa.CheckConstraint(
            "call_id IS NOT NULL OR completion_id IS NOT NULL", name=op.f("ck_attributions_names_a_call")
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_attributions")),
        sa.UniqueConstraint("source", "call_id", name=op.f("uq_attributions_source_call_id")),
        sa.UniqueConstraint("source", "completion_id", name=op.f("uq_attributions_source_completion_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_attributions_run_id"), "attributions", ["run_id"])
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
    )


def downgrade() -> None:
    """Take it back; what was said late is lost."""
    op.drop_table("api_keys")
    op.drop_table("attributions")
    op.drop_column("leases", "attributions_through")
    op.drop_index(op.f("ix_spans_span_id"), table_name="spans")
    for name in ("source", "ended_at", "started_at", "error", "output", "input"):
        op.drop_column("spans", name)
    op.drop_index(op.f("ix_calls_retry_of"), table_name="calls")
    op.drop_index(op.f("ix_calls_request_hash"), table_name="calls")
    for name in ("role_by", "placed_by", "retry_of", "request_hash", "project", "endpoint"):
        op.drop_column("calls", name)
