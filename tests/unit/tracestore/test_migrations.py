"""Opening: from nothing, by many at once, a newer schema, and the migration against the metadata."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

import tracegrad.tracestore.migrate
from tracegrad.tracestore.errors import ConfigError, SchemaMismatch, StoreUnavailable
from tracegrad.tracestore.schema import HEAD, metadata
from tracegrad.tracestore.store import open_store


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def migrated(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    open_store(url_of(path)).close()
    return path


def script() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(tracegrad.tracestore.migrate.__file__).parent / "migrations"))
    return ScriptDirectory.from_config(config)


def test_head_is_the_last_revision() -> None:
    assert script().get_heads() == [HEAD]


def test_migrations_make_what_the_metadata_says(migrated: Path, tmp_path: Path) -> None:
    engine = create_engine(url_of(migrated))
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)
    engine.dispose()
    assert differences == []
    direct = tmp_path / "direct.db"
    other = create_engine(url_of(direct))
    metadata.create_all(other)
    other.dispose()
    assert ddl(migrated) == ddl(direct)


def ddl(path: Path) -> dict[str, list[str]]:
    """Each object's DDL as its comma-separated parts, sorted: CHECKs and defaults included, order left aside."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    parts = {name: sorted(part.strip(" ,\t") for part in sql.splitlines()) for name, sql in rows}
    return {name: lines for name, lines in parts.items() if name != "alembic_version"}


def test_the_first_revision_can_be_taken_back(migrated: Path) -> None:
    from alembic import command

    engine = create_engine(url_of(migrated))
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", script().dir)
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_opening_again_changes_nothing(migrated: Path) -> None:
    before = ddl(migrated)
    open_store(url_of(migrated)).close()
    open_store(url_of(migrated), create=False).close()
    assert ddl(migrated) == before


def test_a_newer_schema_is_refused(migrated: Path) -> None:
    with sqlite3.connect(migrated) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    for create in (True, False):
        with pytest.raises(SchemaMismatch, match="9999"):
            open_store(url_of(migrated), create=create)


def test_without_create_nothing_is_made(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with pytest.raises(StoreUnavailable, match="no store at"):
        open_store(url_of(path), create=False)
    assert not path.exists()
    path.touch()
    with pytest.raises(SchemaMismatch, match="create=True"):
        open_store(url_of(path), create=False)


def test_places_that_cannot_hold_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="does not exist"):
        open_store(url_of(tmp_path / "none" / "store.db"))
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 100)
    with pytest.raises(StoreUnavailable, match=r"text\.db"):
        open_store(url_of(tmp_path / "text.db"))
    for url in ("sqlite://", "sqlite:///:memory:", "mysql://localhost/x", "nonsense"):
        with pytest.raises(ConfigError):
            open_store(url)


def test_processes_that_open_an_empty_file_at_once_all_succeed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    program = (
        "import sys, pathlib, time\n"
        "from tracegrad.tracestore.store import open_store\n"
        "go = pathlib.Path(sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "while not go.exists(): time.sleep(0.001)\n"
        "store = open_store(sys.argv[1])\n"
        "store.ensure_runs([sys.argv[3]], 'p')\n"
    )
    go = tmp_path / "go"
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", program, url_of(path), str(go), f"r{index}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    go.touch()
    for opener in openers:
        _, errors = opener.communicate(timeout=60)
        assert opener.returncode == 0, errors
    store = open_store(url_of(path), create=False)
    assert {summary.run.run_id for summary in store.list_runs()} == {"r0", "r1"}
    store.close()
