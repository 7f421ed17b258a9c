"""The purpose of a run, remembered: only it decides whether the sampling override applies.

A run's purpose never changes, so what was once read is kept (least recently used ones are let go). An unknown run is
opened as a live run of our project. Refuses nothing. Called by `chat` and `control`.
"""

import asyncio
from collections import OrderedDict

from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.records import Purpose
from tracegrad.tracestore.store import Store

CAPACITY = 16_384


class Purposes:
    """A cache in front of `Store.get_run` and `Store.ensure_runs`."""

    def __init__(self, store: Store, project: str, capacity: int = CAPACITY) -> None:
        self._store = store
        self._project = project
        self._capacity = capacity
        self._known: OrderedDict[str, Purpose] = OrderedDict()

    def learn(self, run_id: str, purpose: Purpose) -> None:
        """Remember the purpose of a run that has just been opened."""
        self._known[run_id] = purpose
        self._known.move_to_end(run_id)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    async def of(self, run_id: str | None) -> Purpose:
        """Return the purpose of a run, which is opened as `live` where it is unknown. Raises TraceStoreError."""
        if run_id is None:
            return "live"
        known = self._known.get(run_id)
        if known is not None:
            self._known.move_to_end(run_id)
            return known
        purpose = await asyncio.to_thread(self._look_up, run_id)
        self.learn(run_id, purpose)
        return purpose

    def _look_up(self, run_id: str) -> Purpose:
        try:
            return self._store.get_run(run_id).purpose
        except NotFound:
            self._store.ensure_runs([run_id], self._project)
            return self._store.get_run(run_id).purpose
