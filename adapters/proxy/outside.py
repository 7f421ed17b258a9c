"""An outside API in the place of an engine: somebody else's weights behind the same wire.

Its credential comes from the environment variable that the configuration names, and nothing of the client's own headers
goes there but what describes the body. It is not watched, not held for and not published to: when it cannot be reached
the client is told so at once. Refuses (ConfigError, at start) a variable that is not set. Called by `app`, `upstream`.
"""

from collections.abc import Iterable, Mapping

import aiohttp
from yarl import URL

from tracegrad.adapters.proxy.engines import Engine, EngineState, Pool
from tracegrad.tracestore.config import ApiConfig, Config
from tracegrad.tracestore.errors import ConfigError

_SENT = (b"content-type", b"accept")
_KEPT_BACK = (b"set-cookie", b"openai-organization", b"openai-project", b"alt-svc", b"strict-transport-security")
"""Of its answers: what concerns the account and the connection, which are ours."""


class OutsideApi(Engine):
    """One API with our key for it."""

    def __init__(self, api: ApiConfig, key: str) -> None:
        super().__init__(api.url)
        self._authorization = f"Bearer {key}".encode()

    def target(self, path: str) -> URL:
        """Return the URL of an OpenAI path: ours begin with v1/, and so does the API's own URL."""
        return self.url / path.removeprefix("v1/")

    def headers(self, of_client: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return what is sent: never the client's credentials, cookies or names."""
        ours = [(b"authorization", self._authorization), (b"user-agent", b"tracegrad")]
        return [(name, value) for name, value in of_client if name.lower() in _SENT] + ours

    def answered(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers of its answer that the client gets."""
        return [header for header in headers if header[0] not in _KEPT_BACK]


class OutsidePool(Pool):
    """A pool of one that always takes calls: whether it works is its owner's affair."""

    holds = False

    def __init__(self, model: str, api: OutsideApi, session: aiohttp.ClientSession) -> None:
        super().__init__(model, [api], session)

    async def confirm(self, engine: Engine) -> bool:
        """It serves no version of ours."""
        return True

    def lost(self, engine: Engine, detail: str, state: EngineState = "down") -> None:
        """Nothing is marked: the next call tries again."""

    async def examine(self) -> None:
        """It is not asked for its health: that would be a request that somebody pays for."""


def outside_apis(config: Config, environ: Mapping[str, str]) -> dict[str, OutsideApi]:
    """Return the outside APIs by model, each with its key.

    Raises:
        ConfigError: a named environment variable is not set.
    """
    apis = {}
    for name, model in config.models.items():
        if model.api is None:
            continue
        key = environ.get(model.api.key_env, "")
        if not key:
            raise ConfigError(
                f"models.{name}.api.key_env names the environment variable {model.api.key_env}, which is not set: "
                "start the proxy with it"
            )
        apis[name] = OutsideApi(model.api, key)
    return apis
