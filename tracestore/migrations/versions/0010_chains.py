"""Prompts become hash chains over blocks that calls share; token ids take as few bytes as they need.

Rows are converted page by page, in the order of their calls, so that memory is bounded. The store's own code (`drafts`,
`blocks`, `payloads`) writes prompts and blocks: whoever changes those tables later gives this revision its own copy.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from tracegrad.tracestore.blocks import KnownBlocks
from tracegrad.tracestore.codec import narrow_int32, widened
from tracegrad.tracestore.drafts import drafted, insert_payloads
from tracegrad.tracestore.errors import SchemaMismatch
from tracegrad.tracestore.payloads import Payload, payloads_of
from tracegrad.tracestore.serials import Serials

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_PAGE = 200
_OLD: dict[str, dict[str, Any]] = {
    "call_payloads": {
        "call_id": sa.String(),
        "n_prompt": sa.Integer(),
        "prompt_ids": sa.LargeBinary(),
        **dict.fromkeys(("request", "requested", "effective"), sa.Text()),
    },
    "choice_payloads": {
        "call_id": sa.String(),
        "choice_index": sa.Integer(),
        "n_tokens": sa.Integer(),
        "token_ids": sa.LargeBinary(),
        "logprobs": sa.LargeBinary(),
        "message": sa.Text(),
    },
}
_ASKED = (
    "SELECT c.seq, c.call_id, c.project, p.n_prompt, p.prompt_ids, p.request, p.requested, p.effective"
    " FROM calls c JOIN old_call_payloads p ON p.call_id = c.call_id"
    f" WHERE c.seq > :last ORDER BY c.seq LIMIT {_PAGE}"
)
_ANSWERED = (
    "SELECT c.seq, c.call_id, p.choice_index, p.n_tokens, p.token_ids, p.logprobs, p.message"
    " FROM calls c JOIN old_choice_payloads p ON p.call_id = c.call_id WHERE c.seq > :last AND c.seq <= :through"
)
_NARROW = f"SELECT {', '.join(_OLD['choice_payloads'])} FROM choice_payloads WHERE call_id IN :ids"


def upgrade() -> None:
    """Put the old payloads aside, make the new tables, convert."""
    connection = op.get_bind()
    _put_aside(connection)
    _keep_rowid(connection, False)
    _index_calls(known_only=True)
    _create_blocks()
    _create_payloads()
    known = KnownBlocks()

    def convert(rows: Sequence[Any], last: int) -> None:
        asked = {row.seq: row for row in rows}
        answered = connection.execute(sa.text(_ANSWERED), {"last": last, "through": rows[-1].seq}).mappings()
        _write_answers(connection, "choice_payloads", answered, lambda ids, _: narrow_int32(ids)[1])
        payloads = {
            seq: Payload(row.n_prompt, _blob(row.prompt_ids), row.request.encode(), row.requested, row.effective)
            for seq, row in asked.items()
        }
        drafts = {seq: drafted(row.call_id, row.project, payloads[seq], ()) for seq, row in asked.items()}
        known.remember(insert_payloads(connection, drafts, known, Serials(connection)))

    _paged(connection, _ASKED, convert)
    _drop_aside(connection)


def downgrade() -> None:
    """Write every prompt out again: aside first, since PostgreSQL has one key of a name."""
    connection = op.get_bind()
    for table, columns in _OLD.items():
        op.create_table(f"old_{table}", *(sa.Column(name, kind) for name, kind in columns.items()))

    def convert(rows: Sequence[Any], _last: int) -> None:
        call_ids = {row.seq: row.call_id for row in rows}
        asked = [
            {**_fields(payload, _OLD["call_payloads"]), "call_id": call_ids[seq], "prompt_ids": payload.prompt}
            for seq, payload in payloads_of(connection, list(call_ids)).items()
        ]
        if asked:
            connection.execute(sa.table("old_call_payloads", *map(sa.column, _OLD["call_payloads"])).insert(), asked)
        named = sa.text(_NARROW).bindparams(sa.bindparam("ids", expanding=True))
        answered = connection.execute(named, {"ids": list(call_ids.values())}).mappings()
        _write_answers(connection, "old_choice_payloads", answered, widened)

    _paged(connection, f"SELECT seq, call_id FROM calls WHERE seq > :last ORDER BY seq LIMIT {_PAGE}", convert)
    for table in (*_OLD, "blocks"):
        op.drop_table(table)
    _create_old()
    for table, columns in _OLD.items():
        names = ", ".join(columns)
        op.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM old_{table}")
        op.drop_table(f"old_{table}")
    _keep_rowid(connection, True)
    _index_calls(known_only=False)


def _keep_rowid(connection: sa.Connection, keep: bool) -> None:
    """Copy SQLite's `choices` into a table that is its own index, or back."""
    if connection.dialect.name != "sqlite":
        return
    made = "SELECT sql FROM sqlite_master WHERE name = 'choices'"
    _, _, body = connection.execute(sa.text(made)).scalar_one().partition("(")
    inside = body.rpartition(")")[0]
    op.execute(f"CREATE TABLE choices_new ({inside}){'' if keep else ' WITHOUT ROWID'}")
    op.execute("INSERT INTO choices_new SELECT * FROM choices")
    op.execute("DROP TABLE choices")
    op.execute("ALTER TABLE choices_new RENAME TO choices")


