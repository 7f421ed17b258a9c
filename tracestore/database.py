"""The engine under the store: connections, transactions, and what their errors mean.

SQLite: WAL, synchronous FULL, foreign keys on, and every writing transaction opened by BEGIN IMMEDIATE (a deferred one
that upgrades fails at once with "database is locked" instead of waiting). The driver's own transaction handling is
switched off; SQLAlchemy's begin event says BEGIN. Writers of one process take turns on a lock, because SQLite's own
waiting is a sleep, and hand one connection on to one another. PostgreSQL: psycopg, REPEATABLE READ for reads so that
one method sees one snapshot.

Refuses in-memory SQLite (two processes cannot share it) and other databases. Called by the modules of this package.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Insert, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from tracegrad.tracestore.checkpointer import Checkpointer
from tracegrad.tracestore.errors import (
    ConfigError,
    InvalidRecord,
    KeyTaken,
    MissingRow,
    SchemaMismatch,
    StoreUnavailable,
    TraceStoreError,
    TransactionRollback,
)
from tracegrad.tracestore.hot import run_plain

BUSY_TIMEOUT_S = 30.0
_WRITES = "tracegrad_writes"
_WAL_PAGES = 16_384
"""How long the log becomes (64 MB) before a commit copies it into the file itself: see `checkpointer`."""
_UNIQUE_VIOLATION, _FOREIGN_KEY_VIOLATION = "23505", "23503"
_SERIALIZATION_FAILURE, _DEADLOCK_DETECTED = "40001", "40P01"
_SETTINGS = """
    SELECT set_config(name, wanted.setting, false)
    FROM pg_settings JOIN (VALUES
        ('jit', 'off'), ('default_toast_compression', 'lz4'), ('synchronous_commit', 'on')) AS wanted (name, setting)
    USING (name)
    WHERE (enumvals IS NULL OR wanted.setting = ANY (enumvals))
    AND (name <> 'synchronous_commit' OR pg_settings.setting = 'off')
"""
"""Compiling the query that looks for ready groups took 0.17 s each time; running it takes 0.02 s. With the default
compression a batch of calls takes a quarter longer; a server that was built without lz4 keeps that. A commit is on the
disk (law 3) also where the server's own default is not to wait; `local` and what is stronger than `on` stay."""


class Database:
    """One engine, and the only two ways to use it: `read` and `write`, each one transaction."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self.url = parse_url(url)
        self.engine = _sqlite_engine(self.url) if self.is_sqlite else _postgres_engine(self.url)
        self.now = clock
        self._writer = self.engine.execution_options(**{_WRITES: True})
        self._reader = (
            self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="REPEATABLE READ")
        )
        self._turn = threading.Lock() if self.is_sqlite else nullcontext()
        self._kept: Connection | None = None
        self._checkpointer = Checkpointer(Path(str(self.url.database)), self._turn) if self.is_sqlite else None

    @property
    def is_sqlite(self) -> bool:
        """Whether the backend is SQLite (else it is PostgreSQL)."""
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot. Raises StoreUnavailable."""
        with _translated(self.url), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One durable transaction: committed when the block ends, rolled back when it raises.

        Raises:
            StoreUnavailable: the database cannot be reached or cannot commit.
            TransactionRollback: PostgreSQL ended it in favour of another; whoever can do all of it again may.
            KeyTaken: a unique key has that value already.
            MissingRow: a foreign key leads nowhere.
            InvalidRecord: another constraint refuses the row.
        """
        with self._turn, _translated(self.url), self._writing() as connection, connection.begin():
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A connection to write with. SQLite's writers, who take turns, use one: the pool's care costs 0.06 ms a time.

        One that was left by an error is given back to the pool, which sees to its state.
        """
        if not self.is_sqlite:
            with self._writer.connect() as connection:
                yield connection
            return
        connection, self._kept = self._kept or self._writer.connect(), None
        try:
            yield connection
            self._kept = connection
        finally:
            if self._kept is None:
                connection.close()
        if self._checkpointer is not None:
            driver: Any = connection.connection.driver_connection
            self._checkpointer.wrote(driver.total_changes)

    @contextmanager
    def restructure(self) -> Iterator[Connection]:
        """As `write`, for migrations: SQLite rebuilds a table by dropping it, which foreign keys would forbid.

        They are checked, all of them, before the transaction is committed.
        """
        if not self.is_sqlite:
            with self.write() as connection:
                yield connection
            return
        with self._turn, _translated(self.url), self._writer.connect() as connection:
            driver: Any = connection.connection.driver_connection  # within a transaction the pragma does nothing
            driver.execute("PRAGMA foreign_keys=OFF")
            try:
                with connection.begin():
                    yield connection
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
                    if broken is not None:
                        raise SchemaMismatch(f"{self.url.database} has rows of {broken[0]} without their {broken[2]}")
            finally:
                with suppress(sqlite3.ProgrammingError):  # Ctrl-C in a statement has closed it
                    driver.execute("PRAGMA foreign_keys=ON")

    @contextmanager
    def outside(self) -> Iterator[Connection]:
        """A connection without a transaction, for what the database refuses to do inside one (VACUUM)."""
        if self.is_sqlite:  # the event that says BEGIN listens to the engine, so the driver is spoken to
            alone = create_engine(self.url, connect_args={"timeout": BUSY_TIMEOUT_S}, isolation_level="AUTOCOMMIT")
        else:
            alone = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        try:
            with self._turn, _translated(self.url), alone.connect() as connection:
                yield connection
        finally:
            if self.is_sqlite:
                alone.dispose()

    def close(self) -> None:
        """Give the connections back."""
        with self._turn:
            if self._kept is not None:
                self._kept.close()
                self._kept = None
        if self._checkpointer is not None:
            self._checkpointer.close()
        self.engine.dispose()


