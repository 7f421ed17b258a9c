"""Choices, their tokens and what became of them go by the number of their call; blocks have no index over their hashes.

Ids of calls are long and in no order: each index over them cost an append a page of its own, and there were four.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TABLES = ("choices", "choice_payloads", "consumption")
_COPIED = {
    "choices": "choice_index, n_tokens, finish_reason, flags",
    "choice_payloads": "choice_index, n_tokens, token_ids, logprobs, message",
    "consumption": "job_id, epoch, choice_index, run_id, trained_tokens, excluded_tokens, n_tokens, reason, model",
}
_KEY = {"seq": "call_id", "call_id": "seq"}
_MERGE = (
    "CREATE INDEX same_hash ON blocks (hash)",
    "UPDATE blocks SET parent_id = (SELECT min(k.block_id) FROM blocks k JOIN blocks p ON p.hash = k.hash"
    " WHERE p.block_id = blocks.parent_id) WHERE parent_id IS NOT NULL",
    *(
        f"UPDATE call_payloads SET {head} = (SELECT min(k.block_id) FROM blocks k JOIN blocks p ON p.hash = k.hash"
        f" WHERE p.block_id = call_payloads.{head}) WHERE {head} IS NOT NULL"
        for head in ("ids_head", "text_head")
    ),
    "DELETE FROM blocks WHERE EXISTS"
    " (SELECT 1 FROM blocks k WHERE k.hash = blocks.hash AND k.block_id < blocks.block_id)",
    "DROP INDEX same_hash",
)
"""Blocks that two writers stored at the same moment become one."""


def upgrade() -> None:
    """Copy the tables into new ones under the numbers of the calls."""
    _rekey("seq")
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_blocks(unique=False)
    else:
        op.drop_constraint(op.f("uq_blocks_hash"), "blocks", type_="unique")
        _index_completions("hash")


def downgrade() -> None:
    """Copy them back under the ids of the calls."""
    _rekey("call_id")
    for statement in _MERGE:
        op.execute(statement)
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_blocks(unique=True)
    else:
        op.create_unique_constraint(op.f("uq_blocks_hash"), "blocks", ["hash"])
        _index_completions("btree")


def _rekey(key: str) -> None:
    connection = op.get_bind()
    for table in _TABLES:
        op.rename_table(table, f"old_{table}")
        if connection.dialect.name == "postgresql":  # names of its indexes are the schema's
            named = sa.text(
                "SELECT indexname FROM pg_indexes WHERE tablename = :table AND schemaname = current_schema()"
            )
            for (index,) in connection.execute(named, {"table": f"old_{table}"}).all():
                op.execute(f'ALTER INDEX "{index}" RENAME TO "old_{index}"')
        _CREATE[table](key)
        names = _COPIED[table]
        ours = ", ".join(f"o.{name.strip()}" for name in names.split(","))
        op.execute(
            f"INSERT INTO {table} ({key}, {names}) SELECT c.{key}, {ours} FROM old_{table} o"
            f" JOIN calls c ON c.{_KEY[key]} = o.{_KEY[key]} ORDER BY c.seq, o.choice_index"
        )
    for table in reversed(_TABLES):
        op.drop_table(f"old_{table}")
    _index_consumption(key)


def _column(key: str) -> sa.Column[object]:
    return sa.Column(key, _SERIAL if key == "seq" else sa.String(), autoincrement=False, nullable=False)


def _to_choices(table: str, key: str) -> sa.ForeignKeyConstraint:
    columns = [key, "choice_index", "n_tokens"]
    name = op.f(f"fk_{table}_{'_'.join(columns)}_choices")
    return sa.ForeignKeyConstraint(columns, [f"choices.{one}" for one in columns], name=name)


def _create_choices(key: str) -> None:
    triple = [key, "choice_index", "n_tokens"]
    keys = (
        [sa.PrimaryKeyConstraint(*triple, name=op.f("pk_choices"))]
        if key == "seq"
        else [
            sa.PrimaryKeyConstraint(key, "choice_index", name=op.f("pk_choices")),
            sa.UniqueConstraint(*triple, name=op.f(f"uq_choices_{'_'.join(triple)}")),
        ]
    )
    op.create_table(
        "choices",
        _column(key),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("finish_reason", sa.String(), nullable=True),
        sa.Column("flags", sa.Text(), nullable=False),
        sa.CheckConstraint("choice_index >= 0", name=op.f("ck_choices_choice_index")),
        sa.CheckConstraint("n_tokens >= 0", name=op.f("ck_choices_n_tokens")),
        sa.ForeignKeyConstraint([key], [f"calls.{key}"], name=op.f(f"fk_choices_{key}_calls")),
        *keys,
        sqlite_with_rowid=False,
    )


def _create_tokens(key: str) -> None:
    op.create_table(
        "choice_payloads",
        _column(key),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "length(token_ids) IN (2 * n_tokens, 3 * n_tokens, 4 * n_tokens)",
            name=op.f("ck_choice_payloads_token_length"),
        ),
        sa.CheckConstraint("length(logprobs) = 4 * n_tokens", name=op.f("ck_choice_payloads_logprob_length")),
        _to_choices("choice_payloads", key),
        sa.PrimaryKeyConstraint(key, "choice_index", name=op.f("pk_choice_payloads")),
    )


def _create_consumption(key: str) -> None:
    op.create_table(
        "consumption",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column(key, sa.BigInteger() if key == "seq" else sa.String(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("trained_tokens", sa.Integer(), nullable=False),
        sa.Column("excluded_tokens", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("model", sa.String(), nullable=True),
        sa.CheckConstraint("excluded_tokens = 0 OR reason IS NOT NULL", name=op.f("ck_consumption_reason")),
        sa.CheckConstraint("trained_tokens + excluded_tokens = n_tokens", name=op.f("ck_consumption_conserved")),
        sa.CheckConstraint("trained_tokens >= 0 AND excluded_tokens >= 0", name=op.f("ck_consumption_counts")),
        _to_choices("consumption", key),
        sa.ForeignKeyConstraint(
            ["job_id", "run_id", "epoch"],
            ["ledger.job_id", "ledger.run_id", "ledger.epoch"],
            name=op.f("fk_consumption_job_id_run_id_epoch_ledger"),
        ),
        sa.PrimaryKeyConstraint("job_id", "epoch", key, "choice_index", name=op.f("pk_consumption")),
    )


def _index_consumption(key: str) -> None:
    op.create_index(op.f(f"ix_consumption_{key}"), "consumption", [key])


def _index_completions(using: str) -> None:
    """PostgreSQL's; completion ids are looked for one by one, and long."""
    name = op.f("ix_calls_completion_id")
    op.drop_index(name, table_name="calls")
    op.create_index(name, "calls", ["completion_id"], postgresql_using=using)


