"""What the trace store raises. A message says what, which id, and what to do.

TraceStoreError
├── ConfigError            the configuration is wrong: unknown key, unknown role or model
├── SchemaMismatch         the database's revision is not the code's
├── StoreUnavailable       the database cannot be reached or cannot commit (disk full, down)
├── NotFound               no such row
├── Conflict               the row exists and says something else, or the state forbids the change
│   ├── LeaseLost          the fencing token is no longer the holder's
│   └── Pinned             serving is held at another version
└── InvalidRecord          a record breaks an invariant (lengths, NaN reward, purpose)
"""


class TraceStoreError(Exception):
    """Root of every error raised by `tracegrad.tracestore`."""


class ConfigError(TraceStoreError):
    """The configuration cannot be used as written."""


class SchemaMismatch(TraceStoreError):
    """The database was made by another version of the schema."""


class StoreUnavailable(TraceStoreError):
    """The database cannot be reached, or refused to commit."""


class NotFound(TraceStoreError):
    """No row has that id."""


class Conflict(TraceStoreError):
    """The row already says something else, or its state forbids the change."""


class LeaseLost(Conflict):
    """The lease expired, was reclaimed or was released: what its holder computed must not be committed."""


class Pinned(Conflict):
    """Serving is held at another version, until somebody takes the pin off."""


class InvalidRecord(TraceStoreError):
    """A record breaks an invariant of the schema."""
