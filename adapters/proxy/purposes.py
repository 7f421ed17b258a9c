"""The purpose and the project of a run, remembered: the purpose decides whether the sampling override applies.

Neither ever changes, so what was once read is kept (least recently used ones are let go). An unknown run counts as
live, and is asked for again next time: the store opens it with its first call, unless somebody opens it before.
Refuses (403) a key that names a run of another project. Called by `chat` and `control`.
"""

import asyncio
from collections import OrderedDict

from tracegrad.adapters.proxy.errors import OtherProject
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.records import ApiKey, Purpose, Run
from tracegrad.tracestore.store import Store

CAPACITY = 16_384


class Purposes:
    """A cache in front of `Store.get_run`."""

    def __init__(self, store: Store, capacity: int = CAPACITY) -> None:
        self._store = store
        self._capacity = capacity
        self._known: OrderedDict[str, tuple[Purpose, str]] = OrderedDict()

    def learn(self, run: Run) -> None:
        """Remember a run that has just been opened or read."""
        self._known[run.run_id] = run.purpose, run.project
        self._known.move_to_end(run.run_id)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    async def of(self, run_id: str | None, key: ApiKey | None = None) -> Purpose:
        """Return the purpose of a run, `live` where the store does not know it.

        Raises:
            OtherProject: the run is not of the key's project.
            TraceStoreError: the run cannot be read.
        """
        if run_id is None:
            return "live"
        if run_id not in self._known:
            try:
                self.learn(await asyncio.to_thread(self._store.get_run, run_id))
            except NotFound:
                return "live"
        self._known.move_to_end(run_id)
        purpose, project = self._known[run_id]
        if key is not None and key.project != project:
            raise OtherProject(f"the run {run_id} belongs to another project than the key {key.key_id}")
        return purpose
