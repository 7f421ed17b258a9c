"""Sees every call once it is durable: counts it, and writes its line to the access log.

It stands where all calls of all endpoints pass, between them and the group commit, so no endpoint has to remember.
Called by the endpoints (as their committer) and made by `app`.
"""

import logging
import time
from concurrent.futures import Future
from functools import partial

from tracegrad.adapters.proxy.log_lines import about_call
from tracegrad.adapters.proxy.metrics import ProxyMetrics
from tracegrad.tracestore.group_commit import GroupCommitter
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store

access = logging.getLogger("tracegrad.proxy.access")


class WatchedCommitter(GroupCommitter):
    """A group committer whose calls are counted and logged."""

    def __init__(self, store: Store, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        super().__init__(store)

    def submit(self, call: Call) -> "Future[None]":
        """Submit, and look again when it is decided. Raises as `GroupCommitter.submit`."""
        began = time.perf_counter()
        future = super().submit(call)
        future.add_done_callback(partial(self._decided, call, began))
        return future

    def _decided(self, call: Call, began: float, future: "Future[None]") -> None:
        """Runs in the writer's thread, or in the submitter's where the commit was faster."""
        if future.exception() is not None:
            return  # whoever waits for it says so, and counts it
        self._metrics.recorded(call, time.perf_counter() - began)
        if access.isEnabledFor(logging.INFO):
            access.info("call %s", call.status, extra=about_call(call))
