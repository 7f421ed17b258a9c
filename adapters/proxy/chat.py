"""`POST /v1/chat/completions`, `/v1/completions`, `/v1/embeddings`: from a request to its exchange.

Reads the request, places it, decides its model and its sampling, finds out whether it is a retry; `exchange` does the
rest. The first call of a run that this process has not met waits for the store once. What differs between the three
endpoints is in `endpoints`. Refuses what `capture`, `fields`, `attribution` and `routing` refuse. Called by `app`.
"""

import asyncio
import time
from dataclasses import replace
from functools import partial

from tracegrad.adapters.proxy import exchange
from tracegrad.adapters.proxy.attribution import dissent
from tracegrad.adapters.proxy.capture import Ask, read_ask
from tracegrad.adapters.proxy.deadlines import beat_s
from tracegrad.adapters.proxy.endpoints import EMBEDDINGS, Shape
from tracegrad.adapters.proxy.errors import from_store
from tracegrad.adapters.proxy.exchange import Exchange, Shared, empty_chunk
from tracegrad.adapters.proxy.fields import check_headers
from tracegrad.adapters.proxy.limits import check_counts
from tracegrad.adapters.proxy.purposes import Purposes
from tracegrad.adapters.proxy.recorder import Draft
from tracegrad.adapters.proxy.retries import (
    STORE_WINDOW_S,
    Attempts,
    Key,
    answer_from,
    key_of,
    retry_number,
)
from tracegrad.adapters.proxy.roles import Roles
from tracegrad.adapters.proxy.routing import engine_of
from tracegrad.adapters.proxy.sampling import constrains_tools, override_of, plan_sampling
from tracegrad.adapters.proxy.sse import encode
from tracegrad.adapters.proxy.wire import Reply, Request
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.store import Store


class ModelEndpoint:
    """The endpoints that a model answers, with what their exchanges share."""

    def __init__(
        self,
        config: Config,
        store: Store,
        *,
        purposes: Purposes,
        shared: Shared,
    ) -> None:
        self.config = config
        self.store = store
        self.attempts = Attempts()
        self.purposes = purposes
        self._shared = shared
        self._strict_tools = {name for name, model in config.models.items() if constrains_tools(model.engine.args)}
        self.roles = Roles(config)

    async def __call__(self, shape: Shape, request: Request, reply: Reply) -> None:
        """Answer one request. Raises ProxyError where nothing has been dispatched."""
        received_at = time.time()
        check_headers(request.headers, self.config.proxy.access.allow)
        ask = read_ask(await request.body(), shape, allow=self.config.proxy.access.allow)
        check_counts(ask.body, self.config.proxy.limits)
        draft = await self._draft(ask, request, received_at)
        number = retry_number(request.headers)
        if number is None:
            await Exchange(self._shared, ask, draft, request, reply).run()
        else:
            await self._try(ask, draft, request, reply, number)

    async def _try(self, ask: Ask, draft: Draft, request: Request, reply: Reply, number: int) -> None:
        """Answer a request of a client that counts its retries: this is retry `number`."""
        who = draft.attribution
        key = key_of(ask.digest, who.run_id, who.role, request.headers)
        earlier = self.attempts.find(key, number) if number else None
        if earlier is not None:
            pause_s, event = beat_s(request.headers, exchange.HEARTBEAT_S), encode(empty_chunk(ask.shape, draft))
            beat = (pause_s, event) if draft.stream else None
            if await answer_from(self.attempts, earlier, number, request, reply, beat=beat):
                return
            self.attempts.supersede(earlier)
            draft = replace(draft, retry_of=earlier.call_id if earlier.recorded else None)
        elif number:
            draft = replace(draft, retry_of=await self._made_elsewhere(key, draft))
        attempt = self.attempts.begin(key, number, draft.call_id)
        reply.tap = attempt.tap
        made = Exchange(self._shared, ask, draft, request, reply, attempt=attempt)
        try:
            await made.run()
        finally:
            self.attempts.end(attempt, answered=made.answered, recorded=made.submitted)

    async def _made_elsewhere(self, key: Key, draft: Draft) -> str | None:
        """Look for a first attempt that this process knows nothing of."""
        since, known = time.time() - STORE_WINDOW_S, self.attempts.known(key)
        same = partial(self.store.find_attempt, project=draft.project, exclude=known)
        look = partial(same, draft.request_hash or "", draft.attribution.run_id, since)
        try:
            call_id = await asyncio.to_thread(look)
        except TraceStoreError as error:
            raise from_store(error) from error
        if call_id is not None:
            self.attempts.note_elsewhere(key, call_id)
        return call_id

    async def _draft(self, ask: Ask, request: Request, received_at: float) -> Draft:
        project = self.config.project if request.key is None else request.key.project
        placed = self.roles.place(request, ask.body, project)
        attribution, call_id = placed.attribution, new_id("call")
        model = self._model_of(ask, attribution.role)
        api = self.config.models[model].api
        ours = api is None and ask.shape is not EMBEDDINGS
        override = override_of(self.config.proxy.sampling, attribution.role) if ours else None
        try:
            purpose = await self.purposes.of(attribution.run_id, request.key)
        except TraceStoreError as error:
            raise from_store(error) from error
        return Draft(
            call_id=call_id,
            attribution=attribution,
            project=project,
            dissent=tuple(dissent(placed.claims, attribution, call_id)),
            model=model,
            requested_model=ask.model or model,
            body=ask.body,
            sampling=plan_sampling(
                ask.body, purpose=purpose, override=override, strict_tools=model in self._strict_tools
            ),
            n=ask.n,
            stream=ask.stream,
            received_at=received_at,
            endpoint=ask.shape.endpoint,
            request_hash=ask.digest,
            flaw=ask.flaw,
            outside=None if api is None else api.model,
            purpose=purpose,
            before=None if (held_by := self.config.held_by(model)) == model else held_by,
        )

    def _model_of(self, ask: Ask, role: str | None) -> str:
        """The role map names the weights that speak for a role; embeddings come from the model that is asked for."""
        requested = ask.model
        if ask.shape is EMBEDDINGS and requested is not None and requested in self.config.models:
            return requested
        return engine_of(self.config, role, requested)
