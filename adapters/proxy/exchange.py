"""One call on its way: admitted, dispatched, gathered, committed, released.

The order is law 3: the answer's end (the body of a plain answer; in a stream everything from the chunk that carries
the last outstanding finish reason) is held back until the call is committed; a call that cannot be committed is a 503
or an SSE error event. One store wait lies on this path, the commit. A client that hangs up stops the engine, and what
was sampled is stored as aborted. An error of the engine is told in OpenAI's words. Called by `chat`.
"""

import asyncio
import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace

import msgspec

from tracegrad.adapters.proxy.attribution import without_ours
from tracegrad.adapters.proxy.capture import NOTHING, Ask, Injection, Stripper, plan_injection, renamed, upstream_body
from tracegrad.adapters.proxy.continuing import Continuing
from tracegrad.adapters.proxy.courses import caller_of
from tracegrad.adapters.proxy.deadlines import beat_s, patience_s, retry_after_s
from tracegrad.adapters.proxy.dissents import Dissents
from tracegrad.adapters.proxy.endpoints import CHAT, EMBEDDINGS, Shape
from tracegrad.adapters.proxy.engine_errors import openai_error, openai_error_event
from tracegrad.adapters.proxy.errors import EngineTimeout, EngineUnreachable, Held, NotRecorded, ProxyError, from_store
from tracegrad.adapters.proxy.fields import salt_of
from tracegrad.adapters.proxy.hold import Hold, Ticket
from tracegrad.adapters.proxy.kept import KeptSets
from tracegrad.adapters.proxy.log_lines import of_call
from tracegrad.adapters.proxy.metrics import ProxyMetrics
from tracegrad.adapters.proxy.recorder import Draft, Progress, Transcript, compose, read_answer
from tracegrad.adapters.proxy.retries import (
    Attempt,
    retry_number,
)
from tracegrad.adapters.proxy.sse import DONE, Event, SSEParser, encode
from tracegrad.adapters.proxy.upstream import EngineAnswer, NotSent, Upstream
from tracegrad.adapters.proxy.version_spans import ASK, read_told, versions_in
from tracegrad.adapters.proxy.wire import JSON_HEADERS, STREAM_HEADERS, ClientGone, Hangup, Headers, Reply, Request
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.group_commit import GroupCommitter
from tracegrad.tracestore.publishes import REHEARSED
from tracegrad.tracestore.records import CallStatus

log = logging.getLogger("tracegrad.proxy")
HEARTBEAT_S = 15.0
"""A held stream gets an empty chunk at least this often: LangChain gives up on a stream after 120 s without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What all exchanges of a proxy have in common."""

    upstream: Upstream
    hold: Hold
    committer: GroupCommitter
    metrics: ProxyMetrics
    dissents: Dissents
    continuing: Continuing
    kept: KeptSets
    hold_timeout_s: float
    in_flight: bool = False
    """Whether calls go on while weights are exchanged: each asks the engine which weights sampled what."""


