"""Which physical model answers: the role map first, then the requested name, then the only model there is.

Refuses (404, with near misses) a name that nothing serves. Called by `chat`; `near_misses` by
`model_cards` too.
"""

import difflib
from collections.abc import Iterable

from tracegrad.adapters.proxy.errors import UnknownModel
from tracegrad.tracestore.config import Config


def engine_of(config: Config, role: str | None, requested: str | None) -> str:
    """Return the model of the configuration that serves a call of `role` that asked for `requested`.

    Raises:
        UnknownModel: the role map says nothing, no model has that name, and there is not exactly one model.
    """
    if role is not None and (mapped := config.model_of(role)) is not None:
        return mapped
    if requested is not None and requested in config.models:
        return requested
    if (default := config.model_of(None)) is not None:
        return default
    if len(config.models) == 1:
        return next(iter(config.models))
    hint = near_misses(requested or "", config.models)
    raise UnknownModel(
        f"the model {requested!r} does not exist, and the role {role!r} maps to none; {hint}", param="model"
    )


def near_misses(name: str, known: Iterable[str]) -> str:
    """Return what to say of a name that is not known: those like it, else all there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names) or 'none'}"
