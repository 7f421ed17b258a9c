"""`GET /v1/models` and `/v1/models/{id}`: the cards that the engines write themselves, adapters included.

An id is a model that an engine serves: a role, or a name that merely is routed somewhere, is none. A model none of
whose engines is up has a card of ours, which says what is wrong; so has one of an outside API. Refuses (404, with near
misses) an id that no engine lists; an error of an engine is passed on. Called by `app`.
"""

import msgspec

from tracegrad.adapters.proxy.endpoints import CHAT
from tracegrad.adapters.proxy.engine_errors import openai_error
from tracegrad.adapters.proxy.errors import EngineUnreachable, UnknownModel
from tracegrad.adapters.proxy.routing import near_misses
from tracegrad.adapters.proxy.upstream import NotSent, Upstream
from tracegrad.adapters.proxy.wire import JSON_HEADERS, Reply
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.publishes import REHEARSED

PREFIX = "/v1/models/"


class _List(msgspec.Struct):
    data: list[msgspec.Raw] = []


class _Card(msgspec.Struct):
    id: str


class ModelCards:
    """The engines' model lists, read anew for each request: adapters come and go."""

    def __init__(self, config: Config, upstream: Upstream) -> None:
        self._config = config
        self._upstream = upstream

    async def answer(self, path: str, reply: Reply) -> None:
        """Answer `/v1/models`, or `/v1/models/{id}`: what follows is the id, slashes included.

        Raises:
            UnknownModel: no engine lists that id.
            EngineTimeout: an engine that had to be asked does not answer.
        """
        wanted = path.removeprefix(PREFIX) if path.startswith(PREFIX) else None
        found: list[msgspec.Raw] = []
        for model in self._to_ask(wanted):
            if not self._upstream.pools[model].holds:
                found.append(_card_of_ours(model, None))
                continue
            try:
                answer = await self._upstream.get(model, "v1/models")
                body = await answer.read()
            except (NotSent, EngineUnreachable):
                found.append(_card_of_ours(model, self._upstream.pools[model].complaint))
                continue
            if answer.status != 200:
                await reply.whole(answer.status, JSON_HEADERS, openai_error(answer.status, body, CHAT))
                return
            found += _cards(model, body)
        if wanted is None:
            await reply.whole(200, JSON_HEADERS, msgspec.json.encode({"object": "list", "data": found}))
        else:
            await reply.whole(200, JSON_HEADERS, bytes(_pick(wanted, found)))

    def _to_ask(self, wanted: str | None) -> list[str]:
        """One engine where the id names its model, so that another one's outage does not matter; else each once."""
        models = self._config.models
        if wanted is not None and wanted in models:
            return [wanted]
        return [name for name in models if self._config.held_by(name) == name]


def _cards(model: str, body: bytes) -> list[msgspec.Raw]:
    """Return the cards of an engine, but for what is only there to be probed."""
    try:
        cards = msgspec.json.decode(body, type=_List).data
        return [card for card in cards if not msgspec.json.decode(card, type=_Card).id.endswith(REHEARSED)]
    except msgspec.MsgspecError as error:
        raise EngineUnreachable(
            f"the engine of model {model!r} sent no list of models: {error}", code="engine_bad_answer"
        ) from error


def _card_of_ours(model: str, complaint: str | None) -> msgspec.Raw:
    """`complaint` says why the engine's own card cannot be had, None where there is no engine of ours."""
    card = {"id": model, "object": "model", "created": 0, "owned_by": "outside" if complaint is None else "tracegrad"}
    return msgspec.Raw(msgspec.json.encode(card if complaint is None else {**card, "unavailable": complaint}))


def _pick(wanted: str, cards: list[msgspec.Raw]) -> msgspec.Raw:
    by_id = {msgspec.json.decode(card, type=_Card).id: card for card in cards}
    if wanted in by_id:
        return by_id[wanted]
    raise UnknownModel(f"the model {wanted!r} does not exist; {near_misses(wanted, by_id)}", param="model")
