"""Who may do what here: API keys with scopes, checked before a body is read.

    nothing  GET /health
    call     /v1/... and /langsmith/...; runs and spans under /tracegrad/v1 (the hook in an app opens and ends runs)
    reward   rewards, and feedback under /langsmith
    read     every other GET under /tracegrad/v1, and /metrics
    train    tasks and groups: what is going to be sampled and compared
    admin    whatever is not listed, so that a new path is closed until somebody lists it

A key comes as `Authorization: Bearer tg-...` or `x-api-key: tg-...`; it never goes to the engine, into the store or
into a log. What a key may do is remembered for `KEY_CACHE_S`: a revoked key works no longer than that. Keys that are
not known are never remembered, so a new key works at once. Refuses (401) a request without a valid key, (403) a key
without the scope, (503) everybody while keys cannot be looked up. Called by `app`; `command` and `up`
ask `check_address`.
"""

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Mapping

from tracegrad.adapters.proxy.errors import InvalidKey, MissingScope, from_store
from tracegrad.tracestore.config import ProxyConfig
from tracegrad.tracestore.errors import ConfigError, TraceStoreError
from tracegrad.tracestore.keys import KEY_PREFIX, hash_key
from tracegrad.tracestore.records import ApiKey, KeyScope
from tracegrad.tracestore.store import Store

KEY_CACHE_S = 5.0
"""How long a revoked key may still work."""
CAPACITY = 4096
MAX_KEY_CHARS = 128
KEY_HEADERS = (b"authorization", b"x-api-key")
_PREFIX = KEY_PREFIX.encode()
_OURS = "/tracegrad/v1/"
FEEDBACK = "/langsmith/feedback"


def keys_wanted(config: ProxyConfig) -> bool:
    """Whether requests need a key: as configured, and with `auto` wherever other machines can reach the proxy."""
    keys = config.access.keys
    return not is_loopback(config.host) if keys == "auto" else keys in ("on", True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost may be anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(config: ProxyConfig, *, allow_remote: bool = False) -> None:
    """Refuse to let other machines in without API keys, unless that is meant.

    Raises:
        ConfigError: they would be let in.
    """
    if not (is_loopback(config.host) or keys_wanted(config) or allow_remote):
        raise ConfigError(
            f"{config.host} can be reached from other machines and API keys are off; set proxy.access.keys to auto "
            "(and make a key with `tracegrad keys create`), listen on 127.0.0.1, "
            "or say `tracegrad proxy --allow-remote`"
        )


def scope_for(method: str, path: str) -> KeyScope | None:
    """Return the scope that a request needs, None where it needs no key."""
    reads = method in ("GET", "HEAD")
    head = path.removeprefix(_OURS).split("/", 1)[0] if path.startswith(_OURS) else None
    needed: KeyScope | None = "admin"
    if path == "/health":
        needed = None
    elif path == FEEDBACK or path.startswith(FEEDBACK + "/"):
        needed = "reward"
    elif path.startswith(("/v1/", "/langsmith/")):
        needed = "call"
    elif path == "/metrics" or (head is not None and reads):
        needed = "read"
    elif head == "rewards":
        needed = "reward"
    elif head in ("tasks", "groups"):
        needed = "train"
    elif head in ("runs", "spans"):
        needed = "call"
    return needed


def is_key(value: bytes) -> bool:
    """Whether a header's value holds a key of ours, valid or not."""
    return _text_of(value) is not None


class Access:
    """The door. `wanted` False lets everybody in, with or without a key."""

    def __init__(self, store: Store, *, wanted: bool) -> None:
        self._store = store
        self._wanted = wanted
        self._known: OrderedDict[str, tuple[ApiKey, float]] = OrderedDict()
        self._asking: dict[str, asyncio.Future[ApiKey | None]] = {}

    async def admit(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> ApiKey | None:
        """Return the key of a request that may go on; None where it needs none.

        A valid key says where calls belong also where none is needed; one that is not is then passed over.

        Raises:
            InvalidKey: a key is needed and none that is valid came with the request.
            MissingScope: the key may not do this.
            StoreDown: keys cannot be looked up.
        """
        needed = scope_for(method, path)
        text = next((text for name in KEY_HEADERS if (text := _text_of(headers.get(name, b"")))), None)
        if needed is None or not (self._wanted or text):
            return None
        key = await self._look_up(text) if text else None
        if not self._wanted:
            return key
        if key is None:
            raise InvalidKey(_why_not(text, headers))
        if not key.may(needed):
            raise MissingScope(
                f"{method} {path} needs the scope {needed!r}, and the key {key.key_id} has {', '.join(key.scopes)}; "
                f"make one with `tracegrad keys create --scope {needed}`"
            )
        return key

    async def _look_up(self, text: str) -> ApiKey | None:
        """Return a valid key. Several requests with one key ask the store once."""
        if len(text) > MAX_KEY_CHARS:
            return None
        key_hash = hash_key(text)
        key, asked_at = self._known.get(key_hash, (None, 0.0))
        if key is not None and time.monotonic() - asked_at < KEY_CACHE_S:
            self._known.move_to_end(key_hash)
            return key
        asking = self._asking.get(key_hash)
        if asking is None:
            asking = self._asking[key_hash] = asyncio.ensure_future(self._ask(key_hash))
            asking.add_done_callback(lambda _: self._asking.pop(key_hash))
        return await asyncio.shield(asking)

    async def _ask(self, key_hash: str) -> ApiKey | None:
        asked_at = time.monotonic()
        self._known.pop(key_hash, None)
        try:
            key = await asyncio.to_thread(self._store.find_key, key_hash)
        except TraceStoreError as error:
            raise from_store(error) from error
        if key is None or key.revoked_at is not None:
            return None
        self._known[key_hash] = key, asked_at
        while len(self._known) > CAPACITY:
            self._known.popitem(last=False)
        return key


def _text_of(value: bytes) -> str | None:
    scheme, _, rest = value.strip().partition(b" ")
    credential = rest.strip() if scheme.lower() == b"bearer" else value.strip()
    return credential.decode("latin-1") if credential.startswith(_PREFIX) else None


def _why_not(text: str | None, headers: Mapping[bytes, bytes]) -> str:
    if text is not None:
        wrong = "this key is unknown or revoked"
    elif any(name in headers for name in KEY_HEADERS):
        wrong = f"that is no key of this proxy (they begin with {KEY_PREFIX})"
    else:
        wrong = "this proxy needs an API key"
    return (
        f"{wrong}; make one with `tracegrad keys create --scope call` and send it as Authorization: Bearer "
        "(OPENAI_API_KEY), or x-api-key"
    )
