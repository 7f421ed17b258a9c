"""The tables of what calls were asked and answered: prompts in blocks that calls share, tokens, messages.

Metadata of calls lies apart (`schema`), so that lists and counts do not read these pages. How a prompt is cut into
blocks, `chains` tells. Called by the modules of this package that write, read, count or delete content.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Table,
    TableClause,
    Text,
    column,
    table,
)

from tracegrad.tracestore.codec import Float32s, JsonText
from tracegrad.tracestore.schema import SERIAL, metadata


def _in_bytes(count: str) -> str:
    """Return how many bytes so many token ids may have (see `codec.narrowed`)."""
    return f"(2 * {count}, 3 * {count}, 4 * {count})"


blocks = Table(
    "blocks",
    metadata,
    Column("block_id", SERIAL, Identity(), primary_key=True),
    Column("parent_id", BigInteger, ForeignKey("blocks.block_id")),
    Column("first", Integer, nullable=False),
    Column("n_items", Integer, nullable=False),
    Column("coding", SmallInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("project", String),
    Column("content", LargeBinary, nullable=False),
    CheckConstraint("length(hash) = 16", name="hash"),
    CheckConstraint("(parent_id IS NULL) = (project IS NOT NULL)", name="root"),
    CheckConstraint("n_items >= 1", name="n_items"),
    CheckConstraint("coding IN (0, 2, 3, 4)", name="coding"),
    CheckConstraint("coding = 0 OR length(content) = coding * n_items", name="length"),
    sqlite_autoincrement=True,
)
"""Parts of prompts, each once a project: token ids (`coding` bytes each), or packed items of JSON (0). `hash` is
that of the chain up to its end, `first` four bytes of that of its first unit. Ids are never used twice: who remembers
the id of a deleted block must not find another."""
_is_root = blocks.c.parent_id.is_(None)
_is_child = blocks.c.parent_id.is_not(None)
Index(None, blocks.c.parent_id, blocks.c.first, sqlite_where=_is_child, postgresql_where=_is_child)
Index(None, blocks.c.first, sqlite_where=_is_root, postgresql_where=_is_root)
"""Two, since PostgreSQL sorts NULL behind all: children, whose parents are new, would be inserted in the middle."""

call_payloads = Table(
    "call_payloads",
    metadata,
    Column("seq", SERIAL, ForeignKey("calls.seq"), primary_key=True, autoincrement=False),
    Column("ids_head", BigInteger, ForeignKey("blocks.block_id")),
    Column("text_head", BigInteger, ForeignKey("blocks.block_id")),
    Column("n_prompt", Integer),
    Column("n_chained", Integer, nullable=False),
    Column("tail", LargeBinary),
    Column("places", String),
    Column("request", Text, nullable=False),
    Column("requested", JsonText, nullable=False),
    Column("effective", JsonText, nullable=False),
    CheckConstraint("(tail IS NULL) = (n_prompt IS NULL)", name="prompt_counted"),
    CheckConstraint("(ids_head IS NULL) = (n_chained = 0)", name="prompt_chained"),
    CheckConstraint("n_prompt IS NOT NULL OR ids_head IS NULL", name="prompt_known"),
    CheckConstraint("(places IS NULL) = (text_head IS NULL)", name="request_cut"),
    CheckConstraint(f"length(tail) IN {_in_bytes('(n_prompt - n_chained)')}", name="prompt_length"),
)
"""The prompt is the chain that ends with `ids_head`, `n_chained` ids of it, then `tail`. `request` is what
`chains.cut` leaves of it, `places` are those where the items of the chain that ends with `text_head` go."""
for _head in (call_payloads.c.ids_head, call_payloads.c.text_head):
    Index(None, _head, sqlite_where=_head.is_not(None), postgresql_where=_head.is_not(None))


choice_payloads = Table(
    "choice_payloads",
    metadata,
    Column("seq", SERIAL, primary_key=True, autoincrement=False),
    Column("choice_index", Integer, primary_key=True, autoincrement=False),
    Column("n_tokens", Integer, nullable=False),
    Column("token_ids", LargeBinary, nullable=False),
    Column("logprobs", Float32s),
    Column("message", JsonText, nullable=False),
    Column("kept_counts", LargeBinary),
    Column("kept_ids", LargeBinary),
    ForeignKeyConstraint(
        ["seq", "choice_index", "n_tokens"], ["choices.seq", "choices.choice_index", "choices.n_tokens"]
    ),
    CheckConstraint(f"length(token_ids) IN {_in_bytes('n_tokens')}", name="token_length"),
    CheckConstraint("length(logprobs) = 4 * n_tokens", name="logprob_length"),
)
"""`kept_counts` says of each sampled token how many ids top-p, top-k or min-p left, `kept_ids` has them one after
another; both NULL where nothing was cut off, or nobody knows what."""


_PLAIN: dict[type[Any], Any] = {Float32s: LargeBinary(), JsonText: Text()}


def raw_table(stored: Table, names: Sequence[str] | None = None) -> TableClause:
    """Return the table with its values as they lie: what the codecs would encode is encoded already."""
    return table(
        stored.name, *(column(one.name, plain_type(one)) for one in stored.c if not names or one.name in names)
    )


def plain_type(stored: Column[Any]) -> Any:
    """Return the type that lies below a codec."""
    return _PLAIN.get(type(stored.type), stored.type)
