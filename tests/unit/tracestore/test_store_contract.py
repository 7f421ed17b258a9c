"""The store contract on SQLite, and in a database of its own on the PostgreSQL that TRACEGRAD_TEST_POSTGRES names."""

import os
from collections.abc import Iterator

import pytest
from sqlalchemy import URL, create_engine, event, text

from tracegrad.tracestore.database import parse_url
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.contract import StoreContract
from tracegrad.tracestore.testing.rows import Clock

POSTGRES = os.environ.get("TRACEGRAD_TEST_POSTGRES")


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestSqlite(StoreContract):
    @pytest.fixture
    def store(self, store_url: str, clock: Clock) -> Iterator[Store]:
        store = open_store(store_url, clock=clock)
        store._db.engine.dispose()  # the contract is about rows; test_durability is about the disk
        event.listen(store._db.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
        yield store
        store.close()


if POSTGRES:

    @pytest.fixture(scope="module")
    def database() -> Iterator[URL]:
        """A database per test process: several workers may share the server."""
        server = create_engine(parse_url(str(POSTGRES)), isolation_level="AUTOCOMMIT")
        name = f"tracegrad_{os.getpid()}"
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield server.url.set(database=name)
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()

    class TestPostgres(StoreContract):
        @pytest.fixture
        def store(self, database: URL, clock: Clock) -> Iterator[Store]:
            engine = create_engine(database)
            with engine.begin() as connection:
                connection.execute(text("DROP SCHEMA public CASCADE"))
                connection.execute(text("CREATE SCHEMA public"))
            engine.dispose()
            store = open_store(database.render_as_string(hide_password=False), clock=clock)
            yield store
            store.close()
