"""The store contract on SQLite, and in a database of its own on the PostgreSQL that TRACEGRAD_TEST_POSTGRES names."""

import os
from collections.abc import Iterator

import pytest
from sqlalchemy import event

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
        def store(self, postgres_url: str, clock: Clock) -> Iterator[Store]:
            store = open_store(postgres_url, clock=clock)
            yield store
            store.close()
