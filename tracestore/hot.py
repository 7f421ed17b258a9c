"""Statements of the hot path, compiled once and handed to the driver with parameters as it takes them.

SQLAlchemy's execution of a Core statement costs about 0.1 ms each time (cache key, parameter processing, result
set-up) even when its SQL is cached, and 0.05 ms where it is handed to `exec_driver_sql`; `append_calls` runs nine of
them while a client waits. Here the SQL text is made once per dialect and the driver itself does the rest inside the
same transaction, with the same errors. Rows are tuples, encoded by the caller: `HotStatement` takes them in the order
of its names, `HotInsert` writes many (PostgreSQL: by COPY). Refuses expanding parameters: lists go in as `HotLookup`,
filled up to one of a few lengths. Called by `calls`, `drafts`, `blocks`, `paths`, `serials`, `runs` and `spans`;
`run_plain` by `database`.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Column, Connection, Executable, Select, Table, and_, bindparam, column, values
from sqlalchemy.exc import DBAPIError

_SIZES = (1, 4, 16, 64, 256)
_Row = Sequence[Any]


class HotStatement:
    """One Core statement and the names of its parameters, in the order of a row; `run_hot` executes it."""

    def __init__(self, statement: Executable, *names: str) -> None:
        self._statement, self._names = statement, names
        self._prepared: dict[str, tuple[str, Callable[[_Row], Any]]] = {}

    def prepared(self, connection: Connection) -> tuple[str, Callable[[_Row], Any]]:
        """Return the statement for the connection's dialect, and what makes of a row what its driver takes."""
        found = self._prepared.get(connection.dialect.name)
        if found is None:
            names = self._names
            compiled: Any = self._statement.compile(dialect=connection.dialect, column_keys=list(names))  # type: ignore[attr-defined]
            taken: Callable[[_Row], Any]
            if not compiled.positional:
                taken = lambda row: dict(zip(names, row, strict=True))  # noqa: E731
            elif tuple(compiled.positiontup or ()) == names:
                taken = tuple
            else:
                taken = itemgetter(*map(names.index, compiled.positiontup))
            found = self._prepared[connection.dialect.name] = str(compiled), taken
        return found


def run_hot(connection: Connection, hot: HotStatement, rows: Sequence[_Row]) -> list[Any]:
    """Execute for each row, in one driver call; return the rows that it gives back as tuples.

    Raises what SQLAlchemy's own execution would: a `DBAPIError` of the kind that the driver's error is.
    """
    sql, taken = hot.prepared(connection)
    cursor = _driver(connection).cursor()
    try:
        if len(rows) > 1:
            cursor.executemany(sql, list(map(taken, rows)))
        else:
            cursor.execute(sql, taken(rows[0]))
        return list(cursor.fetchall()) if cursor.description else []
    except _errors(connection) as error:
        raise _translated(connection, sql, error) from error
    finally:
        cursor.close()


class HotInsert:
    """Rows of some columns of a table, each a tuple in this order, encoded; `run_insert` writes them."""

    def __init__(self, table: Table, *names: str) -> None:
        self._table, self._names = table.name, names
        self._prepared: dict[str, tuple[str, str]] = {}

    def prepared(self, connection: Connection) -> tuple[str, str]:
        """Return the dialect's INSERT of one row, and PostgreSQL's COPY."""
        dialect = connection.dialect
        if (found := self._prepared.get(dialect.name)) is None:
            into = f"{self._table} ({', '.join(map(dialect.identifier_preparer.quote, self._names))})"
            marks = ", ".join(["?" if dialect.name == "sqlite" else "%s"] * len(self._names))
            found = self._prepared[dialect.name] = f"INSERT INTO {into} VALUES ({marks})", f"COPY {into} FROM STDIN"
        return found


def run_insert(connection: Connection, hot: HotInsert, rows: Sequence[Sequence[Any]]) -> None:
    """Write the rows, if there are any. Raises as `run_hot`."""
    if not rows:
        return
    insert, copy = hot.prepared(connection)
    cursor = _driver(connection).cursor()
    try:
        if len(rows) == 1:
            cursor.execute(insert, rows[0])
        elif connection.dialect.name == "sqlite":
            cursor.executemany(insert, rows)
        else:
            with cursor.copy(copy) as copying:
                for row in rows:
                    copying.write_row(row)
    except _errors(connection) as error:
        raise _translated(connection, insert, error) from error
    finally:
        cursor.close()


def run_plain(connection: Connection, sql: str) -> None:
    """Execute one statement that has neither parameters nor rows. Raises as `run_hot`."""
    cursor = _driver(connection).cursor()
    try:
        cursor.execute(sql)
    except _errors(connection) as error:
        raise _translated(connection, sql, error) from error
    finally:
        cursor.close()


class HotLookup:
    """A SELECT of the rows whose column (or columns) are in a list; `look_up` executes it."""

    def __init__(self, statement: Select[Any], *columns: Column[Any]) -> None:
        self.width = len(columns)
        self._by_size = {size: _among(statement, columns, size) for size in _SIZES}

    def of_size(self, size: int) -> HotStatement:
        """Return the statement whose list has so many places."""
        return self._by_size[size]


def _among(statement: Select[Any], columns: Sequence[Column[Any]], size: int) -> HotStatement:
    places = [[f"p{n}_{at}" for at in range(len(columns))] for n in range(size)]
    names = [name for place in places for name in place]
    if len(columns) == 1:
        return HotStatement(statement.where(columns[0].in_([bindparam(name) for name in names])), *names)
    # A join with the list, since SQLite would look for (a, b) IN (VALUES ...) in the whole table.
    marks = [
        tuple(bindparam(name, type_=one.type) for name, one in zip(place, columns, strict=True)) for place in places
    ]
    listed = values(*(column(one.name, one.type) for one in columns)).data(marks).cte("wanted")
    return HotStatement(statement.join(listed, and_(*(one == listed.c[one.name] for one in columns))), *names)


def look_up(connection: Connection, hot: HotLookup, wanted: Sequence[Any]) -> list[Any]:
    """Return the rows whose column is one of `wanted` (whose columns are one of these tuples), which differ."""
    rows: list[Any] = []
    for start in range(0, len(wanted), _SIZES[-1]):
        some = list(wanted[start : start + _SIZES[-1]])
        size = next(size for size in _SIZES if size >= len(some))
        some += some[-1:] * (size - len(some))
        row = some if hot.width == 1 else [part for parts in some for part in parts]
        rows += run_hot(connection, hot.of_size(size), [row])
    return rows


def _driver(connection: Connection) -> Any:
    """The driver's own connection: SQLAlchemy's proxy around it costs as much as a small statement."""
    return connection.connection.driver_connection


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
