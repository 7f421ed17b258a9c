"""What must be levelled before the bytes of two answers to one request can be compared."""

import json
import re
from typing import Any

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


def merged(body: bytes) -> dict[str, Any]:
    """Return what a stream says however it is cut into chunks: a busy engine puts several tokens into one.

    Texts, arguments and tokens are joined for each choice; of what chunks repeat, the last stays.
    """
    told: dict[str, Any] = {"done": body.endswith(b"data: [DONE]\n\n"), "text": {}, "last": {}}
    for event in body.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            continue
        chunk = json.loads(event[6:])
        told["last"].update({name: value for name, value in chunk.items() if name not in ("created", "choices")})
        for choice in chunk["choices"]:
            said = choice["delta"] if "delta" in choice else {"text": choice["text"]}
            if choice["finish_reason"] is not None:
                told["last"][choice["index"]] = (choice["finish_reason"], choice["stop_reason"])
            _join(told["text"].setdefault(choice["index"], {}), said)
            tokens = told["text"][choice["index"]].setdefault("tokens", [])
            logprobs = choice["logprobs"] or {}
            tokens += [token["token"] for token in logprobs.get("content") or ()] + (logprobs.get("tokens") or [])
    return told


def _join(texts: dict[str, Any], said: dict[str, Any]) -> None:
    for name, value in said.items():
        if isinstance(value, str):
            texts[name] = texts.get(name, "") + value
    for call in said.get("tool_calls") or ():
        for name, value in (call.get("function") or {}).items():
            key = f"{name} of call {call['index']}"
            texts[key] = texts.get(key, "") + value
