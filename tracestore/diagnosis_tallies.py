"""Counting by kind, with an example of each: by the database, or one by one. Called by the `diagnosis*` modules."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, case, func

from tracegrad.tracestore.diagnosis_records import Tally


class Tallier:
    """Counts what is found one by one; the example of a kind is the greatest id."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, example: str) -> None:
        """Count one more of a kind."""
        count, greatest = self._found.get(what, (0, ""))
        self._found[what] = (count + 1, max(greatest, example))

    def tallies(self) -> list[Tally]:
        """Return the kinds, the most frequent first."""
        return _sorted([Tally(what=what, count=count, example=one) for what, (count, one) in self._found.items()])


def tallied(connection: Connection, chosen: Select[Any]) -> list[Tally]:
    """Return the rows (what, count, example) of a statement, the most frequent first."""
    return _sorted([Tally(what=what, count=int(n), example=example) for what, n, example in connection.execute(chosen)])


def how_many(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Select how many rows hold it; 0, not NULL, of no rows."""
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def plain_counts(row: Any) -> dict[str, Any]:
    """Return a row of counts and ids by name: PostgreSQL sums to decimals."""
    return {
        name: value if value is None or isinstance(value, str) else int(value) for name, value in row._mapping.items()
    }


def _sorted(found: list[Tally]) -> list[Tally]:
    return sorted(found, key=lambda one: (-one.count, one.what))