_CREATE = {"choices": _create_choices, "choice_payloads": _create_tokens, "consumption": _create_consumption}


def _rebuild_blocks(*, unique: bool) -> None:
    """Copy SQLite's blocks into a table with or without the constraint; ids go on from the highest ever given."""
    connection = op.get_bind()
    made = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'blocks'"
    _, _, body = connection.execute(sa.text(made)).scalar_one().partition("(")
    inside = body.rpartition(")")[0]
    constraint = "CONSTRAINT uq_blocks_hash UNIQUE (hash)"
    if unique:
        inside = f"{inside}, {constraint}"
    else:
        before, _, after = inside.partition(constraint)
        inside = before.rstrip().rstrip(",") + after
    indexes = "SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'blocks' AND sql IS NOT NULL"
    made_again = connection.execute(sa.text(indexes)).scalars().all()
    last = connection.execute(sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'blocks'")).scalar()
    op.execute(f"CREATE TABLE blocks_new ({inside})")
    op.execute("INSERT INTO blocks_new SELECT * FROM blocks")
    op.execute("DROP TABLE blocks")
    op.execute("ALTER TABLE blocks_new RENAME TO blocks")
    for statement in made_again:
        op.execute(statement)
    if last is not None:
        op.execute("DELETE FROM sqlite_sequence WHERE name = 'blocks'")
        op.execute(f"INSERT INTO sqlite_sequence (name, seq) VALUES ('blocks', {last})")