def parse_url(url: str) -> URL:
    """Return the SQLAlchemy URL, with psycopg as PostgreSQL's driver. Raises ConfigError."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"store URL {url!r} cannot be read: write sqlite:///PATH or postgresql://...") from error
    name = parsed.get_backend_name()
    if name == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ConfigError("an in-memory SQLite store cannot be shared: name a file, sqlite:///PATH")
        return parsed.set(drivername="sqlite+pysqlite")
    if name in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise ConfigError(f"the store speaks SQLite and PostgreSQL, not {name!r}: write sqlite:///PATH or postgresql://...")


def insert(connection: Connection, table: Table) -> Any:
    """Return the backend's INSERT, which knows ON CONFLICT."""
    return insert_for(connection.dialect.name, table)


def insert_for(dialect: str, table: Table) -> Any:
    """Return `insert` for a dialect by name, for statements that are built once and kept."""
    made: Insert = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    return made


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(
        url, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}, pool_size=8, max_overflow=56
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver must not open or close transactions behind our back
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        connection.execute("PRAGMA temp_store=MEMORY")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        run_plain(connection, "BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: URL) -> Engine:
    try:
        engine = create_engine(url, pool_pre_ping=True, pool_size=8, max_overflow=56)
    except ImportError as error:
        raise ConfigError("PostgreSQL needs psycopg: pip install 'psycopg[binary]'") from error

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _entry: ConnectionPoolEntry) -> None:
        connection.execute(_SETTINGS)
        connection.commit()

    return engine


def use_wal(path: Path) -> None:
    """Put the SQLite file into WAL mode, which it then keeps. Raises StoreUnavailable.

    The switch needs the file alone and does not wait on SQLite's busy handler: concurrent openers retry here.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        connection = None
        try:
            connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode == "wal":
                return
            raise StoreUnavailable(f"{path} stays in journal mode {mode!r}: put the store on a disk that can do WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise StoreUnavailable(f"cannot open the store {path}: {error}") from error
            time.sleep(0.01)
        except sqlite3.DatabaseError as error:
            raise StoreUnavailable(f"{path} is not a usable SQLite file: {error}") from error
        finally:
            if connection is not None:
                connection.close()


@contextmanager
def _translated(url: URL) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise _refused(error) from error
    except DataError as error:
        raise InvalidRecord(f"the database refused a value: {_plain(error)}") from error
    except DBAPIError as error:
        where = url.render_as_string(hide_password=True)
        if getattr(error.orig, "sqlstate", None) in (_SERIALIZATION_FAILURE, _DEADLOCK_DETECTED):
            raise TransactionRollback(f"the store {where} ended a transaction: {_plain(error)}; try again") from error
        raise StoreUnavailable(
            f"the store {where} is unavailable: {_plain(error)}; check that it is reachable and has room"
        ) from error
    except StatementError as error:
        if isinstance(error.orig, TraceStoreError):
            raise error.orig from error
        raise InvalidRecord(f"a value does not fit its column: {_plain(error)}") from error
    except PoolTimeout as error:
        raise StoreUnavailable(f"no free connection to the store {url.render_as_string(hide_password=True)}") from error


def _refused(error: IntegrityError) -> TraceStoreError:
    text = _plain(error)
    driver: Any = error.orig
    state = getattr(driver, "sqlstate", None)
    if state == _UNIQUE_VIOLATION or text.startswith("UNIQUE"):
        # "UNIQUE constraint failed: calls.call_id"; PostgreSQL's driver has the name apart.
        named = str(driver.diag.table_name) if state else text.rpartition(": ")[2].partition(".")[0]
        return KeyTaken(f"a row with that key exists already ({text}): read it back before writing again", table=named)
    kind = MissingRow if state == _FOREIGN_KEY_VIOLATION or text.startswith("FOREIGN KEY") else InvalidRecord
    return kind(f"a constraint refuses the row ({text}): see tracestore/schema.py for what it guards")


def _plain(error: StatementError) -> str:
    """Return the driver's words on one line, without the statement and its parameters (they hold prompts).

    PostgreSQL quotes a line of the statement and the row that a constraint refuses; of a key its values are ids.
    """
    driver: Any = error.orig
    server = getattr(driver, "diag", None)
    if server is None or server.message_primary is None:  # SQLite's, or of a server that cannot be reached
        return " ".join(str(driver).split())
    key = server.message_detail if server.sqlstate in (_UNIQUE_VIOLATION, _FOREIGN_KEY_VIOLATION) else None
    notes = [f"({note})" for note in (key, server.message_hint) if note]
    return " ".join(" ".join([server.message_primary, *notes]).split())
