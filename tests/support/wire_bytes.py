"""What must be levelled before the bytes of two answers to one request can be compared."""

import json
import re

SAME_ID = {"x-request-id": "same"}
"""Gives both answers one completion id."""


def timeless(body: bytes) -> bytes:
    """Return an answer without its creation time."""
    return re.sub(rb'"created":\d+', b'"created":0', body)


def without_fingerprints(body: bytes) -> bytes:
    """Return a stream without fingerprints: with n > 1 those of the earlier choices are a listed exception."""
    return re.sub(rb',"system_fingerprint":"[^"]*"', b"", body)


def without_silent_chunks(body: bytes) -> bytes:
    """Return a stream without the chunks whose delta is empty and which finish nothing."""
    return b"\n\n".join(event for event in body.split(b"\n\n") if not _is_silent(event))


def _is_silent(event: bytes) -> bool:
    data = event.removeprefix(b"data: ")
    choices = json.loads(data).get("choices") if data.startswith(b"{") else None
    return bool(choices) and all(not choice["delta"] and choice["finish_reason"] is None for choice in choices)
