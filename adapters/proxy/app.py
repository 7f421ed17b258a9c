"""The proxy as one pure ASGI application: lifespan, routing, and the boundary where errors become answers.

Only the listed paths exist; nothing else reaches an engine. Starting fails where the store cannot be reached or a
publish state cannot be read. Called by uvicorn (see `command`).
"""

import asyncio
import logging
import os
from collections.abc import Mapping

import msgspec

from tracegrad.adapters.proxy import langsmith, model_cards
from tracegrad.adapters.proxy.access import Access, keys_wanted
from tracegrad.adapters.proxy.attribution import Route, split_path
from tracegrad.adapters.proxy.chat import ModelEndpoint
from tracegrad.adapters.proxy.continuing import Continuing
from tracegrad.adapters.proxy.control import PREFIX, Control
from tracegrad.adapters.proxy.dissents import Dissents
from tracegrad.adapters.proxy.endpoints import SHAPES
from tracegrad.adapters.proxy.errors import MethodNotAllowed, ProxyError, UnknownPath
from tracegrad.adapters.proxy.exchange import Shared
from tracegrad.adapters.proxy.first_worker import FirstWorker
from tracegrad.adapters.proxy.hold import Hold
from tracegrad.adapters.proxy.kept import KeptSets
from tracegrad.adapters.proxy.limits import check_header_bytes
from tracegrad.adapters.proxy.metrics import ProxyMetrics
from tracegrad.adapters.proxy.metrics_page import METRICS_HEADERS, MetricsPage
from tracegrad.adapters.proxy.outside import outside_apis
from tracegrad.adapters.proxy.purposes import Purposes
from tracegrad.adapters.proxy.redaction import RedactingStore, Redactor
from tracegrad.adapters.proxy.upstream import Upstream
from tracegrad.adapters.proxy.watch import WatchedCommitter
from tracegrad.adapters.proxy.wire import JSON_HEADERS, ClientGone, Receive, Reply, Request, Scope, Send
from tracegrad.adapters.proxy.worker_sockets import WorkerSockets
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.store import Store

log = logging.getLogger("tracegrad.proxy")
COUNTED_PATHS = frozenset((*SHAPES, "/v1/models", "/health", "/metrics"))
OTHER_PATH = "other"
JOIN_S = 5.0


