"""Server-sent events: an incremental parser that keeps the bytes, and an encoder.

Refuses nothing: chunk boundaries may fall anywhere, line ends may be LF, CRLF or CR, and events that carry no data
(comments, keep-alives) come through with their bytes so that a relay can pass them on unchanged.
Called by `exchange` on the engine's answer. Source: WHATWG HTML, "Server-sent events", section 9.2.6.
"""

import re
from dataclasses import dataclass

_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END = re.compile(rb"\r\n|\n|\r")
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `raw` is what arrived, terminator included; `data` joins its data lines, None where it has none."""

    raw: bytes
    data: bytes | None


class SSEParser:
    """Cuts a byte stream into events. Invariant: the concatenated `raw` of all events is the stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes, in order."""
        self._buffer += chunk
        events = []
        start = 0
        for match in _BLANK_LINE.finditer(self._buffer):
            end = match.end()
            if end == len(self._buffer) and self._buffer.endswith(b"\r"):
                break  # "\r\r" may be the head of "\r\r\n": wait for the next byte
            events.append(_event(bytes(self._buffer[start:end])))
            start = end
        del self._buffer[:start]
        return events

    def close(self) -> list[Event]:
        """Return what was left unterminated when the stream ended: one event or none."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return [_event(rest)] if rest else []


def encode(data: bytes) -> bytes:
    """Return `data` (one line) as an event, in the form that vLLM writes."""
    return b"data: " + data + b"\n\n"


def _event(raw: bytes) -> Event:
    if raw.startswith(b"data: ") and raw.endswith(b"\n\n") and raw.count(b"\n") == 2 and b"\r" not in raw:
        return Event(raw, raw[6:-2])
    lines = [line[5:].removeprefix(b" ") for line in _LINE_END.split(raw) if line.startswith(b"data:")]
    return Event(raw, b"\n".join(lines) if lines else None)
