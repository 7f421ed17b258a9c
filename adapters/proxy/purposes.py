"""The purpose of a run, remembered: only it decides whether the sampling override applies.

A run's purpose never changes, so what was once read is kept (least recently used ones are let go). An unknown run
counts as live, and is asked for again next time: the store opens it with its first call, unless somebody opens it
before. Refuses nothing. Called by `chat` and `control`.
"""

import asyncio
from collections import OrderedDict

from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.records import Purpose
from tracegrad.tracestore.store import Store

CAPACITY = 16_384


class Purposes:
    """A cache in front of `Store.get_run`."""

    def __init__(self, store: Store, capacity: int = CAPACITY) -> None:
        self._store = store
        self._capacity = capacity
        self._known: OrderedDict[str, Purpose] = OrderedDict()

    def learn(self, run_id: str, purpose: Purpose) -> None:
        """Remember the purpose of a run that has just been opened."""
        self._known[run_id] = purpose
        self._known.move_to_end(run_id)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    async def of(self, run_id: str | None) -> Purpose:
        """Return the purpose of a run, `live` where the store does not know it. Raises TraceStoreError."""
        if run_id is None:
            return "live"
        known = self._known.get(run_id)
        if known is not None:
            self._known.move_to_end(run_id)
            return known
        try:
            purpose = (await asyncio.to_thread(self._store.get_run, run_id)).purpose
        except NotFound:
            return "live"
        self.learn(run_id, purpose)
        return purpose
