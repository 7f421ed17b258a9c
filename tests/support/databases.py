"""Fixtures: a store file that is migrated once and copied for each test; an empty database where there is a PostgreSQL.

Imported by the conftests of the folders that need a store.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import lacking
from sqlalchemy import URL, create_engine, text

from tracegrad.tracestore.database import parse_url
from tracegrad.tracestore.store import Store, open_store


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "empty.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def store_url(tmp_path: Path, empty_file: Path) -> str:
    path = tmp_path / "store.db"
    shutil.copy(empty_file, path)
    return f"sqlite:///{path}"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = open_store(store_url, create=False)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def postgres_database() -> Iterator[URL]:
    """A database per test process: several workers may share the server."""
    where = os.environ.get("TRACEGRAD_TEST_POSTGRES")
    if not where:
        lacking("no PostgreSQL: TRACEGRAD_TEST_POSTGRES names none")
    server = create_engine(parse_url(where), isolation_level="AUTOCOMMIT")
    name = f"tracegrad_{os.getpid()}"
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield server.url.set(database=name)
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def postgres_url(postgres_database: URL) -> str:
    """The URL of the database, emptied."""
    engine = create_engine(postgres_database)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return postgres_database.render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgres"])
def either_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty store on each backend in turn."""
    return str(request.getfixturevalue("store_url" if request.param == "sqlite" else "postgres_url"))
