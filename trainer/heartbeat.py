"""What this process does, told to the store again and again, so that others know that it is alive.

A thread beats while long work goes on (loading, a step, a publish). A store that is away for a moment is no matter
here: whatever else the process does with the store says so. Called by the trainer's command (`tracegrad status` and
`tracegrad up` read it; the controller says the phases) and by whoever publishes (proxies read that).
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from tracegrad.tracestore.errors import StoreUnavailable
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.trainers import TrainerPhase

EVERY_S = 3.0


class Pulse:
    """Context manager around work during which a thread calls `beat` again and again."""

    def __init__(self, beat: Callable[[], None], *, name: str, every_s: float = EVERY_S) -> None:
        self._beat, self._every_s = beat, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"heartbeat-{name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._over.wait(self._every_s):
            with suppress(StoreUnavailable):
                self._beat()


class Heartbeat:
    """Context manager around a trainer's life. It begins as `starting`."""

    def __init__(self, store: Store, job_id: str, *, every_s: float = EVERY_S) -> None:
        self._store, self._job_id = store, job_id
        self._started = self._since = time.time()
        self._phase: TrainerPhase = "starting"
        self._step: int | None = None
        self._pulse = Pulse(self._beat, name=job_id, every_s=every_s)

    def __enter__(self) -> Self:
        self._beat()
        self._pulse.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pulse.__exit__(kind, error, trace)
        with suppress(StoreUnavailable):
            self._store.remove_trainer(self._job_id)

    def enter(self, phase: TrainerPhase, step: int | None = None) -> None:
        """Say what it does from now on; the same again changes nothing."""
        if (phase, step) != (self._phase, self._step):
            self._phase, self._step, self._since = phase, step, time.time()
            self._beat()

    def _beat(self) -> None:
        with suppress(StoreUnavailable):
            self._store.beat_trainer(self._job_id, self._phase, self._step, since=self._since, started=self._started)
