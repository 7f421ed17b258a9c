"""With several workers, what must meet in one process: LangSmith's posts, all of which worker 0 takes.

The parts of a trace come in separate requests, on whatever connection, and what a part means depends on those before
it; so the other workers pass these requests on, as they came, over worker 0's Unix socket. It checks keys and limits as
for any request. While it is being started again they answer 503 with `retry-after`: LangSmith's client sends again.
Called by `app`.
"""

from collections.abc import AsyncIterator

import aiohttp
from yarl import URL

from tracegrad.adapters.proxy import langsmith
from tracegrad.adapters.proxy.attribution import split_path
from tracegrad.adapters.proxy.errors import InvalidRequest, WorkerDown
from tracegrad.adapters.proxy.upstream import end_to_end
from tracegrad.adapters.proxy.wire import ClientGone, Receive, Reply, Scope, Send
from tracegrad.adapters.proxy.worker_sockets import WorkerSockets

TIMEOUT_S = 60.0


class FirstWorker:
    """The way from another worker to worker 0."""

    def __init__(self, sockets: WorkerSockets) -> None:
        self._path = str(sockets.path(0))

    def takes(self, scope: Scope) -> bool:
        """Whether worker 0 must answer this request."""
        try:
            return split_path(_raw_path(scope)).path.startswith(langsmith.PREFIX)
        except InvalidRequest:
            return False  # refused where every request is read

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the request on as it came, and the answer back."""
        reply = Reply(send)
        target = _raw_path(scope) + (b"?" + scope["query_string"] if scope.get("query_string") else b"")
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in end_to_end(scope["headers"])]
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(self._path),
                    timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
                    auto_decompress=False,
                    skip_auto_headers=("User-Agent", "Accept", "Content-Type", "Accept-Encoding"),
                ) as session,
                session.request(
                    scope["method"],
                    URL("http://worker" + target.decode("latin-1"), encoded=True),
                    data=None if scope["method"] == "GET" else _body(receive),
                    headers=headers,
                ) as answer,
            ):
                body = await answer.read()
                await reply.whole(answer.status, end_to_end(answer.raw_headers), body)
        except ClientGone:
            return
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            down = WorkerDown(f"worker 0, which takes LangSmith's posts, does not answer ({error}); send it again")
            await reply.error(down)


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _raw_path(scope: Scope) -> bytes:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw
