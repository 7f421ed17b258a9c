"""Bring a database to the schema of this code, or refuse it.

The whole migration is one transaction under a lock (SQLite: BEGIN IMMEDIATE; PostgreSQL: an advisory lock), so two
processes that open an empty database at the same moment both succeed: the second finds nothing left to do. A database
at a revision that this code does not know is newer than the code and is refused. Called by `store.open_store`.
Alembic is imported only where there is something to migrate. What is done to a store that exists is logged, revision by
revision (on standard error where no logging is configured): a large one takes minutes.
"""

import logging
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, text

from tracegrad.tracestore.database import Database, use_wal
from tracegrad.tracestore.errors import SchemaMismatch, StoreUnavailable
from tracegrad.tracestore.schema import HEAD

log = logging.getLogger("tracegrad.store")
_ADVISORY_LOCK = 0x74726163  # "trac"


def prepare(database: Database, *, create: bool) -> None:
    """Migrate to head when `create`, else insist on head.

    Raises:
        StoreUnavailable: no such database, or it cannot be written.
        SchemaMismatch: it is newer than this code, or older and `create` is False.
    """
    if database.is_sqlite:
        path = Path(str(database.url.database))
        if not create and not path.exists():
            raise StoreUnavailable(f"there is no store at {path}: start `tracegrad proxy` or `tracegrad up` first")
        if not path.parent.is_dir():
            raise StoreUnavailable(f"the folder {path.parent} does not exist: make it, or name another store")
        use_wal(path)
    with database.read() as connection:
        found = revision(connection)
    if found == HEAD:
        return
    if not create:
        if found is None:
            place = database.url.database if database.is_sqlite else database.url.render_as_string()
            raise StoreUnavailable(f"{place} holds no store yet: start `tracegrad proxy` or `tracegrad up` first")
        if found > HEAD:
            raise _too_new(found)
        raise SchemaMismatch(
            f"the store is at revision {found}, this code needs {HEAD}; "
            "`tracegrad up` and `tracegrad proxy` bring an older one up to date when they start"
        )
    with database.restructure() as connection:
        _upgrade(connection)


def revision(connection: Connection) -> str | None:
    """Return the database's Alembic revision, or None for one without tables of ours."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    found = revision(connection)
    if found is not None and found not in known:
        raise _too_new(found)
    if found is not None and found != HEAD:
        log.warning(
            "bringing the store from revision %s to %s: a large one takes minutes; a stop leaves it as it was",
            found,
            HEAD,
        )
        config.attributes["on_version_apply"] = _teller()
    command.upgrade(config, "head")


def _teller() -> Any:
    """Return what Alembic calls after each revision."""
    began = time.monotonic()

    def tell(*, step: Any, **_: Any) -> None:
        log.warning("revision %s is done, %.0f s", step.up_revision.revision, time.monotonic() - began)

    return tell


def _too_new(found: str) -> SchemaMismatch:
    return SchemaMismatch(
        f"the store is at revision {found}, which this tracegrad does not know (it knows up to {HEAD}): "
        "it was made by a newer version; install that one"
    )
