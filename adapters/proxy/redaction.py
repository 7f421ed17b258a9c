"""What must not be written: patterns masked in everything that people said, before it reaches the store.

A call in which something was masked loses its tokens too (prompt ids, sampled ids, logprobs: they spell the same text)
and is quarantined as `redacted`: it is never trained. So does a call whose text cannot be looked through: a prompt of
token ids, an answer of which the client got only a part. The client's answer stays as it was. Masked are requests
(messages, tools, stop strings), answers, tool arguments (also inside JSON that stands in a string), the inputs, outputs
and errors of spans, calls and runs; not ids, roles, names of nodes, rewards, the tasks that an operator puts, nor what
is in pictures and sound. `RedactingStore` is the store that the proxy writes through, so that whatever is added to the
proxy writes masked. Called by `app`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from tracegrad.tracestore.config import Redaction
from tracegrad.tracestore.records import Call, Choice, EndedBy, Json, Run, RunStatus, Span
from tracegrad.tracestore.store import Store

REDACTED = "redacted"
"""The reason of the quarantine."""
TOO_DEEP = "[redacted: nested too deeply to look through]"
TOKEN_IDS = "[redacted: token ids]"
_PROMPTS = ("prompt", "input")
"""Fields of completions and embeddings that may hold token ids in place of text."""
_UNSEEN = "hidden_tool_calls"
"""The flag of a choice whose tokens say more than its message."""


class Redactor:
    """The patterns, compiled. Thread-safe."""

    def __init__(self, redactions: Sequence[Redaction]) -> None:
        literal = str.maketrans({"\\": r"\\"})
        self._patterns = [(re.compile(one.pattern), one.replacement.translate(literal)) for one in redactions]

    def call(self, call: Call) -> Call:
        """Return the call as it may be written; the same object where there is nothing to mask."""
        span = call.attribution.span
        masked = replace(
            call,
            attribution=call.attribution if span is None else replace(call.attribution, span=self.span(span)),
            request=self._value(_without_ids(call.request)),
            requested=self._value(call.requested),
            effective=self._value(call.effective),
            choices=tuple(replace(choice, message=self._value(choice.message)) for choice in call.choices),
            error=self._value(call.error),
        )
        if masked == call and not any(_UNSEEN in choice.flags for choice in call.choices):
            return call
        choices = tuple(_without_tokens(choice) for choice in masked.choices)
        return replace(masked, prompt_ids=None, choices=choices, quarantine=REDACTED)

    def span(self, span: Span) -> Span:
        """Return the span as it may be written."""
        return replace(
            span, input=self._value(span.input), output=self._value(span.output), error=self._value(span.error)
        )

    def text(self, text: str) -> str:
        """Return `text` with every match masked, the patterns in their order."""
        for pattern, replacement in self._patterns:
            text = pattern.sub(replacement, text)
        return text

    def _value(self, value: Any) -> Any:
        try:
            return self._masked(value)
        except RecursionError:
            return {"redacted": TOO_DEEP} if isinstance(value, Mapping) else TOO_DEEP

    def _masked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._masked_string(value)
        if isinstance(value, Mapping):
            return {self.text(name): self._masked(held) for name, held in value.items()}
        if isinstance(value, list | tuple):
            return [self._masked(held) for held in value]
        return value

    def _masked_string(self, text: str) -> str:
        """Mask text; where it is JSON, mask what the JSON says: escapes would hide a match (`caf\\u00e9`)."""
        if text[:1] in ("{", "["):
            try:
                said = msgspec.json.decode(text)
            except (msgspec.MsgspecError, RecursionError):
                return self.text(text)
            masked = self._masked(said)
            if masked != said:
                return self.text(msgspec.json.encode(masked).decode())
        return self.text(text)


class RedactingStore(Store):
    """A store whose writes are masked. Reads, and the rest, are those of `inner`."""

    def __init__(self, inner: Store, redactor: Redactor) -> None:
        super().__init__(inner._db)
        self._redactor = redactor

    def append_calls(self, calls: Sequence[Call]) -> None:
        """As `Calls.append_calls`. The committer's thread does the masking, not the event loop."""
        super().append_calls([self._redactor.call(call) for call in calls])

    def put_spans(self, spans: Sequence[Span], project: str = "default") -> None:
        """As `Spans.put_spans`."""
        super().put_spans([self._redactor.span(span) for span in spans], project)

    def end_run(self, run_id: str, *, status: RunStatus, ended_by: EndedBy, error: str | None = None) -> Run:
        """As `Runs.end_run`."""
        masked = None if error is None else self._redactor.text(error)
        return super().end_run(run_id, status=status, ended_by=ended_by, error=masked)


def _without_ids(request: Json) -> Json:
    hidden = {name: TOKEN_IDS for name in _PROMPTS if _holds_ids(request.get(name))}
    return {**request, **hidden} if hidden else request


def _holds_ids(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(held, int) or _holds_ids(held) for held in value)


def _without_tokens(choice: Choice) -> Choice:
    return replace(choice, token_ids=(), logprobs=None)