def _index_calls(*, known_only: bool) -> None:
    """Most calls are no retries: what is not known needs no entry."""
    for column in ("request_hash", "retry_of"):
        op.drop_index(op.f(f"ix_calls_{column}"), table_name="calls")
        if known_only:
            _index("calls", [column], f"{column} IS NOT NULL")
        else:
            op.create_index(op.f(f"ix_calls_{column}"), "calls", [column])


def _write_answers(
    connection: sa.Connection, table: str, rows: Iterable[sa.RowMapping], coded: Callable[[bytes, int], bytes]
) -> None:
    names = list(_OLD["choice_payloads"])
    some = [
        {
            **{name: row[name] for name in names},
            "token_ids": coded(bytes(row["token_ids"]), row["n_tokens"]),
            "logprobs": _blob(row["logprobs"]),
        }
        for row in rows
    ]
    if some:
        connection.execute(sa.table(table, *map(sa.column, names)).insert(), some)


def _fields(content: Payload, wanted: Iterable[str]) -> dict[str, Any]:
    found = {name: getattr(content, name) for name in wanted if hasattr(content, name)}
    return {name: found[name].decode() if name == "request" else found[name] for name in found}


def _blob(stored: Any) -> bytes | None:
    return None if stored is None else bytes(stored)


def _paged(connection: sa.Connection, statement: str, convert: Callable[[Sequence[Any], int], None]) -> None:
    last = 0
    while rows := connection.execute(sa.text(statement), {"last": last}).all():
        convert(rows, last)
        last = rows[-1].seq


def _put_aside(connection: sa.Connection) -> None:
    for table in _OLD:
        op.rename_table(table, f"old_{table}")
        if (
            connection.dialect.name == "postgresql"
        ):  # whose names of keys are names of indexes, and those are the schema's
            op.execute(f"ALTER TABLE old_{table} RENAME CONSTRAINT pk_{table} TO pk_old_{table}")


def _drop_aside(connection: sa.Connection) -> None:
    """Drop the old tables, once all of them is in the new ones. Raises SchemaMismatch."""
    for table in _OLD:
        old, new = (
            connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar_one() for name in (f"old_{table}", table)
        )
        if old != new:
            raise SchemaMismatch(f"the store has {old - new} rows of {table} without their calls")
        op.drop_table(f"old_{table}")


