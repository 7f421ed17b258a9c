"""Times and sizes as people write them on a command line: `30d`, `2026-01-31`, `10GB`.

Refuses what could be meant in two ways (a bare number). Called by click, as types of the commands' options.
"""

import re
import time

import click

from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.moments import moment_of

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def moment(text: str) -> float:
    """Return the Unix seconds of an age (so long before now) or an ISO time. Raises click.BadParameter."""
    try:
        return moment_of(text, "the time", time.time())
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


def size(text: str) -> int:
    """Return the bytes of `500MB`, `10GB` (powers of ten) or `10GiB` (of two). Raises click.BadParameter."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2].upper() not in _BYTES:
        raise click.BadParameter(f"{text!r} is no size: write 500MB, 10GB or 10GiB")
    return int(float(found[1]) * _BYTES[found[2].upper()])


def in_bytes(count: int) -> str:
    """Return a number of bytes for people."""
    shown = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if shown < 1_000:
            return f"{shown:.0f} {unit}" if unit == "B" else f"{shown:.1f} {unit}"
        shown /= 1_000
    return f"{shown:.1f} TB"
