"""The engines of a LoRA adapter: those of its base, usable once they serve the adapter's live version.

An engine has one mark for its weights, which is the base's; what it serves of an adapter it says in its list of models,
as the folder that it loaded. One that restarted without the adapter, or with another version of it, is behind (law 8).
Refuses nothing. Called by `upstream`.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from tracegrad.adapters.proxy.engines import PROBE_TIMEOUT, Engine, EngineState, Pool, said_by
from tracegrad.tracestore.errors import TraceStoreError


class AdapterPool(Pool):
    """As `Pool`; `folder_of` returns the folder of a version, from the store."""

    def __init__(self, *pool: Any, folder_of: Callable[[int], str], **rest: Any) -> None:
        super().__init__(*pool, **rest)
        self._folder_of = folder_of
        self._folders: dict[int, str] = {}

    async def _compare(self, engine: Engine, wanted: int) -> tuple[EngineState, str]:
        try:
            folder = await self._folder(wanted)
            async with self._session.get(engine.url / "v1/models", timeout=PROBE_TIMEOUT) as answer:
                body = await answer.read()
        except TraceStoreError:
            return "up", ""  # nobody can say what it should serve: `hold` refuses calls while the store is away
        except (aiohttp.ClientError, OSError) as error:
            return "down", f"cannot be reached ({said_by(error)}); is it running?"
        found = _folder_in(body, self.model)
        if found == folder:
            engine.heard()
            return "up", ""
        what = f"serves {self.model!r} from {found or 'nowhere'} while version {wanted} ({folder}) is to be served"
        return "behind", f"{what}; it is loaded at the next publish, or when `tracegrad engine` restarts it"

    async def _folder(self, version: int) -> str:
        if version not in self._folders:
            self._folders[version] = await asyncio.to_thread(self._folder_of, version)
        return self._folders[version]


class _Card(msgspec.Struct):
    id: str
    root: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []


def _folder_in(body: bytes, model: str) -> str | None:
    try:
        return next((card.root for card in msgspec.json.decode(body, type=_Cards).data if card.id == model), None)
    except msgspec.MsgspecError:
        return None
