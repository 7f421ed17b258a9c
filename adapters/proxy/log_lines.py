"""The proxy's log lines, as text or as one JSON object each.

A line about a call carries the call's facts (`about_call`, `facts`): ids, role, model. As text they follow the message
as `name=value`; as JSON they are members beside `time`, `level`, `logger`, `message`. Prompts and answers are never
logged. Standard library only. Set up by `command`; the facts are given by whoever logs.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from tracegrad.tracestore.records import Attribution, Call

LogFormat = Literal["text", "json"]
_FACTS = "facts"


def facts(**known: Any) -> dict[str, Any]:
    """Return `extra=` for a log call: the facts that are known."""
    return {_FACTS: {name: value for name, value in known.items() if value is not None}}


def of_call(call_id: str, attribution: Attribution, model: str) -> dict[str, Any]:
    """Return `extra=` for a line about a call that is on its way."""
    return facts(call_id=call_id, run_id=attribution.run_id, role=attribution.role, model=model)


def about_call(call: Call) -> dict[str, Any]:
    """Return `extra=` for the line that says how a call ended."""
    timing, who = call.timing, call.attribution
    return facts(
        call_id=call.call_id,
        run_id=who.run_id,
        role=who.role,
        model=call.model,
        endpoint=call.endpoint,
        status=call.status,
        stream=call.stream,
        version=call.version_dispatched,
        prompt_tokens=None if call.prompt_ids is None else len(call.prompt_ids),
        sampled_tokens=sum(len(choice.token_ids) for choice in call.choices),
        seconds=round(timing.completed_at - timing.received_at, 4),
        held_s=round(timing.dispatched_at - timing.received_at, 4),
        quarantine=call.quarantine,
        retry_of=call.retry_of,
    )


class JsonLines(logging.Formatter):
    """One JSON object a line. `always` stands in each of them."""

    def __init__(self, **always: str) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. A value that JSON does not know is written as its text."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._always,
            **getattr(record, _FACTS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """Time, level, message, then the facts; `always` first among them."""

    def __init__(self, **always: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._always = always

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line's first part; an exception's traceback follows it."""
        known = {**self._always, **getattr(record, _FACTS, {})}
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in known.items())])


def set_up(form: LogFormat, *, verbose: bool, worker: str | None = None, stream: TextIO | None = None) -> None:
    """Write this process's log to `stream` (standard error): warnings, and with `verbose` a line for each call."""
    always = {} if worker is None else {"worker": worker}
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(**always) if form == "json" else TextLines(**always))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("tracegrad").setLevel(logging.INFO if verbose else logging.WARNING)