def _create_blocks() -> None:
    op.create_table(
        "blocks",
        sa.Column("block_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(), nullable=False),
        sa.Column("parent_id", sa.BigInteger(), nullable=True),
        sa.Column("first", sa.Integer(), nullable=False),
        sa.Column("n_items", sa.Integer(), nullable=False),
        sa.Column("coding", sa.SmallInteger(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("project", sa.String(), nullable=True),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("length(hash) = 16", name=op.f("ck_blocks_hash")),
        sa.CheckConstraint("(parent_id IS NULL) = (project IS NOT NULL)", name=op.f("ck_blocks_root")),
        sa.CheckConstraint("n_items >= 1", name=op.f("ck_blocks_n_items")),
        sa.CheckConstraint("coding IN (0, 2, 3, 4)", name=op.f("ck_blocks_coding")),
        sa.CheckConstraint("coding = 0 OR length(content) = coding * n_items", name=op.f("ck_blocks_length")),
        sa.ForeignKeyConstraint(["parent_id"], ["blocks.block_id"], name=op.f("fk_blocks_parent_id_blocks")),
        sa.PrimaryKeyConstraint("block_id", name=op.f("pk_blocks")),
        sa.UniqueConstraint("hash", name=op.f("uq_blocks_hash")),
        sqlite_autoincrement=True,
    )
    _index("blocks", ["parent_id", "first"], "parent_id IS NOT NULL")
    _index("blocks", ["first"], "parent_id IS NULL")


def _index(table: str, columns: list[str], where: str) -> None:
    condition = sa.text(where)
    name = op.f(f"ix_{table}_{'_'.join(columns)}")
    op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)


def _create_payloads() -> None:
    left = "(n_prompt - n_chained)"
    heads = ("ids_head", "text_head")
    op.create_table(
        "call_payloads",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        *(sa.Column(head, sa.BigInteger(), nullable=True) for head in heads),
        sa.Column("n_prompt", sa.Integer(), nullable=True),
        sa.Column("n_chained", sa.Integer(), nullable=False),
        sa.Column("tail", sa.LargeBinary(), nullable=True),
        sa.Column("places", sa.String(), nullable=True),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("request", "requested", "effective")),
        sa.CheckConstraint("(tail IS NULL) = (n_prompt IS NULL)", name=op.f("ck_call_payloads_prompt_counted")),
        sa.CheckConstraint("(ids_head IS NULL) = (n_chained = 0)", name=op.f("ck_call_payloads_prompt_chained")),
        sa.CheckConstraint("n_prompt IS NOT NULL OR ids_head IS NULL", name=op.f("ck_call_payloads_prompt_known")),
        sa.CheckConstraint("(places IS NULL) = (text_head IS NULL)", name=op.f("ck_call_payloads_request_cut")),
        sa.CheckConstraint(
            f"length(tail) IN (2 * {left}, 3 * {left}, 4 * {left})", name=op.f("ck_call_payloads_prompt_length")
        ),
        sa.ForeignKeyConstraint(["seq"], ["calls.seq"], name=op.f("fk_call_payloads_seq_calls")),
        *(
            sa.ForeignKeyConstraint([head], ["blocks.block_id"], name=op.f(f"fk_call_payloads_{head}_blocks"))
            for head in heads
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_call_payloads")),
    )
    for head in heads:
        _index("call_payloads", [head], f"{head} IS NOT NULL")
    _create_choice_payloads("length(token_ids) IN (2 * n_tokens, 3 * n_tokens, 4 * n_tokens)")


def _create_choice_payloads(length: str) -> None:
    op.create_table(
        "choice_payloads",
        sa.Column("call_id", sa.String(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.CheckConstraint("length(logprobs) = 4 * n_tokens", name=op.f("ck_choice_payloads_logprob_length")),
        sa.CheckConstraint(length, name=op.f("ck_choice_payloads_token_length")),
        sa.ForeignKeyConstraint(
            ["call_id", "choice_index", "n_tokens"],
            ["choices.call_id", "choices.choice_index", "choices.n_tokens"],
            name=op.f("fk_choice_payloads_call_id_choice_index_n_tokens_choices"),
        ),
        sa.PrimaryKeyConstraint("call_id", "choice_index", name=op.f("pk_choice_payloads")),
    )


def _create_old() -> None:
    op.create_table(
        "call_payloads",
        sa.Column("call_id", sa.String(), nullable=False),
        sa.Column("n_prompt", sa.Integer(), nullable=True),
        sa.Column("prompt_ids", sa.LargeBinary(), nullable=True),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("request", "requested", "effective")),
        sa.CheckConstraint("(prompt_ids IS NULL) = (n_prompt IS NULL)", name=op.f("ck_call_payloads_prompt_counted")),
        sa.CheckConstraint("length(prompt_ids) = 4 * n_prompt", name=op.f("ck_call_payloads_prompt_length")),
        sa.ForeignKeyConstraint(["call_id"], ["calls.call_id"], name=op.f("fk_call_payloads_call_id_calls")),
        sa.PrimaryKeyConstraint("call_id", name=op.f("pk_call_payloads")),
    )
    _create_choice_payloads("length(token_ids) = 4 * n_tokens")
