"""Statements of the hot path, compiled once and handed to the driver with encoded parameters.

SQLAlchemy's execution of a Core statement costs about 0.1 ms each time (cache key, parameter processing, result
set-up) even when its SQL is cached, and 0.05 ms where it is handed to `exec_driver_sql`; `append_calls` runs seven of
them while a client waits. Here the SQL text and the column encoders are looked up once per dialect and column set, and
the driver's own cursor does the rest inside the same transaction, with the same errors. Refuses expanding parameters
(IN lists). Called by `calls`, `runs` and `spans`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Executable
from sqlalchemy.exc import DBAPIError

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


def run_hot(connection: Connection, hot: HotStatement, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Execute for each row, in one driver call; return the rows that it gives back as tuples.

    Raises what SQLAlchemy's own execution would: a `DBAPIError` of the kind that the driver's error is.
    """
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
    cursor = connection.connection.cursor()
    try:
        if len(parameters) > 1:
            cursor.executemany(sql, parameters)
        else:
            cursor.execute(sql, parameters[0])
        return list(cursor.fetchall()) if cursor.description else []
    except _errors(connection) as error:
        raise _translated(connection, sql, error) from error
    finally:
        cursor.close()


def _errors(connection: Connection) -> type[Exception]:
    """The base of the driver's errors."""
    errors: type[Exception] = connection.dialect.loaded_dbapi.Error
    return errors


def _translated(connection: Connection, sql: str, error: Exception) -> BaseException:
    """Return the driver's error as SQLAlchemy's; a connection that is lost is not used again."""
    lost = connection.dialect.is_disconnect(error, connection.connection, None)  # type: ignore[arg-type]
    told = DBAPIError.instance(
        sql,
        None,
        error,
        _errors(connection),
        hide_parameters=True,
        connection_invalidated=lost,
        dialect=connection.dialect,
    )
    if lost:
        connection.invalidate(error)
    return told
