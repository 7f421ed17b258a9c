"""`/langsmith/...`: an app with LangSmith tracing on posts its run tree here instead, with nothing but environment:

    LANGSMITH_TRACING=true LANGSMITH_ENDPOINT=http://127.0.0.1:8080/langsmith LANGSMITH_API_KEY=x

Which run a trace is, the first that answers: the request's own header or URL prefix (`/run/R/langsmith`); the run in
which the hook told a span of the trace; the run that a call of the trace has already; else a run of its own, named by
the trace id, which the end of the trace's root closes. Parts wait in memory until one of these is known: a call of the
trace has ended, or its root has, or `HOLD_S` have passed. What the calls do not know they learn from the facts
(`Store.attribute_late`), their roles by way of the role rules; what they know otherwise becomes a conflict. Calls and
runs of another project than the request's do not exist for it. A trace that is one model run alone is no run.
`/feedback` becomes rewards (see `langsmith_feedback`).
Refuses what `langsmith_wire` refuses. Called by `app`; the store is asked in a worker thread.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tracegrad.adapters.proxy.access import keys_wanted
from tracegrad.adapters.proxy.attribution import attribute
from tracegrad.adapters.proxy.errors import from_store
from tracegrad.adapters.proxy.langsmith_feedback import Feedbacks
from tracegrad.adapters.proxy.langsmith_roles import TreeRoles
from tracegrad.adapters.proxy.langsmith_spans import (
    TraceMemory,
    became,
    calls_named,
    error_of,
    own_run_id,
    span_id_of,
)
from tracegrad.adapters.proxy.langsmith_wire import (
    Posted,
    RunPart,
    read_batch,
    read_multipart,
    read_run,
    zstd_available,
)
from tracegrad.adapters.proxy.wire import Request
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import Conflict, NotFound, TraceStoreError
from tracegrad.tracestore.records import LangSmithRun, LateAttribution, Span
from tracegrad.tracestore.store import Store

PREFIX = "/langsmith/"
HOLD_S = 10.0
MAX_TRACES = 5_000
log = logging.getLogger("tracegrad.proxy")


@dataclass(slots=True)
class _Trace:
    """A trace in flight. `run_id` None: not decided yet, and `waiting` holds its parts.

    `told` is what the hook said: LangChain's id of a graph or tool -> its run. One trace may hold several such runs.
    """

    trace_id: str
    project: str
    since: float
    run_id: str | None = None
    told: dict[str, str] = field(default_factory=dict)
    memory: TraceMemory = field(default_factory=TraceMemory)
    waiting: list[RunPart] = field(default_factory=list)

    @property
    def own(self) -> bool:
        """Whether the trace is a run of its own."""
        return self.run_id == own_run_id(self.trace_id)

    def run_of(self, part: RunPart) -> str:
        """Return the run that a part belongs to: that of the innermost run around it that the hook told of."""
        assert self.run_id is not None
        known = [self.told[lc_id] for lc_id in (part.run_id, *reversed(part.ancestors)) if lc_id in self.told]
        return known[0] if known else self.run_id


class LangSmith:
    """The endpoints. One per proxy process: another one that gets parts of the same trace decides by itself."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._project = config.project
        self._roles = TreeRoles(store, config.role_rules)
        self._feedback = Feedbacks(store, keys_wanted=keys_wanted(config.proxy))
        self._traces: OrderedDict[tuple[str, str], _Trace] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self.unread = 0

    def methods(self, path: str) -> tuple[str, ...]:
        """Return the methods that a path under `PREFIX` takes; empty where there is no such path."""
        match path.removeprefix(PREFIX).split("/"):
            case ["info"]:
                return ("GET",)
            case ["runs"] | ["runs", "batch" | "multipart"]:
                return ("POST",)
            case ["feedback"]:
                return ("POST",)
            case ["runs" | "feedback", _]:
                return ("PATCH",)
        return ()

    async def answer(self, path: str, request: Request) -> dict[str, object]:
        """Answer one request. Raises ProxyError."""
        what = path.removeprefix(PREFIX)
        if what == "info":
            return info()
        body = await request.body()
        project = self._project if request.key is None else request.key.project
        if what.startswith("feedback"):
            return await self._feedback.answer(what, body, project)
        posted = await asyncio.to_thread(self._read, what, body, request)
        if posted.unread:
            self.unread += posted.unread
            log.warning("%d parts of LangSmith runs could not be read and are left out", posted.unread)
        said = attribute(request.headers, request.route, request.key).run_id
        try:
            async with self._one_at_a_time:
                await asyncio.to_thread(self.take, posted.parts, project, said)
                if posted.feedback:
                    self._feedback.check(request.key)
                    await asyncio.to_thread(self._feedback.take, posted.feedback, project)
        except TraceStoreError as error:
            raise from_store(error) from error
        return {}

    def _read(self, what: str, body: bytes, request: Request) -> Posted:
        if what == "runs/multipart":
            return read_multipart(body, request.headers.get(b"content-type", b""))
        if what == "runs/batch":
            return read_batch(body)
        return read_run(body, what.partition("/")[2] or None)

    def take(self, parts: Sequence[RunPart], project: str, said_run: str | None = None) -> None:
        """Take parts in; write those whose run is known. Not thread-safe. Raises TraceStoreError.

        A run of another project is not to be had, whoever names it: NotFound where the request itself did.
        """
        if said_run is not None and not self._may_have(said_run, project):
            raise NotFound(f"no run {said_run!r} in project {project!r}")
        touched: dict[str, _Trace] = {}
        for part in parts:
            trace = self._trace(part.trace_id, project)
            trace.memory.see(part)
            trace.waiting.append(part)
            touched[trace.trace_id] = trace
        for trace in touched.values():
            self._settle(trace, said_run)

    async def settle(self) -> None:
        """Give the traces that wait for too long a run of their own. Raises TraceStoreError."""
        late = time.monotonic() - HOLD_S
        await self._settle_all([trace for trace in self._traces.values() if trace.waiting and trace.since < late])
        async with self._one_at_a_time:
            await asyncio.to_thread(self._feedback.try_again)

    async def close(self) -> None:
        """Write what waits: the process ends."""
        try:
            await self._settle_all([trace for trace in self._traces.values() if trace.waiting])
            await asyncio.to_thread(self._feedback.try_again, last=True)
        except TraceStoreError as error:
            log.warning("parts of LangSmith traces are lost: %s", error)

    async def _settle_all(self, traces: Sequence[_Trace]) -> None:
        async with self._one_at_a_time:
            for trace in traces:
                await asyncio.to_thread(self._settle, trace, None, at_once=True)

    def _trace(self, trace_id: str, project: str) -> _Trace:
        trace = self._traces.get((project, trace_id))
        if trace is None:
            trace = self._traces[project, trace_id] = _Trace(trace_id, project, time.monotonic())
            while len(self._traces) > MAX_TRACES:
                _, oldest = self._traces.popitem(last=False)
                self._settle(oldest, None, at_once=True)
        return trace

    def _settle(self, trace: _Trace, said_run: str | None, *, at_once: bool = False) -> None:
        """Write what waits, once it is known which run the trace is."""
        if said_run is not None:
            trace.run_id = said_run
        elif not trace.own:
            self._ask_the_hook(trace)
        if trace.run_id is None:
            trace.run_id = self._decided(trace, at_once=at_once or time.monotonic() - trace.since > HOLD_S)
        if trace.run_id is None:
            return
        parts, trace.waiting = trace.waiting, []
        try:
            self._write(trace, parts)
        except TraceStoreError:
            trace.waiting = parts + trace.waiting  # the client, told 503, sends them again: the same parts are no-ops
            raise
        root_ended = any(part.is_root and part.ended_at is not None for part in parts)
        key = (trace.project, trace.trace_id)
        if root_ended and self._traces.get(key) is trace:
            self._traces.move_to_end(key, last=False)  # done: the first to be forgotten

    def _ask_the_hook(self, trace: _Trace) -> None:
        """Look up in which runs spans of the trace are stored already."""
        ids = {lc_id for part in trace.waiting for lc_id in (part.run_id, part.trace_id, *part.ancestors)}
        spans = {span_id_of(lc_id): lc_id for lc_id in ids - trace.told.keys()}
        for span_id, run_id in self._store.runs_of_spans(list(spans)).items():
            if self._may_have(run_id, trace.project):
                trace.told[spans[span_id]] = run_id
        if trace.run_id is None and trace.told:
            trace.run_id = next(iter(trace.told.values()))

    def _decided(self, trace: _Trace, *, at_once: bool) -> str | None:
        """Return the run of a trace that the hook did not tell of, if it can be known by now."""
        answered = False
        for named in [named for part in trace.waiting for named in calls_named(part)]:
            try:
                _, run_id = self._store.find_call(named, trace.project)
            except (NotFound, Conflict):  # of several calls with one completion id nobody knows which is meant
                continue
            answered = True
            if run_id is not None and self._may_have(run_id, trace.project):
                return run_id
        root_ended = any(part.is_root and part.ended_at is not None for part in trace.waiting)
        return own_run_id(trace.trace_id) if answered or root_ended or at_once else None

    def _may_have(self, run_id: str, project: str) -> bool:
        """Whether a run is of the project, or will be when it is opened."""
        try:
            return self._store.get_run(run_id).project == project
        except NotFound:
            return True

    def _write(self, trace: _Trace, parts: Sequence[RunPart]) -> None:
        """Write spans, then what is said of calls, then the end: a run that has ended may be leased at once."""
        if trace.run_id is not None and not self._may_have(trace.run_id, trace.project):
            log.warning("a LangSmith trace names the run %s of another project: left out", trace.run_id)
            return
        if trace.own and all(part.is_root and part.run_type != "chain" for part in parts):
            self._store.put_langsmith_runs([became(part, None, None) for part in parts], trace.project)
            return  # a model, or a tool, on its own: no workflow
        spans: list[Span] = []
        facts: list[LateAttribution] = []
        known: list[LangSmithRun] = []
        for part in parts:
            run_id = trace.run_of(part)
            if (span := trace.memory.span(part, run_id)) is not None:
                spans.append(span)
            known.append(became(part, run_id, span))
            facts += self._roles.ruled(trace.memory.facts(part, run_id), part, trace.project)
        self._store.put_spans(spans, trace.project)
        self._store.attribute_late(facts, trace.project)
        self._store.put_langsmith_runs(known, trace.project)
        for part in parts:
            if trace.own and part.is_root and part.ended_at is not None:
                self._end(trace, part)

    def _end(self, trace: _Trace, root: RunPart) -> None:
        run_id = own_run_id(trace.trace_id)
        self._store.ensure_runs([run_id], trace.project)
        error = error_of(root)
        try:
            self._store.end_run(
                run_id, status="closed" if error is None else "failed", ended_by="explicit", error=error
            )
        except Conflict as conflict:
            log.warning("the end of a LangSmith trace is not taken: %s", conflict)


def info() -> dict[str, object]:
    """What a client asks first: how to send. It logs a warning where a compression that it knows is not offered.

    A client of a server before 0.8.10 posts feedback by itself and learns what became of it; later, within its forms.
    """
    return {
        "version": "0.1.0",
        "batch_ingest_config": {
            "use_multipart_endpoint": True,
            "size_limit": 100,
            "size_limit_bytes": 20 * 1024 * 1024,
            "scale_up_nthreads_limit": 4,
            "scale_up_qsize_trigger": 1000,
            "scale_down_nempty_trigger": 4,
        },
        "instance_flags": {"zstd_compression_enabled": zstd_available(), "gzip_body_enabled": True},
    }
