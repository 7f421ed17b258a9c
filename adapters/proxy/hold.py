"""The proxy's side of the publish state machine (law 8): hold, drain, acknowledge, release.

A proxy is a row with a heartbeat, registered before the publish state is first read. While a publish of a model is
draining or swapping, or none of its engines is up, new calls of that model wait here, in line; when none is left with
the engines, the publish is acknowledged. If our last successful contact with the store is older than half of the
heartbeat's life, the publisher may soon count us as dead: nothing is dispatched, and no version is believed, before we
have registered again and read the state again. Refuses (503) to dispatch while the store cannot be read.
Called by `exchange`; runs inside `app`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from tracegrad.adapters.proxy.errors import StoreDown
from tracegrad.adapters.proxy.line import Line
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.records import ModelState, PublishState
from tracegrad.tracestore.store import Store

log = logging.getLogger("tracegrad.proxy")
_T = TypeVar("_T")
_HOLDING: tuple[PublishState, ...] = ("draining", "swapping")


@dataclass(slots=True)
class Gate:
    """One model: what is live, what is being published, and how many calls are with the engine."""

    model: str
    live_version: int | None = None
    publish_id: int | None = None
    state: PublishState | None = None
    in_flight: int = 0
    acknowledged: int | None = None
    surprises: int = 0
    """How often a swap began while calls were with the engine: those calls span two versions."""
    ready: Callable[[], bool] = lambda: True
    """Whether an engine of the model is up."""
    line: "Line[Ticket]" = field(default_factory=Line)

    @property
    def holding(self) -> bool:
        """Whether a publish makes new calls wait."""
        return self.state in _HOLDING

    @property
    def open(self) -> bool:
        """Whether a call may be dispatched now."""
        return not self.holding and self.ready()

    @property
    def owes_acknowledgement(self) -> bool:
        """Whether a publish waits for us and nothing is in flight any more."""
        return self.state == "draining" and self.in_flight == 0 and self.acknowledged != self.publish_id


@dataclass(slots=True)
class Ticket:
    """The right to one call to the engine. `leave` it exactly once (a second time is nothing)."""

    gate: Gate
    version: int | None
    surprises: int
    left: bool = False

    @property
    def swapped(self) -> bool:
        """Whether a swap began behind our back since the ticket was given."""
        return self.gate.surprises != self.surprises


class Hold:
    """Every model's gate, kept up to date by polling the store. Nothing is ever published to those `outside`."""

    def __init__(
        self,
        store: Store,
        models: Iterable[str],
        *,
        outside: Iterable[str] = (),
        proxy_id: str,
        url: str,
        poll_s: float,
        expires_s: float,
    ) -> None:
        self.proxy_id = proxy_id
        self._published = tuple(models)
        self.gates = {model: Gate(model) for model in (*self._published, *outside)}
        self._store = store
        self._url = url
        self._poll_s = poll_s
        self._expires_s = expires_s
        self._contact = self._beat = float("-inf")
        self._registered = False
        self.arrivals = 0
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracegrad-hold")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register, read the state, and begin to poll. Raises StoreDown where the store cannot be reached."""
        await self.refresh()
        self._task = asyncio.create_task(self._run(), name="tracegrad-hold")

    async def stop(self) -> None:
        """Stop polling and take our row away, so that no publisher waits for us."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        try:
            await self._in_thread(partial(self._store.remove_proxy, self.proxy_id))
        except TraceStoreError as error:
            log.warning("could not remove proxy %s: %s; its row expires by itself", self.proxy_id, error)
        self._thread.shutdown(wait=False)

    @property
    def fresh(self) -> bool:
        """Whether what we know of the store is recent enough to act on."""
        return time.monotonic() - min(self._contact, self._beat) < self._expires_s / 2

    def number(self) -> int:
        """Return the next arrival's number: its place in every line."""
        self.arrivals += 1
        return self.arrivals

    def pass_through(self, model: str) -> Ticket | None:
        """Count a call in where it need not wait at all; None where it has to `enter`."""
        gate = self.gates[model]
        return self._admit(gate) if self.fresh and gate.open and not gate.line else None

    async def enter(self, model: str, number: int) -> Ticket:
        """Wait until it is this number's turn and `model` takes calls, and count one in. Cancel it to stop waiting.

        Raises:
            StoreDown: the publish state cannot be read, so nothing may be dispatched.
        """
        if not self.fresh:
            await self.refresh()
        if (ticket := self.pass_through(model)) is not None:
            return ticket
        line = self.gates[model].line
        place = line.join(number)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave(place.result())  # let through in the moment it gave up
            raise
        finally:
            line.leave(place)

    def advance(self, model: str) -> None:
        """Let through who may pass, in order. Call it whenever a gate may have opened."""
        gate = self.gates[model]
        while gate.line and gate.open and self.fresh:
            place = gate.line.first()
            if place is not None:
                place.set_result(self._admit(gate))

    def _admit(self, gate: Gate) -> Ticket:
        gate.in_flight += 1
        return Ticket(gate, gate.live_version, gate.surprises)

    async def version_after(self, ticket: Ticket) -> int | None:
        """Return the version live now that the engine has finished the call of `ticket`. Raises as `enter`."""
        if not self.fresh:
            await self.refresh()
        return ticket.gate.live_version

    def leave(self, ticket: Ticket) -> None:
        """Count the call of `ticket` out; a publish that waited for it is acknowledged at once."""
        if ticket.left:
            return
        ticket.left = True
        ticket.gate.in_flight -= 1
        if ticket.gate.owes_acknowledgement:
            self._wake.set()

    async def refresh(self) -> None:
        """Register again and read the state again, now. Raises StoreDown."""
        async with self._lock:
            if self._registered and self.fresh:
                return  # somebody else did it while we waited for the lock
            self._registered = False
            try:
                await self._cycle()
            except TraceStoreError as error:
                raise StoreDown(f"the publish state cannot be read, so nothing is dispatched: {error}") from error

    async def _run(self) -> None:
        failing = False
        while True:
            try:
                async with self._lock:
                    await self._cycle()
                failing = False
            except TraceStoreError as error:
                self._registered = False
                if not failing:
                    log.warning("cannot read the publish state: %s; calls are refused once it is stale", error)
                failing = True
            self._wake.clear()
            if not any(gate.owes_acknowledgement for gate in self.gates.values()):
                try:
                    async with asyncio.timeout(self._poll_s):
                        await self._wake.wait()
                except TimeoutError:
                    continue
            elif failing:
                await asyncio.sleep(self._poll_s)

    async def _cycle(self) -> None:
        """Heartbeat if due, read the view, acknowledge what can be acknowledged."""
        began, was_fresh = time.monotonic(), self.fresh
        beat_due = not self._registered or began - self._beat > self._expires_s / 5
        views = await self._in_thread(partial(self._contact_store, beat_due))
        self._contact = began
        if beat_due:
            self._beat, self._registered = began, True
        for view in views.values():
            self._see(view, was_fresh)
        for gate in self.gates.values():
            if gate.owes_acknowledgement and gate.publish_id is not None:
                await self._in_thread(partial(self._store.ack_publish, gate.publish_id, self.proxy_id))
                gate.acknowledged = gate.publish_id
            self.advance(gate.model)

    def _contact_store(self, beat_due: bool) -> dict[str, ModelState]:
        """One visit, in the polling thread. Registering comes before reading: no publish can miss us."""
        if not self._registered:
            self._store.register_proxy(self.proxy_id, self._url)
        elif beat_due:
            self._store.beat_proxy(self.proxy_id)
        return self._store.publish_view(self._published)

    def _see(self, view: ModelState, was_fresh: bool) -> None:
        """Take in a model's state. A swap that did not wait for us marks what is in flight."""
        gate = self.gates[view.model]
        swapped = view.state in ("swapping", "live") or (view.state == "failed" and not was_fresh)
        news = (gate.publish_id, gate.state) != (view.publish_id, view.state)
        if swapped and news and gate.in_flight and gate.acknowledged != view.publish_id:
            gate.surprises += 1
            log.error("publish %s swapped %s with %d calls in flight", view.publish_id, gate.model, gate.in_flight)
        gate.live_version, gate.publish_id, gate.state = view.live_version, view.publish_id, view.state

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
