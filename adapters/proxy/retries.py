"""What the SDK sends a second time: joined to its first attempt, answered from it, or marked as a retry of it.

The OpenAI SDKs repeat a request whose answer they did not get, with `x-stainless-retry-count` and no idempotency key. A
retry is recognised by that count, the digest of its body, its run, its role and its credentials.
While its first attempt is still with the engine, the retry waits for that one's reply; if it was answered, the reply
is sent again, byte for byte, with the same call id: one row. If it failed, the retry is a call of its own and
`retry_of` names the first; so too where only the store knows of a first attempt, made through another process. The
store does not know credentials: of calls without a run it gives one of the same project and body, which may be another
client's. That costs nobody a call: what a retry supersedes is left out of training within one run only.

An attempt is claimed by one retry at a time, and once for each retry number: of n equal calls side by side that are
all retried, each finds its own. Replies are kept for `KEEP_S` and up to `KEEP_BYTES`. Refuses nothing.
Called by `chat`.
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

from tracegrad.adapters.proxy.access import KEY_HEADERS
from tracegrad.adapters.proxy.wire import STREAM_HEADERS, Hangup, Message, Reply, Request

KEEP_S = 120.0
"""An SDK waits at most a minute between two attempts (`retry-after`), and 8 s by itself."""
KEEP_BYTES = 64 * 1024 * 1024
STORE_WINDOW_S = 900.0
"""How far back a first attempt is looked for in the store: the SDKs' default time-out, `retry-after`, and some."""

_NEVER_AGAIN = 1_000_000

Key = tuple[str, str, str]


@dataclass(eq=False, slots=True)
class Attempt:
    """One request on its way, or what became of it. `number` counts retries: 0 is the first attempt."""

    key: Key
    number: int
    call_id: str
    messages: list[Message] = field(default_factory=list)
    """The reply as ASGI messages, as far as it was sent."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    answered: bool = False
    """The call is complete, committed, and its reply was sent to the end."""
    recorded: bool = False
    """A call with its id was given to the store."""
    claimed: bool = False
    last_retry: int = 0
    ended_at: float = 0.0
    size: int = 0
    sent: bool = False
    """The end of the reply has left."""
    depart: Callable[[], None] | None = None
    """Set once its client is gone: what makes the exchange stop."""

    def tap(self, message: Message) -> None:
        """Keep a message of the reply."""
        self.messages.append(message)
        self.sent = message["type"] == "http.response.body" and not message.get("more_body", False)
        self.size += len(message.get("body", b""))

    def client_left(self, depart: Callable[[], None]) -> None:
        """Its client hung up: stop, unless a retry waits for the reply; then stop when that one leaves as well."""
        if self.sent:
            return  # the server says so after every reply
        self.depart = depart
        if not self.claimed:
            depart()

    @property
    def urgency(self) -> tuple[bool, bool]:
        """Order in which retries claim: known to be lost, then still on its way, then answered."""
        lost = self.depart is not None or (self.over.is_set() and not self.answered)
        return not lost, self.answered


class Attempts:
    """Those on their way and, for a while, those that ended. Lives in one event loop."""

    def __init__(self) -> None:
        self._by_key: defaultdict[Key, list[Attempt]] = defaultdict(list)
        self._ended: deque[Attempt] = deque()
        self._bytes = 0

    def begin(self, key: Key, number: int, call_id: str) -> Attempt:
        """Note a request that goes to the engine."""
        attempt = Attempt(key, number, call_id, last_retry=number)
        self._by_key[key].append(attempt)
        return attempt

    def end(self, attempt: Attempt, *, answered: bool, recorded: bool) -> None:
        """Note what became of it: whoever waits goes on."""
        attempt.answered, attempt.recorded, attempt.ended_at = answered, recorded, time.monotonic()
        if not answered:
            attempt.messages.clear()
            attempt.size = 0
        attempt.over.set()
        self._ended.append(attempt)
        self._bytes += attempt.size
        while self._ended and (self._bytes > KEEP_BYTES or self._ended[0].ended_at < attempt.ended_at - KEEP_S):
            self._forget(self._ended.popleft())

    def find(self, key: Key, number: int) -> Attempt | None:
        """Return the attempt that retry `number` repeats, None where this process knows of none."""
        since = time.monotonic() - KEEP_S
        fitting = [
            attempt
            for attempt in self._by_key.get(key, ())
            if not attempt.claimed
            and attempt.last_retry < number
            and not (attempt.over.is_set() and attempt.ended_at < since)
        ]
        return min(fitting, key=lambda attempt: attempt.urgency, default=None)

    @contextmanager
    def claim(self, attempt: Attempt, number: int) -> Iterator[None]:
        """Have the attempt for oneself while waiting for its reply and sending it."""
        attempt.claimed, attempt.last_retry = True, number
        try:
            yield
        finally:
            attempt.claimed = False
            if attempt.depart is not None:
                attempt.depart()

    def supersede(self, attempt: Attempt) -> None:
        """Let nobody claim an attempt again in whose place a retry was sent to the engine: later ones repeat that."""
        attempt.last_retry = _NEVER_AGAIN

    def note_elsewhere(self, key: Key, call_id: str) -> None:
        """Note an attempt found in the store, of which a retry was sent to the engine."""
        attempt = self.begin(key, _NEVER_AGAIN, call_id)
        self.end(attempt, answered=False, recorded=True)

    def known(self, key: Key) -> list[str]:
        """Return the calls with the body of `key`, whoever sent it: none is an attempt that only the store knows of."""
        return [attempt.call_id for one, listed in self._by_key.items() if one[0] == key[0] for attempt in listed]

    def _forget(self, attempt: Attempt) -> None:
        self._bytes -= attempt.size
        attempt.size = 0
        self._remove(attempt)

    def _remove(self, attempt: Attempt) -> None:
        others = self._by_key.get(attempt.key)
        if others is not None and attempt in others:
            others.remove(attempt)
            if not others:
                del self._by_key[attempt.key]


async def answer_from(
    attempts: Attempts, first: Attempt, number: int, request: Request, reply: Reply, *, beat: tuple[float, bytes] | None
) -> bool:
    """Wait for the reply of `first` and send it again; False where there is none, and the retry is on its own.

    `beat` is (seconds, event) to keep a stream alive with, None for a plain answer. Raises ClientGone.
    """
    with attempts.claim(first, number):
        async with Hangup(request.receive) as hangup:
            while not first.over.is_set():
                try:
                    with hangup.cancels():
                        async with asyncio.timeout(None if beat is None else beat[0]):
                            await first.over.wait()
                except TimeoutError:
                    assert beat is not None
                    if not reply.started:
                        await reply.start(200, STREAM_HEADERS)
                    await reply.send(beat[1])
        if not first.answered or not first.messages:
            return False
        for message in first.messages:
            await reply.repeat(message)
        return True


def retry_number(headers: Mapping[bytes, bytes]) -> int | None:
    """Return how often the SDK has sent this request before; None from a client that does not count."""
    said = headers.get(b"x-stainless-retry-count", b"")
    return int(said) if said.isdigit() and len(said) < 4 else None


def key_of(request_hash: str, run_id: str | None, role: str | None, headers: Mapping[bytes, bytes]) -> Key:
    """Return what a retry has in common with its first attempt.

    The credentials are part of it (as a digest): nobody gets the answer to somebody else's request.
    """
    said = b"\n".join(headers.get(name, b"") for name in KEY_HEADERS)
    who = blake2b(said, digest_size=16).hexdigest()
    return request_hash, f"{run_id or ''}\n{role or ''}", who
