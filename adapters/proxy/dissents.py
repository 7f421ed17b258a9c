"""What a second source says otherwise, written beside the call once that is committed, off the call's path.

Refuses to grow without bound: where the store is away for long, the oldest are let go, and it is logged. Called by
`exchange`; runs inside `app`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import groupby

from tracegrad.tracestore.errors import StoreUnavailable, TraceStoreError
from tracegrad.tracestore.records import LateAttribution
from tracegrad.tracestore.store import Store

log = logging.getLogger("tracegrad.proxy")
CAPACITY = 10_000
RETRY_S = 1.0


class Dissents:
    """Facts on their way to `Store.attribute_late`. Make it inside the event loop that runs it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[str, LateAttribution]] = deque(maxlen=CAPACITY)
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="tracegrad-dissents")

    def follow(self, commit: "Future[None]", facts: Sequence[LateAttribution], project: str) -> None:
        """Write `facts` once `commit` is done; never, where it fails: there is no call then."""
        if facts:
            commit.add_done_callback(lambda done: self._committed(done, facts, project))

    async def stop(self) -> None:
        """Write what waits, and stop."""
        self._task.cancel()
        await asyncio.wait([self._task])
        try:
            await self._flush()
        except TraceStoreError as error:
            log.warning("%d conflicts of attribution are not recorded: %s", len(self._waiting), error)

    def _committed(self, commit: "Future[None]", facts: Sequence[LateAttribution], project: str) -> None:
        """In the committer's thread."""
        if commit.exception() is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note, facts, project)

    def _note(self, facts: Sequence[LateAttribution], project: str) -> None:
        if len(self._waiting) + len(facts) > CAPACITY:
            log.warning("the oldest conflicts of attribution are let go: %d wait for the store", len(self._waiting))
        self._waiting.extend((project, fact) for fact in facts)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._flush()
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _flush(self) -> None:
        """Writing twice is writing once, so what is interrupted stays and is written again."""
        taken = list(self._waiting)
        await asyncio.to_thread(self._write, taken)
        for _ in taken:
            self._waiting.popleft()

    def _write(self, taken: Sequence[tuple[str, LateAttribution]]) -> None:
        for project, facts in groupby(taken, key=lambda one: one[0]):
            try:
                self._store.attribute_late([fact for _, fact in facts], project)
            except StoreUnavailable:
                raise
            except TraceStoreError as error:
                log.error("a conflict of attribution cannot be recorded: %s", error)