class Exchange:
    """One call. `run` it once; `answered`: its reply was sent to the end; `submitted`: it was given to the store."""

    def __init__(
        self,
        shared: Shared,
        ask: Ask,
        draft: Draft,
        request: Request,
        reply: Reply,
        *,
        attempt: Attempt | None = None,
    ) -> None:
        self._shared = shared
        self._draft = draft
        self._ask, self._shape = ask, ask.shape
        self._request = request
        self._reply = reply
        self._progress = Progress()
        self._own_headers = ((b"x-tracegrad-call", draft.call_id.encode()),)
        ours = draft.outside is None
        self._kept = shared.kept.asked_of(draft.model, draft.sampling, draft.purpose)
        self._injection = injection = plan_injection(ask.body, ask.shape, kept=self._kept.count) if ours else NOTHING
        self._transcript = Transcript(asked=injection.kept > 0)
        alias = ask.model if ask.model != _served(draft) or draft.before else None
        self._stripper = Stripper(injection, alias=alias, mark=_mark_of(draft, ask.shape))
        self._body = _body_of(ask, draft, injection)
        self._past = shared.continuing.past(draft, self._body)
        self._asks = shared.in_flight and ours and ask.shape is not EMBEDDINGS
        self._on_gone = None if attempt is None else attempt.client_left
        self.answered = self.submitted = False
        self._arrived = time.monotonic()
        self._caller = caller_of(shared.hold.number(), draft.attribution.run_id, draft.purpose)
        self._engines: frozenset[str] | None = None
        self._beside = False
        self._held: list[bytes] = []
        self._holding = self._done = False

    async def run(self) -> None:
        """Carry the exchange to its end. A ProxyError is answered here, with the call's id."""
        async with Hangup(self._request.receive, self._on_gone) as hangup:
            try:
                while not await self._try(hangup):
                    pass
            except ClientGone:
                return  # never dispatched: nothing was sampled, nothing is recorded
            except ProxyError as error:
                await self._reply.error(error, self._own_headers)

    async def _try(self, hangup: Hangup) -> bool:
        """Wait for admission and converse; False where no engine could be given the request after all."""
        ticket = await self._admit(hangup)
        self._progress.version_dispatched, self._engines, self._beside = ticket.version, ticket.engines, ticket.beside
        try:
            await self._converse(hangup, ticket)
        except NotSent:
            return False
        finally:
            self._shared.hold.leave(ticket)
        return True

    async def _admit(self, hangup: Hangup) -> Ticket:
        """Pass, or wait in line while the model takes no calls; a waiting stream is kept alive with empty chunks.

        Raises Held before the client's own deadline.
        """
        hold, model = self._shared.hold, self._draft.model
        if (ticket := hold.pass_through(model, self._caller)) is not None:
            return ticket
        entering = asyncio.create_task(hold.enter(model, self._caller))
        waited = False
        try:
            await self._wait(entering, hangup)
            waited = True
        finally:
            if not waited and not entering.cancel() and entering.exception() is None:
                hold.leave(entering.result())  # let through in the moment the client left
        return entering.result()

    async def _wait(self, entering: "asyncio.Task[Ticket]", hangup: Hangup) -> None:
        headers, stream = self._request.headers, self._draft.stream
        limit_s = self._shared.hold_timeout_s
        deadline = self._arrived + patience_s(headers, stream=stream, hold_timeout_s=limit_s)
        pause_s = beat_s(headers, HEARTBEAT_S)
        while True:
            left_s = max(deadline - time.monotonic(), 0.0)
            with hangup.cancels():
                done, _ = await asyncio.wait({entering}, timeout=min(left_s, pause_s) if stream else left_s)
            if done:
                return
            if time.monotonic() >= deadline:
                raise _held_too_long(self._shared, self._draft.model, self._request, time.monotonic() - self._arrived)
            await self._start_stream(STREAM_HEADERS)
            await self._reply.send(encode(empty_chunk(self._shape, self._draft)))

    async def _converse(self, hangup: Hangup, ticket: Ticket) -> None:
        """Dispatch, gather, record, release; whatever goes wrong on the way is recorded as it is."""
        self._progress.dispatched_at = time.time()
        answer: EngineAnswer | None = None
        try:
            with hangup.cancels():
                answer = await self._dispatch()
                if answer.status != 200:
                    body = await answer.read()
                elif answer.is_stream:
                    await self._relay(answer)
                    body = b""
                else:
                    body = await answer.read()
            await self._conclude(answer, body, ticket)
        except ClientGone:
            _abort(answer)
            await self._record_aborted(ticket)
        except (EngineUnreachable, EngineTimeout) as error:
            _abort(answer)
            await self._record(ticket, "failed", error.message)
            raise
        except asyncio.CancelledError:  # the server is going down: leave a record, do not wait for it
            _abort(answer)
            if not self.submitted:
                self._submit(ticket, ticket.version_now, "aborted", "the proxy was shut down")
            raise
        finally:
            if self._past is not None:
                self._past.drop()
            if answer is not None:
                answer.release()

    async def _dispatch(self) -> EngineAnswer:
        """Send the request; where the engine refuses it, again asking for fewer top logprobs, at last for none."""
        self._kept.begin(self._injection.kept)
        answer = await self._dispatch_asking()
        while self._kept.count and await answer.refused(inside=self._kept.unproved):
            answer.release()
            if self._past is not None:
                self._past.refused()
            self._progress.continues = None
            fewer = replace(self._injection, kept=self._kept.fewer())
            answer = await self._post(_body_of(self._ask, self._draft, fewer))
        return answer

    async def _dispatch_asking(self) -> EngineAnswer:
        """Send the request; once more as the client wrote it where the engine refuses a prompt of ids."""
        if self._past is None:
            return await self._post(self._body)
        try:
            body = await self._past.body()
        except TraceStoreError as error:
            raise from_store(error) from error
        self._progress.continues = self._past.sent
        answer = await self._post(body)
        plain = self._past.refused() if answer.status == 400 else None
        if plain is None:
            return answer
        self._progress.continues = None
        answer.release()
        return await self._post(plain)

    async def _post(self, body: bytes) -> EngineAnswer:
        headers, draft = without_ours(self._request.raw_headers), self._draft
        headers = [*headers, ASK] if self._asks else headers
        body = _as_named(body, draft, self._progress.version_dispatched, beside=self._beside)
        run_id, among, beside, post = draft.attribution.run_id, self._engines, self._beside, self._shared.upstream.post
        return await post(draft.model, self._shape.path, body, headers, run_id=run_id, among=among, beside=beside)

    async def _conclude(self, answer: EngineAnswer, body: bytes, ticket: Ticket) -> None:
        """The engine has said everything: commit, then let the client have the end."""
        if answer.status != 200:
            await self._record(ticket, "failed", f"HTTP {answer.status}: {body[:2000].decode(errors='replace')}")
            await self._pass_error_on(answer, body)
        elif answer.is_stream:
            failure = self._transcript.failure
            await self._record(ticket, "complete" if failure is None else "failed", failure, answer)
            await self._reply.send(self._release(), more=False)
            self.answered = failure is None
        else:
            visible = self._read_whole(body)
            self._transcript.told = None if answer.versions is None else read_told(answer.versions)
            await self._record(ticket, "complete")
            await self._reply.whole(200, [*answer.headers, *self._own_headers], visible)
            self.answered = True

    def _read_whole(self, body: bytes) -> bytes:
        """Read a plain answer into the transcript; return what the client may see of it."""
        try:
            self._transcript.add(read_answer(body))
            return self._stripper.plain(body)
        except msgspec.MsgspecError as error:
            if self._shape is EMBEDDINGS:
                return body  # `encoding_format: bytes`: numbers without JSON around them
            raise EngineUnreachable(
                f"the engine of model {self._draft.model!r} sent no JSON answer: {error}", code="engine_bad_answer"
            ) from error

    async def _relay(self, answer: EngineAnswer) -> None:
        """Pass events on as they come, until the first one that must wait for the commit."""
        await self._start_stream(answer.headers)
        parser = SSEParser()
        async for chunk in answer.chunks():
            if self._progress.first_token_at is None:
                self._progress.first_token_at = time.time()
            ready = self._take(parser.feed(chunk))
            if ready:
                await self._reply.send(ready)
            if self._done:
                return
        self._take(parser.close())
        if not self._done and (self._draft.outside is None or not self._transcript.finished(self._draft.n)):
            raise EngineUnreachable(f"the engine of model {self._draft.model!r} ended its stream before [DONE]")

    def _take(self, events: list[Event]) -> bytes:
        """Read events into the transcript; return what may leave now, and hold the rest."""
        ready: list[bytes] = []
        for event in events:
            visible = self._read(event)
            if visible is not None:
                (self._held if self._holding else ready).append(visible)
        return b"".join(ready)

    def _read(self, event: Event) -> bytes | None:
        if event.data is None:
            return self._transcript.hear(event.raw) if self._asks else event.raw
        if event.data == DONE:
            self._holding = self._done = True
            return event.raw
        try:
            said = read_answer(event.data)
            self._transcript.add(said)
            visible = self._stripper.chunk(event.data)
        except msgspec.MsgspecError:
            self._transcript.flaw = "unreadable chunk"
            return event.raw
        if said.failed:
            self._holding = True
            return encode(openai_error_event(event.data, self._shape))
        if self._transcript.finished(self._draft.n):
            self._holding = True
        if visible is None:
            return None
        return event.raw if visible is event.data else encode(visible)

    def _release(self) -> bytes:
        """Return the held end of the stream."""
        if self._held and self._held[0].startswith(b"data: {"):
            self._held[0] = encode(self._stripper.stamp(self._held[0][6:-2]))
        return b"".join(self._held)

    async def _record(
        self, ticket: Ticket, status: CallStatus, error: str | None = None, answer: EngineAnswer | None = None
    ) -> None:
        """Count the call out and wait until it is durable. Raises NotRecorded."""
        self._progress.completed_at = time.time()
        try:
            version = await self._shared.hold.version_after(ticket, versions_in(self._transcript.told))
            if self._past is not None and status == "complete":
                self._progress.continues = await self._past.settle(self._transcript.prompt_ids)
            commit = asyncio.wrap_future(self._submit(ticket, version, status, error))
            if answer is not None:
                await answer.drain()  # the stream's last bytes arrive while the store commits
            await asyncio.shield(commit)
        except (TraceStoreError, ProxyError) as failure:
            draft = self._draft
            self._shared.metrics.not_recorded(draft.model)
            about = of_call(draft.call_id, draft.attribution, draft.model)
            log.error("call %s could not be recorded: %s", draft.call_id, failure, extra=about)
            raise NotRecorded(
                f"the call {self._draft.call_id} could not be recorded, so its answer is withheld: {failure}"
            ) from failure

    async def _record_aborted(self, ticket: Ticket) -> None:
        try:
            await self._record(ticket, "aborted", "the client closed the connection")
        except NotRecorded:
            return  # nobody is left to tell; it is in the log, and no answer is unrecorded

    def _submit(self, ticket: Ticket, version: int | None, status: CallStatus, error: str | None) -> Future[None]:
        """Count the call out of the engine and hand it to the committer."""
        self._progress.version_completed = version
        self._progress.swapped, self._progress.exchanged = ticket.swapped, ticket.exchanged
        self._progress.lived = ticket.gate.lived
        self._shared.hold.leave(ticket)
        self.submitted = True
        call = compose(self._draft, self._progress, self._transcript, status=status, error=error)
        self._shared.continuing.remember(call)
        self._kept.heard(call)
        commit = self._shared.committer.submit(call)
        self._shared.dissents.follow(commit, self._draft.dissent, self._draft.project)
        return commit

    async def _pass_error_on(self, answer: EngineAnswer, body: bytes) -> None:
        told = openai_error(answer.status, body, self._shape, self._draft.body)
        if self._reply.started:
            await self._reply.send(encode(b"".join(told.splitlines())), more=False)
        else:
            headers = [header for header in answer.headers if header[0] != b"content-type"]
            await self._reply.whole(answer.status, [*headers, *JSON_HEADERS, *self._own_headers], told)

    async def _start_stream(self, headers: Headers) -> None:
        if not self._reply.started:
            await self._reply.start(200, [*headers, *self._own_headers])


