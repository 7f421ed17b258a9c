"""One HTTP exchange as ASGI gives it: the request, the reply, and the client hanging up.

Refuses bodies above the limit and such as cannot be unpacked. Pure ASGI: no framework. Called by `app`, `chat`,
`exchange` and `control`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tracegrad.adapters.proxy.attribution import Route
from tracegrad.adapters.proxy.errors import BodyTooLarge, ProxyError
from tracegrad.adapters.proxy.limits import unpacked
from tracegrad.tracestore.config import LimitsConfig
from tracegrad.tracestore.records import ApiKey

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON_HEADERS = ((b"content-type", b"application/json"),)
STREAM_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"),)


class ClientGone(Exception):
    """The client closed the connection while we waited for the engine."""


class Request:
    """The request with its attribution taken off the path. `headers` have lower-case names; `app` sets `key`."""

    def __init__(self, scope: Scope, receive: Receive, route: Route, *, limits: LimitsConfig) -> None:
        self.method: str = scope["method"]
        self.route = route
        self.key: ApiKey | None = None
        self.raw_headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self.headers = dict(self.raw_headers)
        self.receive = receive
        self._limit = limits.max_body_bytes

    async def body(self) -> bytes:
        """Return the whole body, unpacked. Raises BodyTooLarge, ClientGone, InvalidRequest (it cannot be unpacked)."""
        declared = self.headers.get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0
        parts: list[bytes] = []
        more = True
        while more and size <= self._limit:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size = max(size, sum(map(len, parts)))
            more = message.get("more_body", False)
        if size > self._limit:
            raise BodyTooLarge(f"the body has more than {self._limit} bytes (proxy.limits.max_body_bytes)")
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        encoding = self.headers.get(b"content-encoding")
        return body if encoding is None else await asyncio.to_thread(unpacked, body, encoding, self._limit)


class Reply:
    """The answer to one request. Invariant: `started` is True once a status has left."""

    def __init__(self, send: Send) -> None:
        self._to_client = send
        self.started = False
        self.status = 0
        self.tap: Callable[[Message], None] | None = None
        """Is shown every message before it leaves."""

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers."""
        self.started = True
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def send(self, body: bytes, *, more: bool = True) -> None:
        """Send a part of the body; the last one with `more=False`."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def repeat(self, message: Message) -> None:
        """Send a message of another reply; its status only where none has left."""
        if message["type"] != "http.response.start":
            await self._send(message)
        elif not self.started:
            await self.start(message["status"], message["headers"])

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a complete answer with its length."""
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.send(body, more=False)

    async def error(self, error: ProxyError, headers: Headers = ()) -> None:
        """Send an OpenAI-shaped error: as an answer, or as the last event of a stream that has begun."""
        if self.started:
            await self.send(b"data: " + error.body() + b"\n\n", more=False)
        else:
            later = () if error.retry_after_s is None else ((b"retry-after", b"%d" % error.retry_after_s),)
            await self.whole(error.status, [*JSON_HEADERS, *later, *headers], error.body())

    async def _send(self, message: Message) -> None:
        if self.tap is not None:
            self.tap(message)
        await self._to_client(message)


class Hangup:
    """Watches for the client's disconnect while an exchange waits for the engine.

    Enter it once the body is read. Inside `cancels()` a disconnect interrupts whatever is awaited and raises
    `ClientGone`; outside of it (while committing, while replying) it is only remembered in `gone`.
    `on_gone` is told of a disconnect in place of that, with what makes it one.
    """

    def __init__(self, receive: Receive, on_gone: Callable[[Callable[[], None]], None] | None = None) -> None:
        self._receive = receive
        self._on_gone = on_gone
        self._armed = False
        self.gone = False

    async def __aenter__(self) -> "Hangup":
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()

    @contextmanager
    def cancels(self) -> Iterator[None]:
        """Let a disconnect interrupt the block. Raises ClientGone, at once where the client has left already."""
        if self.gone:
            raise ClientGone
        self._armed = True
        try:
            yield
        except asyncio.CancelledError:
            if not self.gone:
                raise  # the server is shutting down: not ours to swallow
            self._task.uncancel()
            raise ClientGone from None
        finally:
            self._armed = False

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._on_gone is None:
            self._depart()
        else:
            self._on_gone(self._depart)

    def _depart(self) -> None:
        self.gone = True
        if self._armed:
            self._task.cancel()
