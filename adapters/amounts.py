"""Spans of time, moments and sizes as people write them on a command line: `30d`, `2026-01-31`, `10GB`.

Refuses what could be meant in two ways (a bare number). Called by click, as types of the commands' options.
"""

import re
from datetime import datetime

import click

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def age(text: str) -> float:
    """Return the seconds of `90s`, `30m`, `12h`, `30d` or `4w`. Raises click.BadParameter."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2] not in _SECONDS:
        raise click.BadParameter(f"{text!r} is no age: write 12h, 30d or 4w")
    return float(found[1]) * _SECONDS[found[2]]


def moment(text: str) -> float:
    """Return the Unix seconds of an ISO date or time; without a zone, this machine's. Raises click.BadParameter."""
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no date: write 2026-01-31 or 2026-01-31T12:00") from error


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
