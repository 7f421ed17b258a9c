"""Group commit without a timer: whoever waits, goes together.

A writer thread takes every call that is waiting and appends them in one transaction; while that one is being made
durable, the next ones gather. Under no load a call waits for nobody. If a batch is refused, its members go one by one,
so that one bad call fails alone; if the store is unavailable, all of them fail with that. Called by the proxy.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from tracegrad.tracestore.errors import Conflict, InvalidRecord, StoreUnavailable
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store

_Waiting = tuple[Call, "Future[None]"]


class GroupCommitter:
    """Owns the writer thread. `submit` from any thread; `close` writes what waits and stops."""

    def __init__(self, store: Store, *, max_batch: int = 256) -> None:
        self._store = store
        self._max_batch = max_batch
        self._waiting: list[_Waiting] = []
        self._writing = 0
        self.commits = 0
        """Transactions that became durable."""
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tracegrad-group-commit", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> "Future[None]":
        """Return a future that is done when the call is durable; it cannot be cancelled.

        It raises what `Store.append_calls` raises for this call. Raises StoreUnavailable after `close`.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._closed:
                raise StoreUnavailable(f"call {call.call_id!r} came after the store was closed: it is not recorded")
            self._waiting.append((call, future))
            self._changed.notify()
        return future

    @property
    def backlog(self) -> int:
        """How many calls were submitted and are not decided yet: waiting, or being written."""
        return len(self._waiting) + self._writing

    def close(self) -> None:
        """Write everything submitted so far, then stop the thread. Twice is a no-op."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while batch := self._next():
            self._commit(batch)
            self._writing = 0

    def _next(self) -> list[_Waiting]:
        """Return what waits, in order of arrival; empty when closed and drained."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            batch = self._waiting[: self._max_batch]
            del self._waiting[: self._max_batch]
            self._writing = len(batch)
            return batch

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        try:
            self._store.append_calls([call for call, _ in batch])
        except (InvalidRecord, Conflict) as error:
            if len(batch) > 1:
                for member in batch:
                    self._commit([member])
            else:
                batch[0][1].set_exception(error)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: whoever waits must hear of it, whatever it is
            for _, future in batch:
                future.set_exception(error)
        else:
            self.commits += 1
            for _, future in batch:
                future.set_result(None)
