"""Statements of the hot path, compiled once and handed to the driver with encoded parameters.

SQLAlchemy's execution of a Core statement costs about 0.1 ms each time (cache key, parameter processing, result
set-up) even when its SQL is cached, and 0.05 ms where it is handed to `exec_driver_sql`; `append_calls` runs nine of
them while a client waits. Here the SQL text and the column encoders are looked up once per dialect and column set, and
the driver itself does the rest inside the same transaction, with the same errors. Rows go in as `HotInsert`, as the
tuples that the driver takes (PostgreSQL: by COPY). Refuses expanding parameters: lists go in as `HotLookup`, filled up
to one of a few lengths. Called by `calls`, `drafts`, `blocks`, `runs` and `spans`; `run_plain` by `database`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from sqlalchemy import Column, Connection, Executable, Select, Table, and_, bindparam, column, values
from sqlalchemy.exc import DBAPIError

_Encode = Callable[[Any], Any]
_SIZES = (1, 4, 16, 64, 256)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """SQL of one dialect, and how a row becomes its parameters: by position, or by name where `names` are given."""

    sql: str
    values_of: Callable[[dict[str, Any]], Sequence[Any]]
    encoders: tuple[tuple[int, _Encode], ...]
    names: tuple[str, ...] | None

    def parameters(self, row: dict[str, Any]) -> Any:
        """Return what the driver takes for `row`."""
        values = list(self.values_of(row))
        for place, encode in self.encoders:
            values[place] = encode(values[place])
        return values if self.names is None else dict(zip(self.names, values, strict=True))


class HotStatement:
    """One Core statement; `run_hot` executes it. Every row of one execution has the same keys."""

    def __init__(self, statement: Executable) -> None:
        self._statement = statement
        self._prepared: dict[tuple[str, tuple[str, ...]], _Prepared] = {}

    def prepared(self, connection: Connection, names: tuple[str, ...]) -> _Prepared:
        """Return the statement for the connection's dialect and rows with the keys `names`."""
        key = (connection.dialect.name, names)
        found = self._prepared.get(key)
        if found is None:
            compiled: Any = self._statement.compile(dialect=connection.dialect, column_keys=list(names))  # type: ignore[attr-defined]
            order = tuple(compiled.positiontup if compiled.positional else compiled.bind_names.values())
            encoders = compiled._bind_processors
            found = self._prepared[key] = _Prepared(
                sql=str(compiled),
                values_of=itemgetter(*order) if len(order) > 1 else lambda row: [row[name] for name in order],
                encoders=tuple((place, encoders[name]) for place, name in enumerate(order) if name in encoders),
                names=None if compiled.positional else order,
            )
        return found


def run_hot(connection: Connection, hot: HotStatement, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Execute for each row, in one driver call; return the rows that it gives back as tuples.

    Raises what SQLAlchemy's own execution would: a `DBAPIError` of the kind that the driver's error is.
    """
    prepared = hot.prepared(connection, tuple(rows[0]))
    parameters = [prepared.parameters(row) for row in rows]
    cursor = _driver(connection).cursor()
    try:
        if len(parameters) > 1:
            cursor.executemany(prepared.sql, parameters)
        else:
            cursor.execute(prepared.sql, parameters[0])
        return list(cursor.fetchall()) if cursor.description else []
    except _errors(connection) as error:
        raise _translated(connection, prepared.sql, error) from error
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
        self._by_size = {size: HotStatement(_among(statement, columns, size)) for size in _SIZES}

    def of_size(self, size: int) -> HotStatement:
        """Return the statement whose list has so many places."""
        return self._by_size[size]


def _among(statement: Select[Any], columns: Sequence[Column[Any]], size: int) -> Select[Any]:
    if len(columns) == 1:
        return statement.where(columns[0].in_([bindparam(f"p{n}") for n in range(size)]))
    # A join with the list, since SQLite would look for (a, b) IN (VALUES ...) in the whole table.
    places = [[bindparam(f"p{n}_{at}", type_=one.type) for at, one in enumerate(columns)] for n in range(size)]
    wanted = values(*(column(one.name, one.type) for one in columns)).data([tuple(place) for place in places])
    listed = wanted.cte("wanted")
    return statement.join(listed, and_(*(one == listed.c[one.name] for one in columns)))


def look_up(connection: Connection, hot: HotLookup, wanted: Sequence[Any]) -> list[Any]:
    """Return the rows whose column is one of `wanted` (whose columns are one of these tuples), which differ."""
    rows: list[Any] = []
    for start in range(0, len(wanted), _SIZES[-1]):
        some = list(wanted[start : start + _SIZES[-1]])
        size = next(size for size in _SIZES if size >= len(some))
        some += some[-1:] * (size - len(some))
        if hot.width == 1:
            parameters = {f"p{n}": value for n, value in enumerate(some)}
        else:
            parameters = {f"p{n}_{at}": part for n, parts in enumerate(some) for at, part in enumerate(parts)}
        rows += run_hot(connection, hot.of_size(size), [parameters])
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
