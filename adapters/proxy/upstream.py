"""The way to the engines: one pooled HTTP client, errors in our words.

Idle connections are dropped before vLLM drops them (its keep-alive is 5 s); a connection that turns out to be dead
before any byte of an answer is retried once, because nothing can have been answered. Refuses nothing: what goes up is
decided in `chat` and `capture`. Called by `app` (models, health) and `chat`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping

import aiohttp
from yarl import URL

from tracegrad.adapters.proxy.errors import EngineTimeout, EngineUnreachable

KEEPALIVE_S = 4.0
CONNECT_TIMEOUT_S = 10.0
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer trailers transfer-encoding upgrade "
    b"content-length host accept-encoding expect proxy-connection".split()
)


class EngineAnswer:
    """An answer whose headers are here and whose body is not. `release` or `abort` it, always."""

    def __init__(self, response: aiohttp.ClientResponse, model: str) -> None:
        self._response = response
        self._model = model
        self.status = response.status
        self.headers = end_to_end(response.raw_headers)
        self.is_stream = response.content_type == "text/event-stream"

    async def read(self) -> bytes:
        """Return the whole body. Raises EngineUnreachable or EngineTimeout where it breaks off."""
        try:
            return await self._response.read()
        except TimeoutError as error:
            raise EngineTimeout(f"the engine of model {self._model!r} stopped sending") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(f"the engine of model {self._model!r} broke off its answer: {error}") from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises as `read`."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except TimeoutError as error:
            raise EngineTimeout(f"the engine of model {self._model!r} stopped sending") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(f"the engine of model {self._model!r} broke off its answer: {error}") from error

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

    def release(self) -> None:
        """Give the connection back; closes it where the body was not read to its end."""
        self._response.release()


class Upstream:
    """The engines by model name. Make it inside the event loop that uses it."""

    def __init__(self, engines: Mapping[str, str], *, timeout_s: float) -> None:
        self._urls = {model: URL(url.rstrip("/")) for model, url in engines.items()}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Content-Type", "Accept-Encoding"),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def post(self, model: str, path: str, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> EngineAnswer:
        """Send a request to the engine of `model`.

        Raises:
            EngineUnreachable: no connection, or it broke before the answer began.
            EngineTimeout: the engine sent nothing in time.
        """
        return await self._request("POST", model, path, body, headers)

    async def get(self, model: str, path: str) -> EngineAnswer:
        """Fetch `path` from the engine of `model`. Raises as `post`."""
        return await self._request("GET", model, path, None, ())

    async def _request(
        self, method: str, model: str, path: str, body: bytes | None, headers: Iterable[tuple[bytes, bytes]]
    ) -> EngineAnswer:
        url = self._urls[model] / path
        sent = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in end_to_end(headers)]
        for last_try in (False, True):
            try:
                response = await self._session.request(method, url, data=body, headers=sent, allow_redirects=False)
                return EngineAnswer(response, model)
            except (aiohttp.ServerDisconnectedError, ConnectionResetError) as error:
                if last_try:
                    raise self._unreachable(model, error) from error
            except TimeoutError as error:
                raise EngineTimeout(
                    f"the engine of model {model!r} at {url.origin()} did not answer in time"
                ) from error
            except (aiohttp.ClientError, OSError) as error:
                raise self._unreachable(model, error) from error
        raise AssertionError("unreachable: the second try returns or raises")

    def _unreachable(self, model: str, error: Exception) -> EngineUnreachable:
        where = self._urls[model].origin()
        return EngineUnreachable(f"cannot reach the engine of model {model!r} at {where}: {error}; is it running?")


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return `headers` with lower-case names, less those that belong to one connection."""
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP]
