"""The proxy's side of the publish state machine (law 8): hold, drain, acknowledge, release.

A proxy is a row with a heartbeat, registered before the publish state is first read. While engines of a model are about
to change weights, or none that a call may go to is up, new calls wait here, in line (`courses` says who may go where);
when none is left with the engines, the drain is acknowledged. Where calls go on through the publish it is acknowledged
at once, and a call that the new weights sampled waits for the outcome before it is recorded. A publish
whose publisher is silent is ended here, as long as nothing was swapped: the live version serves on. If our last
successful contact with the store is older than half of the heartbeat's life, the publisher may soon count us as dead:
nothing is dispatched, and no version is believed, before we have registered again and read the state again. Refuses
(503) to dispatch while the store cannot be read. Called by `exchange`; runs inside `app`.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from tracegrad.adapters.proxy.courses import HOLDING, Caller, Course, course_of, version_on
from tracegrad.adapters.proxy.errors import StoreDown
from tracegrad.adapters.proxy.line import Line
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.publishes import BEATS_A_LIFE, SILENT_LIVES, UNSWAPPED
from tracegrad.tracestore.records import ModelState, PublishState
from tracegrad.tracestore.store import Store

log = logging.getLogger("tracegrad.proxy")
_T = TypeVar("_T")
_UNSETTLED: tuple[PublishState | None, ...] = ("requested", "draining", "swapping")
SETTLES_S = 60.0
"""How long the end of a call waits to learn whether the weights that sampled it went live."""
_DRAINS: tuple[PublishState, ...] = ("draining", "settling")
"""The states that a proxy acknowledges: the n-th comes before engines change weights for the n-th time."""
RUNS_KEPT = 16_384


@dataclass(slots=True)
class Gate:
    """One model: what is live, what is being published, and how many calls are with the engines at `urls`."""

    model: str
    urls: frozenset[str] = frozenset()
    view: ModelState = field(init=False)
    in_flight: int = 0
    acknowledged: set[PublishState] = field(default_factory=set)
    """Of the newest publish."""
    surprises: int = 0
    """How often a swap began unasked, or failed, while calls were with the engine: those were sampled by nobody knows
    what."""
    exchanges: int = 0
    """How often we acknowledged a publish with calls in flight: those have one version only if the engine says so."""
    tells: bool = False
    """Whether calls say which weights sampled what, so that they may go on through a publish."""
    lived: set[int] = field(default_factory=set)
    """The versions that were seen live."""
    ready: Callable[[frozenset[str] | None], bool] = lambda _engines: True
    """Whether an engine of the model is up, one of these."""
    ready_beside: Callable[[frozenset[str] | None], bool] | None = None
    """Whether one of these has a candidate beside what is live; None: the model's have one version at a time."""
    line: "Line[Ticket]" = field(default_factory=Line)
    stayed: "OrderedDict[str, None]" = field(default_factory=OrderedDict)
    """Runs that have been with a live version, where there are engines to choose from: they are not moved. All models
    share it, so that a run is with the candidates of all, or of none."""

    def __post_init__(self) -> None:
        self.view = ModelState(model=self.model, live_version=None, publish_id=None, state=None)

    @property
    def live_version(self) -> int | None:
        """The version that everybody is served."""
        return self.view.live_version

    @property
    def holding(self) -> bool:
        """Whether a publish makes new calls wait, but those that judge it."""
        return course_of(self.view, self.urls, Caller(number=0)) is None

    @property
    def exchanging(self) -> bool:
        """Whether engines may change weights at any moment: what they say of these proves nothing then."""
        return self.view.state in HOLDING

    def course(self, caller: Caller) -> Course | None:
        """Where a call may be dispatched to now; None: nowhere."""
        course = course_of(self.view, self.urls, caller, stays=caller.run_id in self.stayed)
        if course is not None and course.version != self.live_version and not self._is_ready(course):
            if len(self.view.together) > 1:
                return None  # elsewhere the run meets the other models' candidates: it waits, or would meet a mixture
            course = course_of(self.view, self.urls, caller, stays=True)  # its canary is down: the others serve it too
        return course if course is not None and self._is_ready(course) else None

    def _is_ready(self, course: Course) -> bool:
        ready = self.ready_beside if course.beside else self.ready
        return ready is not None and ready(course.engines)

    @property
    def owes_acknowledgement(self) -> bool:
        """Whether a publish waits for us and nothing is in flight any more."""
        state, free = self.view.state, self.in_flight == 0 or (self.tells and self.view.in_flight)
        return state in _DRAINS and free and state not in self.acknowledged

    @property
    def unsettled(self) -> bool:
        """Whether a publish that calls go on through may yet go live, or fail."""
        return self.view.in_flight and self.view.state in _UNSETTLED

    def version_on(self, engines: frozenset[str] | None, *, beside: bool = False) -> int | None:
        """The version that these engines serve; with `beside` under the name of what is next."""
        return version_on(self.view, engines, beside=beside)

    def admit(self, caller: Caller, course: Course) -> "Ticket":
        """Count a call in."""
        chooses = len(self.urls) > 1 or self.ready_beside is not None
        if chooses and caller.run_id is not None and course.version == self.live_version:
            self.stayed[caller.run_id] = None
            self.stayed.move_to_end(caller.run_id)
            if len(self.stayed) > RUNS_KEPT:
                self.stayed.popitem(last=False)
        self.in_flight += 1
        return Ticket(self, course.version, course.engines, self.surprises, self.exchanges, course.beside)

    def see(self, view: ModelState, was_fresh: bool) -> None:
        """Take in a model's state. Weights that changed without waiting for us mark what is in flight."""
        same = self.view.publish_id == view.publish_id
        if not same:
            self.acknowledged.clear()
        unasked = [drain for drain in _DRAINS[: view.swaps] if drain not in self.acknowledged]
        changed = view.swaps > (self.view.swaps if same else 0)
        blind = view.state == "failed" and not was_fresh and (not same or self.view.state != "failed")
        over = self.unsettled and not (same and (view.state in _UNSETTLED or not view.swaps))
        failed = over and view.live_version != self.view.candidate
        if self.in_flight and (failed or (changed and unasked) or (blind and "draining" not in self.acknowledged)):
            self.surprises += 1
            log.error("publish %s swapped %s with %d calls in flight", view.publish_id, self.model, self.in_flight)
        if view.live_version is not None:
            self.lived.add(view.live_version)
        self.view = view


