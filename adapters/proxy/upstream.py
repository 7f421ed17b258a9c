"""The way to the engines: one pooled HTTP client, errors in our words.

Idle connections are dropped before vLLM drops them (its keep-alive is 5 s); a connection that turns out to be dead
as soon as it is used is retried once, because nothing can have been answered. What cannot be sent at all raises
`NotSent`, and the request may wait and try again; what broke after that was perhaps sampled, and fails. Refuses
nothing: what goes up is decided in `exchange` and `capture`. Called by `app` (models, health) and `exchange`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import aiohttp

from tracegrad.adapters.proxy.adapter_pool import AdapterPool
from tracegrad.adapters.proxy.engines import Engine, Pool, said_by
from tracegrad.adapters.proxy.errors import EngineTimeout, EngineUnreachable
from tracegrad.adapters.proxy.outside import OutsideApi, OutsidePool
from tracegrad.adapters.proxy.version_spans import HEADER
from tracegrad.tracestore.publishes import REHEARSED

KEEPALIVE_S = 4.0
CONNECT_TIMEOUT_S = 10.0
STALE_S = 1.0
"""A connection that breaks within this was dead already: a request that an engine took up is lost later than this."""
_ERROR_EVENT = b'data: {"error"'
"""How vLLM tells inside of a stream what only the engine itself finds. Source: vLLM 0.32,
`create_streaming_error_response`."""
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer trailers transfer-encoding upgrade "
    b"content-length host accept-encoding expect proxy-connection".split()
)


class NotSent(Exception):
    """No engine of the model could be given the request: it is as if it had not been tried."""


class EngineAnswer:
    """An answer whose headers are here and whose body is not. `release` or `abort` it, always."""

    def __init__(self, response: aiohttp.ClientResponse, pool: Pool, engine: Engine) -> None:
        self._response = response
        self._pool = pool
        self._engine: Engine | None = engine
        self._asked = engine
        self.status = response.status
        headers = end_to_end(response.raw_headers)
        self.versions = next((value for name, value in headers if name == HEADER), None)
        """Which weights sampled which tokens of a plain answer, as it was told."""
        self.headers = engine.answered([header for header in headers if header[0] != HEADER])
        self.is_stream = response.content_type == "text/event-stream"
        self._first = b""
        engine.heard()

    async def read(self) -> bytes:
        """Return the whole body. Raises EngineUnreachable or EngineTimeout where it breaks off."""
        try:
            body = await self._response.read()
        except TimeoutError as error:
            raise EngineTimeout(f"the engine of model {self._pool.model!r} stopped sending") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken_off(error) from error
        self._asked.heard()
        return body

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises as `read`."""
        first, self._first = self._first, b""
        if first:
            yield first
        while chunk := await self._some():
            yield chunk
        self._asked.heard()

    async def refused(self, *, inside: bool) -> bool:
        """Whether the request was refused; with `inside` also by a stream's first event, which is waited for.

        Of a model with replicas it always is: what one of them allows says nothing of another.
        Raises as `read`; the answer is aborted then.
        """
        inside = inside or len(self._pool.engines) > 1
        if not (inside and self.is_stream and self.status == 200):
            return self.status == 400
        told = False
        try:
            self._first = await self._some()
            told = True
        finally:
            if not told:
                self.abort()
        return self._first.startswith(_ERROR_EVENT)

    async def _some(self) -> bytes:
        """Return what came of the body, nothing at its end."""
        try:
            return await self._response.content.readany()
        except TimeoutError as error:
            raise EngineTimeout(f"the engine of model {self._pool.model!r} stopped sending") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken_off(error) from error

    async def drain(self, timeout_s: float = 1.0) -> None:
        """Read what follows the end of the stream, so that the connection can be used again."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._response.read()
        except (TimeoutError, aiohttp.ClientError, OSError):
            self._response.close()  # the answer is already complete: only the connection is lost

    def abort(self) -> None:
        """Close the connection: vLLM stops sampling when its client is gone."""
        self._response.close()
        self._count_out()

    def release(self) -> None:
        """Give the connection back; closes it where the body was not read to its end."""
        self._response.release()
        self._count_out()

    def _count_out(self) -> None:
        if self._engine is not None:
            self._engine.in_flight -= 1
            self._engine = None

    def _broken_off(self, error: Exception) -> EngineUnreachable:
        self._pool.lost(self._asked, f"broke off an answer ({said_by(error)})")
        return EngineUnreachable(f"the engine of model {self._pool.model!r} broke off its answer: {said_by(error)}")


class Upstream:
    """The engines by model name. Make it inside the event loop that uses it.

    `wanted` returns the version that an engine of a model is to serve, or (True) to have beside that, until it is
    decided on; `changed` is told the model of one that is back.
    `exchanging` returns whether a publish of a model makes calls wait.
    `adapters` are the models that lie on another's engines; `folder_of` returns the folder of a version.
    """

    def __init__(
        self,
        engines: Mapping[str, Iterable[str]],
        *,
        outside: Mapping[str, OutsideApi] = MappingProxyType({}),
        timeout_s: float,
        wanted: Callable[[str, str, bool], int | None] = lambda model, engine, beside: None,
        changed: Callable[[str], None] = lambda model: None,
        exchanging: Callable[[str], bool] = lambda model: False,
        adapters: Collection[str] = (),
        folder_of: Callable[[int], str] = str,
    ) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Content-Type", "Accept-Encoding"),
        )
        kinds = dict.fromkeys(adapters, partial(AdapterPool, folder_of=folder_of))

        def made(model: str, *, beside: bool) -> Pool:
            return kinds.get(model, Pool)(
                model + REHEARSED if beside else model,
                map(Engine, engines[model]),
                self._session,
                wanted=lambda engine: wanted(model, engine, beside),
                changed=partial(changed, model),
                exchanging=partial(exchanging, model),
            )

        self.pools: dict[str, Pool] = {model: made(model, beside=False) for model in engines}
        self.beside: dict[str, Pool] = {model: made(model, beside=True) for model in adapters if model in engines}
        self.pools.update({model: OutsidePool(model, api, self._session) for model, api in outside.items()})

    async def close(self) -> None:
        """Stop watching engines and close every connection."""
        for pool in (*self.pools.values(), *self.beside.values()):
            await pool.close()
        await self._session.close()

    async def post(
        self,
        model: str,
        path: str,
        body: bytes,
        headers: Iterable[tuple[bytes, bytes]],
        *,
        run_id: str | None = None,
        among: frozenset[str] | None = None,
        beside: bool = False,
    ) -> EngineAnswer:
        """Send a request to an engine of `model` (one of those named), to the same one for the same run.

        With `beside` to what the engine serves beside it.

        Raises:
            NotSent: no engine is up, or the one chosen refused the connection or serves other weights.
            EngineUnreachable: the connection broke before the answer began.
            EngineTimeout: the engine sent nothing in time.
        """
        pool = (self.beside if beside else self.pools)[model]
        engine = pool.pick(run_id, among)
        if engine is None or not await pool.confirm(engine):
            raise NotSent(pool.complaint)
        return await self._ask(pool, engine, "POST", path, data=body, headers=_to_send(engine.headers(headers)))

    async def get(self, model: str, path: str) -> EngineAnswer:
        """Fetch `path` from an engine of `model` that is up. Raises as `post`."""
        pool = self.pools[model]
        engine = pool.pick(None)
        if engine is None:
            raise NotSent(pool.complaint)
        return await self._ask(pool, engine, "GET", path)

    async def _ask(self, pool: Pool, engine: Engine, method: str, path: str, **sent: Any) -> EngineAnswer:
        """Send, counted as in flight until the answer is released."""
        answer: EngineAnswer | None = None
        engine.in_flight += 1
        try:
            answer = EngineAnswer(await self._send(pool, engine, method, path, **sent), pool, engine)
        finally:
            if answer is None:
                engine.in_flight -= 1
        return answer

    async def _send(self, pool: Pool, engine: Engine, method: str, path: str, **sent: Any) -> aiohttp.ClientResponse:
        where, perhaps_sent = f"the engine of model {pool.model!r} at {engine.url.origin()}", False
        while True:
            began = time.monotonic()
            try:
                return await self._session.request(method, engine.target(path), allow_redirects=False, **sent)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                pool.lost(engine, f"cannot be reached ({said_by(error)}); is it running?")
                if perhaps_sent or not pool.holds:
                    raise EngineUnreachable(f"{where} cannot be reached: {said_by(error)}") from error
                raise NotSent(pool.complaint) from error
            except TimeoutError as error:
                raise EngineTimeout(f"{where} did not answer in time") from error
            except (aiohttp.ClientError, OSError) as error:
                if perhaps_sent or time.monotonic() - began > STALE_S:
                    pool.lost(engine, f"broke a connection ({said_by(error)})")
                    raise EngineUnreachable(f"{where} broke the connection: {said_by(error)}") from error
                perhaps_sent = True


def _to_send(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in end_to_end(headers)]


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return `headers` with lower-case names, less those that belong to one connection."""
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP]
