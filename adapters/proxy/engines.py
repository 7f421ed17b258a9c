"""The engines of one model: which are up, which one takes a call, and when one that went away may be used again.

An engine that refuses a connection or breaks one is marked down; from then on, and only while it is down, a watcher
asks for its health. It is up again once it is healthy *and* says that it serves the live version (`/weight_info`): one
that restarted on other weights would be recorded under a version that did not sample (law 8). For the same reason an
engine not heard of for `CONTACT_S` is asked before it gets a call: it may have been restarted unnoticed. Engines
that do not tell (no development mode) are believed. Calls of one run go to one engine, whose prefix cache knows
them; when an engine goes or comes, only its share moves (rendezvous hashing). Refuses nothing. Called by `upstream`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any, Literal

import aiohttp
import msgspec
from yarl import URL

log = logging.getLogger("tracegrad.proxy")
EngineState = Literal["up", "down", "behind"]
CONTACT_S = 2.0
"""No engine restarts in less: who answered so recently still serves what it served."""
PROBE_FIRST_S, PROBE_LONGEST_S = 0.05, 1.0
PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


class Engine:
    """One engine as the proxy sees it. `detail` says why it is not up; `contact` is when it last answered."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self.url = URL(self.name)
        self.state: EngineState = "up"
        self.detail = ""
        self.in_flight = 0
        self.contact = float("-inf")

    def heard(self) -> None:
        """Note that it answered just now."""
        self.contact = time.monotonic()

    def target(self, path: str) -> URL:
        """Return the URL of an OpenAI path."""
        return self.url / path

    def headers(self, of_client: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers that it gets of a client's."""
        return list(of_client)

    def answered(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers that the client gets of its answer."""
        return headers

    def report(self) -> dict[str, Any]:
        """Return what `/health` says of it."""
        return {"url": str(self.url), "state": self.state, "detail": self.detail, "in_flight": self.in_flight}


class Pool:
    """The engines of `model`. `wanted`: what the engine of a name is to serve; `changed` is called when one is back.

    `exchanging`: whether a publish makes new calls wait, so that engines may change weights at any moment.
    """

    holds = True
    """Whether requests wait for an engine that is down."""

    def __init__(
        self,
        model: str,
        engines: Iterable[Engine],
        session: aiohttp.ClientSession,
        *,
        wanted: Callable[[str], int | None] = lambda _name: None,
        changed: Callable[[], None] = lambda: None,
        exchanging: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.engines = tuple(engines)
        self._session = session
        self._wanted = wanted
        self._changed = changed
        self._exchanging = exchanging
        self._watchers: dict[Engine, asyncio.Task[None]] = {}
        self._checks: dict[Engine, asyncio.Task[tuple[EngineState, str]]] = {}

    def is_up(self, among: frozenset[str] | None = None) -> bool:
        """Return whether any engine takes calls, of those named."""
        return bool(self._usable(among))

    @property
    def complaint(self) -> str:
        """What is wrong, engine by engine; empty where all are up."""
        return "; ".join(f"{engine.url} {engine.detail}" for engine in self.engines if engine.state != "up")

    def _usable(self, among: frozenset[str] | None) -> list[Engine]:
        return [each for each in self.engines if each.state == "up" and (among is None or each.name in among)]

    def pick(self, run_id: str | None, among: frozenset[str] | None = None) -> Engine | None:
        """Return the engine for a call of `run_id` (None: the one with the least to do); None where none is up."""
        usable = self._usable(among)
        if len(usable) < 2:
            return usable[0] if usable else None
        if run_id is None:
            return min(usable, key=lambda engine: engine.in_flight)
        return max(usable, key=lambda engine: blake2b(f"{engine.url}\n{run_id}".encode(), digest_size=8).digest())

    async def confirm(self, engine: Engine) -> bool:
        """Return whether a call may go to `engine`; marks it where it is at fault. Asks it only after a silence.

        A publish that began meanwhile is no fault: the call waits for its end as new ones do.
        """
        if self._wanted(engine.name) is None or time.monotonic() - engine.contact < CONTACT_S:
            return True
        check = self._checks.get(engine)
        if check is None:  # calls that arrive together share one question
            check = self._checks[engine] = asyncio.create_task(self._probe_version(engine))
            check.add_done_callback(lambda _: self._checks.pop(engine, None))
        state, detail = await asyncio.shield(check)
        if state != "up":
            self.lost(engine, detail, state)
        return state == "up" and not self._exchanging()

    def lost(self, engine: Engine, detail: str, state: EngineState = "down") -> None:
        """Mark an engine that cannot be used and watch for its return."""
        if engine.state == "up":
            log.warning("engine %s of model %s is %s: %s", engine.url, self.model, state, detail)
        engine.state, engine.detail, engine.contact = state, detail, float("-inf")
        if engine not in self._watchers:
            self._watchers[engine] = asyncio.create_task(self._watch(engine), name=f"tracegrad-engine-{self.model}")

    async def examine(self) -> None:
        """Ask every engine how it is, now, and mark it accordingly."""
        found = await asyncio.gather(*(self._probe(engine) for engine in self.engines))
        for engine, (state, detail) in zip(self.engines, found, strict=True):
            if state != "up":
                self.lost(engine, detail, state)

    async def close(self) -> None:
        """Stop watching."""
        tasks = [*self._watchers.values(), *self._checks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _watch(self, engine: Engine) -> None:
        pause_s = PROBE_FIRST_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PROBE_LONGEST_S)
            state, detail = await self._probe(engine)
            engine.state, engine.detail = state, detail
            if state == "up":
                log.warning("engine %s of model %s is up again", engine.url, self.model)
                del self._watchers[engine]
                self._changed()
                return

    async def _probe(self, engine: Engine) -> tuple[EngineState, str]:
        """Ask for the health, then for the version."""
        try:
            async with self._session.get(engine.url / "health", timeout=PROBE_TIMEOUT) as answer:
                if answer.status != 200:
                    return "down", f"answers its health check with HTTP {answer.status}"
        except (aiohttp.ClientError, OSError) as error:
            return "down", f"cannot be reached ({said_by(error)}); is it running?"
        return await self._probe_version(engine)

    async def _probe_version(self, engine: Engine) -> tuple[EngineState, str]:
        """Ask what it serves; "behind" only where that is certainly not what it is to serve."""
        wanted = self._wanted(engine.name)
        if wanted is None:
            return "up", ""
        state, detail = await self._compare(engine, wanted)
        if state == "behind" and (self._exchanging() or self._wanted(engine.name) != wanted):
            return "up", ""  # not `heard`: it is asked again before it gets a call
        return state, detail

    async def _compare(self, engine: Engine, wanted: int) -> tuple[EngineState, str]:
        """Ask an engine and compare what it says with what is wanted now."""
        try:
            async with self._session.get(engine.url / "weight_info", timeout=PROBE_TIMEOUT) as answer:
                if answer.status != 200:
                    return "up", ""  # not in development mode: it does not tell
                said = _version_in(await answer.read())
        except (aiohttp.ClientError, OSError) as error:
            return "down", f"cannot be reached ({said_by(error)}); is it running?"
        if said is None:
            return "up", ""  # something else stands at that path
        if said == str(wanted):
            engine.heard()
            return "up", ""
        what = f"serves the weights {said!r} while version {wanted} is to be served"
        return "behind", f"{what}; it is loaded at the next publish, or when `tracegrad engine` restarts it"


class _WeightInfo(msgspec.Struct):
    weight_version: str | None = None


def _version_in(body: bytes) -> str | None:
    try:
        return msgspec.json.decode(body, type=_WeightInfo).weight_version
    except msgspec.MsgspecError:
        return None


def said_by(error: BaseException) -> str:
    """Return what an error says, its kind where it says nothing."""
    return str(error) or type(error).__name__
