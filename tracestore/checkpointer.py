"""SQLite's log back into its file, by a thread of its own: no client waits for what others wrote.

A commit that finds the log long copies all of it, some 20 ms in which whoever waits for that commit waits too. So after
so many rows written this thread does it beside the writers. What it cannot do (the disk is full, another process does
it) is left to SQLite: a commit that finds `_WAL_PAGES` of log (see `database`) still copies it, and says what is wrong.
Called by `database`.
"""

import sqlite3
import threading
from pathlib import Path

ROWS = 4_000
"""Rows written between two times: some 500 calls, of 8 MB."""


class Checkpointer:
    """Owns the thread, which begins with the first need, and its connection. `close` ends both."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = 0
        self._due = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def wrote(self, total_changes: int) -> None:
        """Hear how many rows the writing connection has written so far. Called by one writer at a time."""
        if 0 <= total_changes - self._rows < ROWS:
            return
        self._rows = total_changes
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tracegrad-checkpointer", daemon=True)
            self._thread.start()
        self._due.set()

    def close(self) -> None:
        """Wait for what is being copied, and stop."""
        self._closed = True
        self._due.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        connection = sqlite3.connect(self._path, isolation_level=None)
        try:
            while self._due.wait() and not self._closed:
                self._due.clear()
                try:
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                except sqlite3.OperationalError:
                    continue  # the commit that finds the log too long will say so, to somebody who hears it
        finally:
            connection.close()
