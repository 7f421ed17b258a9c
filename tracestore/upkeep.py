"""Is the database whole, a copy of it while it is written to, and the space of what was deleted given back.

SQLite copies itself by its backup API under one read snapshot: no writer waits, and none makes it start again.
PostgreSQL has tools of its own for copies and for broken pages; the rows are checked on both. Refuses to write over
a file. Called by whoever cares for a store, through `Store`.
"""

import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from tracegrad.tracestore.block_check import chains_checked, prompts_checked
from tracegrad.tracestore.errors import ConfigError, Conflict, StoreUnavailable
from tracegrad.tracestore.kept_check import sets_checked
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.schema import CONTENT_DELETED

_COPY_PAGES = 256
_FREE_PAGES = 2_000
_EXAMPLES = 5
_OF_A_STUB = f"EXISTS (SELECT 1 FROM runs r WHERE r.run_id = c.run_id AND r.error = '{CONTENT_DELETED}')"
_ROWS = {
    "calls without their payload": "SELECT c.call_id FROM calls c LEFT JOIN call_payloads p ON p.seq = c.seq"
    f" WHERE p.seq IS NULL AND NOT {_OF_A_STUB}",
    "choices without their tokens": "SELECT c.call_id FROM choices o JOIN calls c ON c.seq = o.seq"
    " LEFT JOIN choice_payloads p ON p.seq = o.seq AND p.choice_index = o.choice_index"
    f" WHERE p.seq IS NULL AND NOT {_OF_A_STUB}",
    "prompts that nothing names": "SELECT b.block_id FROM blocks b"
    " WHERE NOT EXISTS (SELECT 1 FROM blocks k WHERE k.parent_id = b.block_id)"
    " AND NOT EXISTS (SELECT 1 FROM call_payloads p WHERE p.ids_head = b.block_id)"
    " AND NOT EXISTS (SELECT 1 FROM call_payloads p WHERE p.text_head = b.block_id)",
    "choices whose tokens or logprobs are not as many as counted": "SELECT c.call_id FROM choices o"
    " JOIN choice_payloads p ON p.seq = o.seq AND p.choice_index = o.choice_index JOIN calls c ON c.seq = o.seq"
    " WHERE length(p.token_ids) NOT IN (2 * o.n_tokens, 3 * o.n_tokens, 4 * o.n_tokens)"
    " OR length(p.logprobs) <> 4 * o.n_tokens",
    "payloads of no call": "SELECT p.seq FROM call_payloads p LEFT JOIN calls c ON c.seq = p.seq WHERE c.seq IS NULL",
    "tokens of no choice": "SELECT p.seq FROM choice_payloads p LEFT JOIN choices o"
    " ON o.seq = p.seq AND o.choice_index = p.choice_index WHERE o.seq IS NULL",
    "choices of no call": "SELECT o.seq FROM choices o LEFT JOIN calls c ON c.seq = o.seq WHERE c.seq IS NULL",
    "choices of one index twice": "SELECT c.call_id FROM choices o JOIN calls c ON c.seq = o.seq"
    " GROUP BY c.call_id, o.choice_index HAVING count(*) > 1",
    "calls of unknown runs": "SELECT c.call_id FROM calls c LEFT JOIN runs r ON r.run_id = c.run_id"
    " WHERE c.run_id IS NOT NULL AND r.run_id IS NULL",
    "rewards of unknown runs": "SELECT w.reward_id FROM rewards w LEFT JOIN runs r ON r.run_id = w.run_id"
    " WHERE r.run_id IS NULL",
    "rewards on calls of another run": "SELECT w.reward_id FROM rewards w JOIN calls c ON c.call_id = w.call_id"
    " WHERE c.run_id IS NULL OR c.run_id <> w.run_id",
    "spans of unknown runs": "SELECT s.span_id FROM spans s LEFT JOIN runs r ON r.run_id = s.run_id"
    " WHERE r.run_id IS NULL",
    "runs held by a lease that is over": "SELECT h.run_id FROM holds h JOIN leases l ON l.lease_id = h.lease_id"
    " WHERE l.state <> 'held'",
    "ledger rows of no checkpoint": "SELECT l.run_id FROM ledger l LEFT JOIN checkpoints k ON k.job_id = l.job_id"
    " AND k.step = l.step AND k.hash = l.checkpoint_hash WHERE k.job_id IS NULL",
    "consumption that does not add up to the choice": "SELECT u.seq FROM consumption u LEFT JOIN choices o"
    " ON o.seq = u.seq AND o.choice_index = u.choice_index"
    " WHERE o.seq IS NULL OR u.trained_tokens + u.excluded_tokens <> o.n_tokens",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that must not be: how many rows, and the first of them (or the database's own words)."""

    what: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The bytes of the database, and those of them that deleted rows have left free inside (None: not known)."""

    size_bytes: int
    free_bytes: int | None


class Upkeep(Noun):
    """The part of the store that looks after itself."""

    def check(self, heard: Callable[[str], None] = lambda what: None) -> list[Fault]:
        """Look at every row, and on SQLite at every page; return what is wrong. `heard` is told what is looked at."""
        faults = []
        if self._db.is_sqlite:
            with self._db.read() as connection:
                heard("pages and constraints")
                faults += _pages(connection)
                heard("foreign keys")
                faults += _foreign_keys(connection)
        for what, statement in _ROWS.items():
            heard(what)
            with self._db.read() as connection:
                count = connection.execute(text(f"SELECT count(*) FROM ({statement}) AS found")).scalar_one()
                if count:
                    some = connection.execute(text(f"{statement} LIMIT {_EXAMPLES}")).scalars()
                    faults.append(Fault(what=what, count=int(count), examples=tuple(map(str, some))))
        for check in (chains_checked, prompts_checked, sets_checked):
            faults += [Fault(what=what, count=count, examples=some) for what, count, some in check(self._db, heard)]
        return faults

    def backup(self, target: Path, heard: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Write a whole copy of a SQLite store to a new file while others write; return its bytes.

        The copy is the store as it was at one moment: every call committed before is in it whole. `heard` is told
        how many pages of how many are copied. The file has its name only once it is complete and on the disk.

        Raises:
            ConfigError: the store is PostgreSQL.
            Conflict: the file exists.
            StoreUnavailable: it cannot be written, or the copy is not sound.
        """
        if not self._db.is_sqlite:
            where = self._db.url.set(drivername="postgresql").render_as_string(hide_password=True)
            raise ConfigError(f"PostgreSQL makes its own backups: pg_dump --format=custom --file {target} '{where}'")
        if target.exists():
            raise Conflict(f"{target} exists: name a new file, or move that one away")
        part = target.with_name(f"{target.name}.part")
        try:
            part.unlink(missing_ok=True)
            _copy(Path(str(self._db.url.database)), part, heard)
            with part.open("rb") as copied:
                os.fsync(copied.fileno())
            part.rename(target)
        except (OSError, sqlite3.Error) as error:
            part.unlink(missing_ok=True)
            raise StoreUnavailable(f"cannot back the store up to {target}: {error}; is there room?") from error
        return target.stat().st_size

    def space(self) -> Space:
        """Return how large the database is, and how much of it is free inside."""
        with self._db.read() as connection:
            if not self._db.is_sqlite:
                size = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
                return Space(size_bytes=int(size), free_bytes=None)
            page, count, free = (_pragma(connection, name) for name in ("page_size", "page_count", "freelist_count"))
            return Space(size_bytes=page * count, free_bytes=page * free)

    def vacuum(self, *, incremental: bool = False) -> None:
        """Give free space back to the disk (PostgreSQL: to the tables, for what comes next).

        A SQLite file is written anew: that needs as much room again, and writers wait for the end. With `incremental`
        the file is from then on one that gives pages back in small steps (`give_back`).
        """
        with self._db.outside() as connection:
            if self._db.is_sqlite and incremental:
                connection.exec_driver_sql("PRAGMA auto_vacuum=INCREMENTAL")
            connection.exec_driver_sql("VACUUM" if self._db.is_sqlite else "VACUUM (ANALYZE)")
            if self._db.is_sqlite:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()

    def gives_back(self) -> bool:
        """Whether free space can be given back in steps, beside writers."""
        if not self._db.is_sqlite:
            return False
        with self._db.read() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").all()  # else it is what it was when opened
            return _pragma(connection, "auto_vacuum") == 2

    def give_back(self, pages: int = _FREE_PAGES) -> int:
        """Give at most so many free pages of a SQLite file back in one short transaction; say how many are left."""
        with self._db.outside() as connection:
            driver: Any = connection.connection.driver_connection  # its execute() would free one page and stop
            driver.executescript(f"PRAGMA incremental_vacuum({int(pages)})")
            return _pragma(connection, "freelist_count")


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())


def _pages(connection: Connection) -> list[Fault]:
    said = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
    if said == ["ok"]:
        return []
    return [Fault(what="what SQLite's integrity check found", count=len(said), examples=tuple(said[:_EXAMPLES]))]


def _foreign_keys(connection: Connection) -> list[Fault]:
    broken: dict[tuple[str, str], list[str]] = {}
    for table, rowid, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        broken.setdefault((table, parent), []).append(f"rowid {rowid}")
    return [
        Fault(what=f"{table} without their {parent}", count=len(rows), examples=tuple(rows[:_EXAMPLES]))
        for (table, parent), rows in broken.items()
    ]


def _copy(source: Path, target: Path, heard: Callable[[int, int], None]) -> None:
    """Copy page by page. An open read transaction is what keeps the backup from starting again at each write."""
    reading = sqlite3.connect(source, isolation_level=None)
    writing = sqlite3.connect(target, isolation_level=None)
    try:
        reading.execute("BEGIN")
        reading.execute("SELECT count(*) FROM sqlite_master").fetchone()
        reading.backup(writing, pages=_COPY_PAGES, sleep=0, progress=lambda _, left, total: heard(total - left, total))
        sound = writing.execute("PRAGMA quick_check").fetchone()[0]
        if sound != "ok":
            raise sqlite3.DatabaseError(f"the copy is not sound: {sound}")
        writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        reading.close()
        writing.close()
