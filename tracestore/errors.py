"""What the trace store raises. A message says what, which id, and what to do.

TraceStoreError
├── ConfigError            the configuration is wrong: unknown key, unknown role or model
├── SchemaMismatch         the database's revision is not the code's
├── StoreUnavailable       the database cannot be reached or cannot commit (disk full, down)
│   └── TransactionRollback    the database ended the transaction, so that another could go on: it can be run again
├── NotFound               no such row
├── Conflict               the row exists and says something else, or the state forbids the change
│   ├── Abandoned          those weights were rolled back: nothing is built on them or published of them
│   ├── KeyTaken           a unique key of a table has that value already
│   ├── LeaseLost          the fencing token is no longer the holder's
│   ├── Pinned             serving is held at another version
│   └── PublishUnderWay    the model has a publish that is not over
└── InvalidRecord          a record breaks an invariant (lengths, NaN reward, purpose)
    └── MissingRow         it names a row that is not there
"""


class TraceStoreError(Exception):
    """Root of every error raised by `tracegrad.tracestore`."""


class ConfigError(TraceStoreError):
    """The configuration cannot be used as written."""


class SchemaMismatch(TraceStoreError):
    """The database was made by another version of the schema."""


class StoreUnavailable(TraceStoreError):
    """The database cannot be reached, or refused to commit."""


class TransactionRollback(StoreUnavailable):
    """A deadlock, or another transaction changed what this one saw: nothing is written, and the same work may pass."""


class NotFound(TraceStoreError):
    """No row has that id."""


class Conflict(TraceStoreError):
    """The row already says something else, or its state forbids the change."""


class Abandoned(Conflict):
    """A version was abandoned, by a rollback or the gate: it must not be built on, and not be published."""


class KeyTaken(Conflict):
    """A unique key has that value already, in the table of that name."""

    def __init__(self, message: str, *, table: str) -> None:
        super().__init__(message)
        self.table = table


class LeaseLost(Conflict):
    """The lease expired, was reclaimed or was released: what its holder computed must not be committed."""


class Pinned(Conflict):
    """Serving is held at another version, until somebody takes the pin off."""


class PublishUnderWay(Conflict):
    """The model has a publish that is not over: wait for it."""


class InvalidRecord(TraceStoreError):
    """A record breaks an invariant of the schema."""


class MissingRow(InvalidRecord):
    """A foreign key leads to no row. (SQLite does not say which.)"""
