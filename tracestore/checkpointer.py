"""SQLite's log back into its file, by a thread of its own, so that the log begins anew and no client waits for it.

A commit that finds the log long copies all of it, some 20 ms in which whoever waits for that commit waits too. So when
so much was written this thread does it beside the writers; what they wrote meanwhile it copies while it has their turn,
a few ms. Then nothing in the log is needed, and the next transaction begins at its start, over bytes that the file has
already: to make these durable takes less time than bytes that lengthen it.
What it cannot do (the disk is full, another process does it, a reader needs the log) is left for the next time; a
commit that finds `_WAL_PAGES` of log (see `database`) still copies it, and says what is wrong. Called by `database`.
"""

import sqlite3
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

PAGES = 8_000
"""About how much is written between two times: 32 MB. With less, the file is written more often than it need be; with
more, the last part takes longer, while writers wait (6 ms at 16 MB, 8 at 32, 10 to 13 at 48)."""
_A_COMMIT, _A_ROW = 16, 0.5
"""Pages of the log, measured of appends: 20 for a call alone (8 rows), 4 to 5 for one of many. SQLite does not tell."""
_COPY = "PRAGMA wal_checkpoint(PASSIVE)"


class Checkpointer:
    """Owns the thread, which begins with the first need, and its connection. `close` ends both.

    `turn` is what writers of this process take turns by.
    """

    def __init__(self, path: Path, turn: AbstractContextManager[Any]) -> None:
        self._path = path
        self._turn = turn
        self._rows = 0
        self._pages = 0.0
        self._due = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def wrote(self, total_changes: int) -> None:
        """Hear how many rows the writing connection has written so far. Called by one writer at a time."""
        self._pages += _A_COMMIT + _A_ROW * max(total_changes - self._rows, 0)  # less: another connection counts
        self._rows = total_changes
        if self._pages < PAGES:
            return
        self._pages = 0
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
                    connection.execute(_COPY).fetchall()
                    with self._turn:
                        connection.execute(_COPY).fetchall()
                except sqlite3.OperationalError:
                    continue  # the commit that finds the log too long will say so, to somebody who hears it
        finally:
            connection.close()
