"""The store contract on SQLite, and on PostgreSQL where TRACEGRAD_TEST_POSTGRES names one (its schema is dropped)."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, text

from tracegrad.tracestore.database import parse_url
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.contract import StoreContract
from tracegrad.tracestore.testing.rows import Clock

POSTGRES = os.environ.get("TRACEGRAD_TEST_POSTGRES")


@pytest.fixture(scope="module")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "empty.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestSqlite(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path, empty_file: Path, clock: Clock) -> Iterator[Store]:
        path = tmp_path / "store.db"
        shutil.copy(empty_file, path)
        store = open_store(f"sqlite:///{path}", clock=clock)
        store._db.engine.dispose()
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
