"""Parts of spans on their way to the proxy: merged, posted in the background, and at the latest when their run ends.

Never in the way of the app: `put` only writes to memory, and what does not fit into `MAX_PARTS` or cannot be posted is
dropped, counted, and logged once. A node that failed and was tried again keeps its error only if the last try failed,
which is known when the run ends: until then a part with an error waits. Called by `span_notes`.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import ProxyError, ProxyUnreachable

MAX_PARTS = 4_000
"""How many spans may wait; each holds at most twice `plain_json.LIMIT_CHARS`."""
_MANY = 500
_AT_ONCE = 100
_PAUSE_S = 0.5
_TIMEOUT_S = 5.0
_GIVEN_UP_S = 10.0
"""A proxy that does not answer is not asked again for this long: a run that ends must not wait for it each time."""
_log = logging.getLogger("tracegrad.spans")

Part = dict[str, Any]
_Key = tuple[str, str]
"""The proxy's root and the run."""


class SpanOutbox:
    """What was told of spans and has not been posted. Thread-safe; a fork begins with an empty one."""

    def __init__(self, client_of: Callable[[str], ProxyClient] | None = None) -> None:
        self._client_of = client_of or (lambda root: ProxyClient(root, timeout_s=_TIMEOUT_S))
        self._clients: dict[str, ProxyClient] = {}
        self._given_up: dict[str, float] = {}
        self.dropped = 0
        self._begin()
        atexit.register(self.flush)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        """Start empty. In a forked child: what waits is the parent's to post, whose thread may hold the locks."""
        self._waiting: dict[_Key, dict[str, Part]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._posting = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, root: str, run_id: str, part: Part, *, soon: bool = False) -> None:
        """Keep a part of a span of a run for the proxy at `root`; `soon` posts it without the usual pause."""
        with self._lock:
            spans = self._waiting.setdefault((root, run_id), {})
            earlier = spans.get(part["span_id"])
            if earlier is None and self._count >= MAX_PARTS:
                self._drop(1, f"more than {MAX_PARTS} wait to be posted")
                return
            if earlier is None:
                self._count += 1
            spans[part["span_id"]] = part if earlier is None else _merged(earlier, part)
        if soon or self._count >= _MANY:
            self._wake.set()
        self._run_thread()

    def flush(self, run_id: str | None = None) -> None:
        """Post what waits: of one run that ends now, or of all (the process ends). Returns when it is posted."""
        with self._posting:
            for key in [key for key in list(self._waiting) if run_id in (None, key[1])]:
                self._post(key, self._taken(key, ending=True))

    def _run_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="tracegrad-spans", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            self._wake.wait(_PAUSE_S)
            self._wake.clear()
            with self._posting:
                for key in list(self._waiting):
                    self._post(key, self._taken(key, ending=False))

    def _taken(self, key: _Key, *, ending: bool) -> list[Part]:
        """Take out what may leave: while the run goes on, not the spans that have failed."""
        with self._lock:
            spans = self._waiting.pop(key, {})
            kept = {} if ending else {span_id: part for span_id, part in spans.items() if part.get("error")}
            if kept:
                self._waiting[key] = kept
            self._count -= len(spans) - len(kept)
            return [part for span_id, part in spans.items() if span_id not in kept]

    def _post(self, key: _Key, parts: list[Part]) -> None:
        root, run_id = key
        for start in range(0, len(parts), _AT_ONCE):
            some = parts[start : start + _AT_ONCE]
            if time.monotonic() < self._given_up.get(root, 0.0):
                self._drop(len(some), f"the proxy at {root} did not answer")
                continue
            try:
                client = self._clients.get(root) or self._clients.setdefault(root, self._client_of(root))
                client.put_spans(run_id, some)
            except (ProxyError, ValueError) as error:
                self._drop(len(some), str(error))
                if isinstance(error, ProxyUnreachable):
                    self._given_up[root] = time.monotonic() + _GIVEN_UP_S

    def _drop(self, count: int, why: str) -> None:
        if self.dropped == 0:
            _log.warning("spans are lost (logged once): %s", why)
        self.dropped += count


def _merged(earlier: Part, later: Part) -> Part:
    """The later part over the earlier one; an end without error takes back the error of an earlier try."""
    said = {name: value for name, value in later.items() if value is not None}
    merged = {**earlier, **said}
    if later.get("ended_at") is not None and later.get("error") is None:
        merged["error"] = None
    return merged
