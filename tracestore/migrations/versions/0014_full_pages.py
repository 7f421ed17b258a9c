"""Full pages in PostgreSQL's indexes over numbers that only grow: none of them is ever filled in the middle."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_GROWING = (
    *("pk_calls", "pk_choices", "pk_choice_payloads", "pk_call_payloads", "pk_blocks"),
    *("ix_call_payloads_ids_head", "ix_call_payloads_text_head", "ix_blocks_parent_id_first"),
)


def upgrade() -> None:
    """Fill new pages whole; PostgreSQL leaves a tenth free. Pages that are there stay as they are."""
    if op.get_bind().dialect.name == "postgresql":
        for name in _GROWING:
            op.execute(f"ALTER INDEX {name} SET (fillfactor = 100)")


def downgrade() -> None:
    """Take it back."""
    if op.get_bind().dialect.name == "postgresql":
        for name in _GROWING:
            op.execute(f"ALTER INDEX {name} RESET (fillfactor)")