class ProxyApp:
    """One proxy in front of the configured engines, writing to one store. The caller closes the store.

    Raises ConfigError where the key of an outside API is not in `environ`.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        *,
        url: str = "",
        sockets: WorkerSockets | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.config = config
        self.store = RedactingStore(store, Redactor(config.redact)) if config.redact else store
        self.proxy_id = new_id("proxy")
        self.url = url
        worker = "0" if sockets is None else str(sockets.own)
        self.metrics = ProxyMetrics(config, proxy_id=self.proxy_id, worker=worker)
        self._sockets = sockets
        self._first = FirstWorker(sockets) if sockets is not None and sockets.own != 0 else None
        self._metrics_page = MetricsPage(self.metrics, store, config.project, sockets)
        self._outside = outside_apis(config, environ)
        self._engines = {
            name: [each.engine.url for each in config.engines_of(name)]
            for name in config.models
            if name not in self._outside
        }
        self.hold = Hold(
            self.store,
            self._engines,
            outside=self._outside,
            proxy_id=self.proxy_id,
            url=url,
            poll_s=config.proxy.poll_s,
            expires_s=config.proxy.heartbeat_expires_s,
            in_flight=config.publishes_in_flight,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Speak ASGI 3: `lifespan` and `http`."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http" and self._sockets is not None and self._sockets.asks_for_ours(scope):
            await Reply(send).whole(200, METRICS_HEADERS, self.metrics.render().encode())
        elif scope["type"] == "http" and self._first is not None and self._first.takes(scope):
            await self._first.pass_on(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start()
        except (TraceStoreError, ProxyError) as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        proxy = self.config.proxy
        self.access = Access(self.store, wanted=keys_wanted(proxy))
        purposes = Purposes(self.store)
        await self.hold.start()
        gates = self.hold.gates
        self.upstream = Upstream(
            self._engines,
            outside=self._outside,
            timeout_s=proxy.upstream_timeout_s,
            wanted=lambda model, engine, beside: gates[model].version_on(frozenset((engine,)), beside=beside),
            changed=self._engine_is_back,
            exchanging=lambda model: gates[model].exchanging,
            adapters=[name for name, model in self.config.models.items() if model.adapter is not None],
            folder_of=lambda version: self.store.get_version(version).checkpoint_path,
        )
        for name, pool in self.upstream.pools.items():
            gates[name].ready = pool.is_up
        for name, pool in self.upstream.beside.items():
            gates[name].ready_beside = pool.is_up
        self.model_cards = model_cards.ModelCards(self.config, self.upstream)
        self.committer = WatchedCommitter(self.store, self.metrics)
        self.metrics.watch(self.hold.gates, self.upstream.pools, self.committer)
        self.langsmith = langsmith.LangSmith(self.store, self.config)
        self.control = Control(self.config, self.store, purposes)
        self.dissents = Dissents(self.store)
        self.continuing = Continuing(self.store, self.upstream, self.config.token_in)
        self.kept = KeptSets(self.config)
        self.answer = ModelEndpoint(
            self.config,
            self.store,
            purposes=purposes,
            shared=Shared(
                upstream=self.upstream,
                hold=self.hold,
                committer=self.committer,
                metrics=self.metrics,
                dissents=self.dissents,
                continuing=self.continuing,
                kept=self.kept,
                hold_timeout_s=proxy.hold_timeout_s,
                in_flight=self.config.publishes_in_flight,
            ),
        )
        self._closing_idle = asyncio.create_task(self._close_idle_runs(), name="tracegrad-idle-close")
        self._joining = asyncio.create_task(self._join_late_facts(), name="tracegrad-late-facts")

    def _engine_is_back(self, model: str) -> None:
        """It may have been started with other flags."""
        self.continuing.rendering.ask_again(model)
        self.kept.ask_again(model)
        self.hold.advance(model)

    async def _stop(self) -> None:
        self._closing_idle.cancel()
        self._joining.cancel()
        await asyncio.wait([self._closing_idle, self._joining])
        await self.langsmith.close()
        await asyncio.to_thread(self.committer.close)
        await self.dissents.stop()
        await self.hold.stop()
        await self.upstream.close()

    async def _close_idle_runs(self) -> None:
        """Live runs that nothing was heard of for `proxy.idle_close_s` end by time-out, in every project."""
        idle_s = self.config.proxy.idle_close_s
        while True:
            await asyncio.sleep(idle_s / 4)
            try:
                await asyncio.to_thread(self._close_idle_once, idle_s)
            except TraceStoreError as error:
                log.warning("idle runs could not be closed: %s; tried again in %.1f s", error, idle_s / 4)

    async def _join_late_facts(self) -> None:
        """Posted trees that nobody claims get a run; facts that came before their calls are joined with them."""
        while True:
            await asyncio.sleep(JOIN_S)
            try:
                await self.langsmith.settle()
                await asyncio.to_thread(self.store.resolve_attributions)
            except TraceStoreError as error:
                log.warning("late attributions wait: %s; tried again in %.1f s", error, JOIN_S)

    def _close_idle_once(self, idle_s: float) -> None:
        for project in sorted({self.config.project, *(key.project for key in self.store.list_keys())}):
            self.store.close_idle_runs(project, idle_s)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        path = OTHER_PATH
        try:
            route = split_path(scope.get("raw_path") or scope["path"].encode())
            path = counted_as(route.path)
            limits = self.config.proxy.limits
            check_header_bytes(scope["headers"], limits)
            request = Request(scope, receive, route, limits=limits)
            request.key = await self.access.admit(request.method, route.path, request.headers)
            await self._route(request, route, reply)
        except ClientGone:
            return
        except ProxyError as error:
            await reply.error(error)
        except Exception:  # the boundary: a fault of ours is logged and answered, and the server lives on
            log.exception("unexpected error in %s %s", scope["method"], scope["path"])
            await reply.error(ProxyError("the proxy failed; its log says why"))
        finally:
            self.metrics.answered(path, reply.status)

    async def _route(self, request: Request, route: Route, reply: Reply) -> None:
        if (shape := SHAPES.get(route.path)) is not None:
            _check_method(request, route.path, "POST")
            await self.answer(shape, request, reply)
        elif route.path == "/v1/models" or route.path.startswith(model_cards.PREFIX):
            _check_method(request, route.path, "GET")
            await self.model_cards.answer(route.path, reply)
        elif route.path == "/health":
            _check_method(request, route.path, "GET")
            await self._health(reply)
        elif route.path == "/metrics":
            _check_method(request, route.path, "GET")
            await reply.whole(200, METRICS_HEADERS, await self._metrics_page.render())
        elif route.path.startswith(langsmith.PREFIX) and (methods := self.langsmith.methods(route.path)):
            _check_method(request, route.path, *methods)
            answer = msgspec.json.encode(await self.langsmith.answer(route.path, request))
            await reply.whole(200 if request.method == "GET" else 202, JSON_HEADERS, answer)
        elif route.path.startswith(PREFIX) and (handlers := self.control.seen_by(request.key).find(route.path)):
            _check_method(request, route.path, *handlers)
            await reply.whole(200, JSON_HEADERS, await self.control.answer(handlers[request.method], request))
        else:
            raise UnknownPath(f"{route.path} is not a path of this proxy")

    async def _health(self, reply: Reply) -> None:
        """200 where the store answers and every engine is healthy, 503 otherwise; the body says what is wrong."""
        await asyncio.gather(*(pool.examine() for pool in self.upstream.pools.values()))
        models = {}
        for name, gate in self.hold.gates.items():
            pool = self.upstream.pools[name]
            models[name] = {
                "engine": pool.complaint or "ok",
                "engines": [engine.report() for engine in pool.engines],
                "live_version": gate.live_version,
                "candidate": gate.view.candidate if gate.view.state == "evaluating" else None,
                "holding": gate.holding,
                "waiting": len(gate.line),
                "in_flight": gate.in_flight,
            }
            if (lacking := self.continuing.rendering.missing.get(name)) is not None:
                models[name]["token_in"] = lacking
        store = "ok" if self.hold.fresh else "unreachable"
        well = store == "ok" and all(model["engine"] == "ok" for model in models.values())
        report = {"status": "ok" if well else "unwell", "proxy_id": self.proxy_id, "store": store, "models": models}
        await reply.whole(200 if well else 503, JSON_HEADERS, msgspec.json.encode(report))


def counted_as(path: str) -> str:
    """Return the path as a label: one of a fixed list, whatever clients ask for."""
    if path in COUNTED_PATHS:
        return path
    return next((prefix for prefix in (PREFIX, langsmith.PREFIX) if path.startswith(prefix)), OTHER_PATH)


def _check_method(request: Request, path: str, *allowed: str) -> None:
    if request.method not in allowed:
        raise MethodNotAllowed(f"{path} takes {' or '.join(allowed)}, not {request.method}")
