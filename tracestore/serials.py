"""Numbers of new rows, taken before they are written, so that rows can name one another in one statement.

No row of the table has the number, and none had it. Called by `calls`, `interchange` and `blocks`.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, text

from tracegrad.tracestore.hot import HotStatement, run_hot

_KEYS = {"calls": "seq", "blocks": "block_id"}
_LAST = HotStatement(
    text(
        "SELECT "
        + ", ".join(
            f"max(COALESCE((SELECT seq FROM sqlite_sequence WHERE name = '{table}'), 0),"
            f" COALESCE((SELECT max({key}) FROM {table}), 0))"
            for table, key in _KEYS.items()
        )
    )
)
"""As AUTOINCREMENT counts: on from the highest id that was ever given, or is there."""
_NEXT = HotStatement(
    text("SELECT nextval(CAST(pg_get_serial_sequence(:name, :key) AS regclass)) FROM generate_series(1, :count)"),
    *("name", "key", "count"),
)


class Serials:
    """The numbers of one writing transaction. SQLite's only writer asks once and counts on itself."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: dict[str, int] | None = None

    def take(self, table: str, count: int) -> Sequence[int]:
        """Return so many new numbers, in order."""
        if self._connection.dialect.name != "sqlite":
            return [row[0] for row in run_hot(self._connection, _NEXT, [(table, _KEYS[table], count)])]
        if self._last is None:
            self._last = dict(zip(_KEYS, run_hot(self._connection, _LAST, [()])[0], strict=True))
        begin = self._last[table] + 1
        self._last[table] += count
        return range(begin, begin + count)
