"""Any value of an app as plain JSON of bounded size: what a span keeps as its input or output.

Messages lose what is not content (ids, usage, response metadata). What is not JSON becomes its fields or its repr. A
value that would take more than `LIMIT_CHARS` is cut, and says so where it was cut. Never raises on a value, never
changes one, never holds on to one. Called by `span_notes` in the app's process and by `proxy.langsmith_spans`.
"""

import dataclasses
import math
from collections.abc import Mapping, Set
from enum import Enum
from itertools import islice
from typing import Any

LIMIT_CHARS = 64 * 1024
_DEEPEST = 12
_LONGEST_REPR = 500
_MESSAGE_FIELDS = ("type", "role", "name", "content", "tool_calls", "tool_call_id", "status", "artifact")
_ALWAYS = ("type", "content")
_MESSAGE_CLASSES = {
    "AIMessage": "ai",
    "ChatMessage": "chat",
    "HumanMessage": "human",
    "SystemMessage": "system",
    "ToolMessage": "tool",
}
"""LangChain for JavaScript posts `{lc: 1, type: "constructor", id: [..., class], kwargs: fields}`."""


def plain(value: Any, *, limit_chars: int = LIMIT_CHARS) -> Any:
    """Return `value` as JSON types only, of about `limit_chars` at most."""
    return _Reader(limit_chars).read(value, 0)


class _Reader:
    """Walks one value; `left` is how many characters may still be written."""

    def __init__(self, limit_chars: int) -> None:
        self.left = limit_chars

    def read(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool | int):
            self.left -= 4
            return value
        if isinstance(value, float):
            self.left -= 8
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, str):
            return self._text(value.value if isinstance(value, Enum) else value)
        try:
            return self._composite(value, depth) if depth < _DEEPEST else self._repr(value)
        except Exception:  # noqa: BLE001 - whatever a foreign object does when it is looked at, the app goes on
            return f"<{type(value).__name__}>"

    def _composite(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            value = constructed_message(value) or value
            return self._mapping(_message(value) if _is_message(value) else value, depth)
        if isinstance(value, list | tuple | Set):
            return self._list(value, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._mapping({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, depth)
        fields = getattr(type(value), "model_fields", None)  # pydantic, and with it LangChain's messages
        if isinstance(fields, Mapping):
            found = {name: getattr(value, name) for name in fields}
            return self._mapping(_message(found) if _is_message(found) else found, depth)
        return self._repr(value)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, item in value.items():
            if self.left <= 0:
                made["[cut]"] = f"{len(value) - len(made)} more fields"
                break
            name = key if isinstance(key, str) else str(key)
            self.left -= len(name) + 4
            made[name] = self.read(item, depth + 1)
        return made

    def _list(self, value: Any, depth: int) -> list[Any]:
        made: list[Any] = []
        for item in islice(value, len(value)):
            if self.left <= 0:
                made.append(f"[cut: {len(value) - len(made)} more]")
                break
            made.append(self.read(item, depth + 1))
        return made

    def _text(self, value: str) -> str:
        room = max(self.left, 0)
        self.left -= len(value) + 2
        return value if len(value) <= room else f"{value[:room]}[cut: {len(value) - room} more characters]"

    def _repr(self, value: Any) -> str:
        said = repr(value)
        return self._text(said if len(said) <= _LONGEST_REPR else f"{said[:_LONGEST_REPR]}[cut]")


def constructed_message(value: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """Return the fields of a message that LangChain wrote as a call of its constructor; None for anything else."""
    fields, path = value.get("kwargs"), value.get("id")
    if value.get("type") != "constructor" or not isinstance(fields, Mapping) or not isinstance(path, list) or not path:
        return None
    kind = _MESSAGE_CLASSES.get(str(path[-1]).removesuffix("Chunk"))
    return None if kind is None else {"additional_kwargs": {}, **fields, "type": kind}


def _is_message(fields: Mapping[Any, Any]) -> bool:
    return "content" in fields and "type" in fields and ("response_metadata" in fields or "additional_kwargs" in fields)


def _message(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """The content of a LangChain message: what it says, calls, and answers to."""
    kept = {name: fields.get(name) for name in _MESSAGE_FIELDS if name in _ALWAYS or fields.get(name)}
    if kept.get("status") == "success":
        del kept["status"]
    return kept