def empty_chunk(shape: Shape, draft: Draft) -> bytes:
    """Return the heartbeat of a stream: a chunk without choices, as JSON."""
    return msgspec.json.encode(
        {
            "id": f"{shape.prefix}-{draft.call_id}",
            "object": shape.chunk,
            "created": int(draft.received_at),
            "model": draft.requested_model,
            "choices": [],
        }
    )


def _mark_of(draft: Draft, shape: Shape) -> str | None:
    """Nobody said who calls: a LangSmith tree may say it later, and knows the answer of a stream by this mark only."""
    unknown = draft.attribution.run_id is None or draft.attribution.role is None
    return draft.call_id if unknown and shape is CHAT else None


def _served(draft: Draft) -> str:
    return draft.outside or draft.model


def _as_named(body: bytes, draft: Draft, version: int | None, *, beside: bool) -> bytes:
    """Return a request by the engine's name for who answers: an adapter, its base before it is live, what is next."""
    return renamed(body, draft.model + REHEARSED if beside else draft.before if version is None else None)


def _body_of(ask: Ask, draft: Draft, injection: Injection) -> bytes:
    return upstream_body(
        ask,
        injection,
        model=_served(draft),
        requested=draft.sampling.requested,
        effective=draft.sampling.effective,
        salt=salt_of(draft.project, ask.body.get("cache_salt")) if draft.outside is None else None,
    )


def _held_too_long(shared: Shared, model: str, request: Request, waited_s: float) -> Held:
    state = shared.hold.gates[model].view.state
    publishing = f"new weights are being {'judged' if state == 'evaluating' else 'published'}"
    why = shared.upstream.pools[model].complaint or publishing
    later_s = retry_after_s(waited_s, retry_number(request.headers) or 0)
    return Held(f"the model {model!r} has taken no calls for {waited_s:.0f} s: {why}", retry_after_s=later_s)


def _abort(answer: EngineAnswer | None) -> None:
    if answer is not None:
        answer.abort()
