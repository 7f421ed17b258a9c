"""Statements of the hot path, compiled once and handed to the driver with encoded parameters.

SQLAlchemy's execution of a Core statement costs about 0.1 ms each time (cache key, parameter processing, result
set-up) even when its SQL is cached; `append_calls` runs seven of them while a client waits. Here the SQL text and the
column encoders are looked up once per dialect and column set, and `exec_driver_sql` does the rest inside the same
transaction, with the same errors. Refuses expanding parameters (IN lists). Called by `calls` and `runs`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult, Executable

_Encode = Callable[[Any], Any]


class HotStatement:
    """One Core statement; `run_hot` executes it. Every row of one execution has the same keys."""

    def __init__(self, statement: Executable) -> None:
        self._statement = statement
        self._prepared: dict[tuple[str, tuple[str, ...]], tuple[str, list[tuple[str, _Encode | None]], bool]] = {}

    def prepared(
        self, connection: Connection, names: tuple[str, ...]
    ) -> tuple[str, list[tuple[str, _Encode | None]], bool]:
        """Return SQL, the parameters in order with their encoders, and whether the driver wants them by position."""
        key = (connection.dialect.name, names)
        found = self._prepared.get(key)
        if found is None:
            compiled: Any = self._statement.compile(dialect=connection.dialect, column_keys=list(names))  # type: ignore[attr-defined]
            order = compiled.positiontup if compiled.positional else list(compiled.bind_names.values())
            encoders = compiled._bind_processors
            found = str(compiled), [(name, encoders.get(name)) for name in order], bool(compiled.positional)
            self._prepared[key] = found
        return found


def run_hot(connection: Connection, hot: HotStatement, rows: Sequence[dict[str, Any]]) -> CursorResult[Any]:
    """Execute for each row, in one driver call."""
    sql, order, positional = hot.prepared(connection, tuple(rows[0]))
    parameters: list[Any]
    if positional:
        parameters = [
            tuple(row[name] if encode is None else encode(row[name]) for name, encode in order) for row in rows
        ]
    else:
        parameters = [
            {name: row[name] if encode is None else encode(row[name]) for name, encode in order} for row in rows
        ]
    return connection.exec_driver_sql(sql, parameters if len(parameters) > 1 else parameters[0])
