"""Keeps a lease alive while its step is trained, and says when it was lost.

A thread renews at a third of the lease's time. A store that cannot be reached is tried again until the lease has
expired; a lost lease is final. The loss is raised where the holder asks (`current`), never from the thread; the
commit checks the fencing token again in its own transaction, so a lease lost unseen cannot commit either.
Called by the controller.
"""

import threading
import time
from types import TracebackType
from typing import Protocol

from tracegrad.tracestore.errors import LeaseLost, StoreUnavailable
from tracegrad.tracestore.records import Lease


class _Renews(Protocol):
    def renew(self, lease: Lease, lease_s: float) -> Lease: ...


class LeaseKeeper:
    """Context manager around the work on one lease."""

    def __init__(self, store: _Renews, lease: Lease, lease_s: float) -> None:
        self._store, self._lease, self._lease_s = store, lease, lease_s
        self._lost: LeaseLost | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{lease.lease_id}", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def current(self) -> Lease:
        """The lease as last renewed.

        Raises:
            LeaseLost: somebody else holds the runs: throw away what was computed on them.
        """
        if self._lost is not None:
            raise self._lost
        return self._lease

    def _keep(self) -> None:
        while not self._stop.wait(self._lease_s / 3):
            try:
                self._lease = self._store.renew(self._lease, self._lease_s)
            except LeaseLost as error:
                self._lost = error
                return
            except StoreUnavailable as error:
                if time.time() >= self._lease.expires_at:
                    self._lost = LeaseLost(
                        f"lease {self._lease.lease_id} expired while the store could not be reached: {error}"
                    )
                    return
