"""What every part of the store has: its database and what it remembers of it. `Store` is the parts put together."""

from tracegrad.tracestore.blocks import KnownBlocks
from tracegrad.tracestore.database import Database


class Noun:
    """A part of the store. Each of its methods is one transaction."""

    _db: Database
    _blocks: KnownBlocks
