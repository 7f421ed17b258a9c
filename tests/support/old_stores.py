"""Stores of earlier revisions of the schema, for the tests of migrations: made, filled, taken back and forth."""

from pathlib import Path

import first_revision
import pytest
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

import tracegrad.tracestore.migrate


def url_of(path: Path) -> str:
    """The URL of a store in a file."""
    return f"sqlite:///{path}"


def script() -> ScriptDirectory:
    """The migrations."""
    config = Config()
    config.set_main_option("script_location", str(Path(tracegrad.tracestore.migrate.__file__).parent / "migrations"))
    return ScriptDirectory.from_config(config)


@pytest.fixture(params=["sqlite", "postgres"])
def first_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store as the first revision's code left it (see `first_revision`)."""
    url = url_of(tmp_path / "store.db")
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    to_revision(url, "0001")
    engine = create_engine(url)
    with engine.begin() as connection:
        first_revision.fill(connection)
    engine.dispose()
    return url


def to_revision(url: str, revision: str) -> None:
    """Bring a store up or back to a revision."""
    engine = create_engine(url)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", script().dir)
        config.attributes["connection"] = connection
        known = [found.revision for found in script().walk_revisions()]
        now = MigrationContext.configure(connection).get_current_revision()
        back = now is not None and (revision == "base" or known.index(revision) > known.index(now))
        (command.downgrade if back else command.upgrade)(config, revision)
    engine.dispose()
