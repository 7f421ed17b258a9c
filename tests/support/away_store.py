"""A store that is away for a moment, for some of what it does."""

from typing import Any

from tracegrad.tracestore.errors import StoreUnavailable
from tracegrad.tracestore.store import Store


class AwayStore:
    """A store whose `methods` fail while it is `away`."""

    def __init__(self, store: Store, *methods: str) -> None:
        self._store, self._methods = store, methods
        self.away = True

    def __getattr__(self, name: str) -> Any:
        return self._fail if self.away and name in self._methods else getattr(self._store, name)

    def _fail(self, *_: Any, **__: Any) -> None:
        raise StoreUnavailable("gone for a moment")
