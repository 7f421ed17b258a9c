"""Times as people write them, everywhere: an ISO time, or an age such as 30m, 2h, 7d.

Refuses anything else. Called by `config`, `rules`, `tracegrad train`, and `amounts` for all other commands.
"""

import re
from datetime import datetime

from tracegrad.tracestore.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def moment_of(text: str, what: str, now: float | None = None) -> float:
    """Return the Unix time that `text` says; an age counts back from `now`, and is refused without one.

    Raises:
        ConfigError: it is neither an age nor a time; `what` names it.
    """
    age = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip())
    if age is not None and now is not None:
        return now - float(age[1]) * _UNITS[age[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        ages = "" if now is None else "no age (30m, 2h, 7d) and "
        raise ConfigError(f"{what} {text!r} is {ages}no ISO time (2026-01-31T12:00)") from error


def iso_time(seconds: float) -> str:
    """Return a Unix time as ISO text with its zone; `moment_of` reads it back."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat()