@dataclass(slots=True)
class Ticket:
    """The right to one call to one of `engines`. `leave` it exactly once (a second time is nothing)."""

    gate: Gate
    version: int | None
    engines: frozenset[str] | None
    surprises: int
    exchanges: int
    beside: bool = False
    left: bool = False

    @property
    def swapped(self) -> bool:
        """Whether a swap began behind our back since the ticket was given."""
        return self.gate.surprises != self.surprises

    @property
    def exchanged(self) -> bool:
        """Whether weights may have been exchanged under it, with our acknowledgement."""
        return self.gate.exchanges != self.exchanges

    @property
    def version_now(self) -> int | None:
        """The version that its engines serve by now."""
        return self.gate.version_on(self.engines, beside=self.beside)


class Hold:
    """Every model's gate, kept up to date by polling the store. Nothing is ever published to those `outside`.

    `models`: the URLs of the engines of each.
    """

    def __init__(
        self,
        store: Store,
        models: Mapping[str, Iterable[str]],
        *,
        outside: Iterable[str] = (),
        proxy_id: str,
        url: str,
        poll_s: float,
        expires_s: float,
        in_flight: bool = False,
    ) -> None:
        self.proxy_id = proxy_id
        self._published = tuple(models)
        self.gates = {model: Gate(model, frozenset(url.rstrip("/") for url in models[model])) for model in models}
        for gate in self.gates.values():
            gate.tells = in_flight
        self.gates |= {model: Gate(model) for model in outside}
        for gate in self.gates.values():
            gate.stayed = next(iter(self.gates.values())).stayed
        self._store = store
        self._url = url
        self._poll_s = poll_s
        self._expires_s = expires_s
        self._contact = self._beat = float("-inf")
        self._registered = False
        self.arrivals = 0
        self._wake, self._seen = asyncio.Event(), asyncio.Event()
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

    def pass_through(self, model: str, caller: Caller) -> Ticket | None:
        """Count a call in where it need not wait at all; None where it has to `enter`."""
        gate = self.gates[model]
        course = gate.course(caller) if self.fresh and not gate.line else None
        return None if course is None else gate.admit(caller, course)

    async def enter(self, model: str, caller: Caller) -> Ticket:
        """Wait until it is the caller's turn and `model` takes its calls, and count it in. Cancel it to stop waiting.

        Raises:
            StoreDown: the publish state cannot be read, so nothing may be dispatched.
        """
        if not self.fresh:
            await self.refresh()
        line = self.gates[model].line
        place = line.join(caller)
        self.advance(model)
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
        while gate.line and gate.view.state not in HOLDING and self.fresh:
            found = gate.line.first(lambda caller: gate.course(caller) is not None)
            if found is None:
                return
            caller, place = found
            course = gate.course(caller)
            assert course is not None
            place.set_result(gate.admit(caller, course))

    async def version_after(self, ticket: Ticket, sampled_by: frozenset[int] = frozenset()) -> int | None:
        """Return the version that its engines serve now that one has finished the call. Raises as `enter`.

        Where versions sampled it that are not known to be good, the publish under way is waited for first.
        """
        if not self.fresh:
            await self.refresh()
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLES_S):
                while ticket.gate.unsettled and not sampled_by <= ticket.gate.lived:
                    await self._seen.wait()
        return ticket.version_now

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
        beat_due = not self._registered or began - self._beat > self._expires_s / BEATS_A_LIFE
        views = await self._in_thread(partial(self._contact_store, beat_due))
        self._contact = began
        if beat_due:
            self._beat, self._registered = began, True
        for view in views.values():
            self.gates[view.model].see(view, was_fresh)
        self._seen.set()
        self._seen = asyncio.Event()
        for gate in self.gates.values():
            publish_id, state = gate.view.publish_id, gate.view.state
            if gate.owes_acknowledgement and publish_id is not None and state is not None:
                gate.exchanges += gate.in_flight > 0  # first: weights may change as soon as it is written
                await self._in_thread(partial(self._store.ack_publish, publish_id, self.proxy_id, state))
                gate.acknowledged.add(state)
            self.advance(gate.model)

    def _contact_store(self, beat_due: bool) -> dict[str, ModelState]:
        """One visit, in the polling thread. Registering comes before reading: no publish can miss us."""
        if not self._registered:
            self._store.register_proxy(self.proxy_id, self._url)
        elif beat_due:
            self._store.beat_proxy(self.proxy_id)
        views = self._store.publish_view(self._published)
        longest_s = SILENT_LIVES * self._expires_s
        silent = [each for each in views.values() if each.state in UNSWAPPED and each.silent_s > longest_s]
        for each in silent:
            assert each.publish_id is not None
            for ended in self._store.end_unswapped(each.publish_id, silent_s=longest_s):
                log.error("publish %d of %s has failed: %s", ended.publish_id, ended.model, ended.error)
        return self._store.publish_view(self._published) if silent else views

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
