"""Who waits for one model, in the order in which the requests arrived; who may not go yet lets others past.

A request keeps its number when it leaves the line for a moment (to send a heartbeat, or because the engine it was given
to had just gone), and comes back to its old place. Refuses nothing. Called by `hold`.
"""

import asyncio
from bisect import insort
from collections.abc import Callable
from typing import Generic, TypeVar

from tracegrad.adapters.proxy.courses import Caller

_T = TypeVar("_T")


class Line(Generic[_T]):
    """Futures by their caller's number; `first` gives the one with the lowest number."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Caller, asyncio.Future[_T]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, caller: Caller) -> "asyncio.Future[_T]":
        """Take the place that its number gives; the future is resolved by who lets it through."""
        place: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        insort(self._waiting, (caller, place), key=lambda entry: entry[0].number)
        return place

    def leave(self, place: "asyncio.Future[_T]") -> None:
        """Give the place up; harmless where it was let through already."""
        self._waiting = [entry for entry in self._waiting if entry[1] is not place]

    def first(self, may_go: Callable[[Caller], bool]) -> "tuple[Caller, asyncio.Future[_T]] | None":
        """Take the first one out of the line that still waits and may go, and return it; None where nobody may."""
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        for index, (caller, _) in enumerate(self._waiting):
            if may_go(caller):
                return self._waiting.pop(index)
        return None
