"""Who waits for one model, in the order in which the requests arrived.

A request keeps its number when it leaves the line for a moment (to send a heartbeat, or because the engine it was given
to had just gone), and comes back to its old place. Refuses nothing. Called by `hold`.
"""

import asyncio
from bisect import insort
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Line(Generic[_T]):
    """Futures by number; `first` gives the one with the lowest number."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, asyncio.Future[_T]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, number: int) -> "asyncio.Future[_T]":
        """Take the place that `number` gives; the future is resolved by who lets it through."""
        place: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        insort(self._waiting, (number, place), key=lambda entry: entry[0])
        return place

    def leave(self, place: "asyncio.Future[_T]") -> None:
        """Give the place up; harmless where it was let through already."""
        self._waiting = [entry for entry in self._waiting if entry[1] is not place]

    def first(self) -> "asyncio.Future[_T] | None":
        """Take the first one that still waits out of the line, and return it; None where nobody does."""
        while self._waiting:
            place = self._waiting.pop(0)[1]
            if not place.done():
                return place
        return None
