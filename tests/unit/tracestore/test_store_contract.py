"""The store contract on SQLite, and on PostgreSQL where TRACEGRAD_TEST_POSTGRES names one (its schema is dropped)."""

import os
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, event, text

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

    class TestPostgres(StoreContract):
        @pytest.fixture
        def store(self, clock: Clock) -> Iterator[Store]:
            engine = create_engine(parse_url(str(POSTGRES)))
            with engine.begin() as connection:
                connection.execute(text("DROP SCHEMA public CASCADE"))
                connection.execute(text("CREATE SCHEMA public"))
            engine.dispose()
            store = open_store(str(POSTGRES), clock=clock)
            yield store
            store.close()
