"""From the engine's answer, plain or streamed, to the `Call` that the store keeps.

Exactness is judged here (law 4): every choice has ids and logprobs of one length, no logprob is missing or NaN, and
the counts agree with `usage`. What fails is quarantined with a short constant reason (details in `error`), stored
without the doubtful logprobs, and still answered. Nothing is invented: a missing thing stays None. The text of a
completion stands in its message as `content`. No I/O. Called by `exchange`.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import msgspec

from tracegrad.adapters.proxy.capture import SEVERAL_PROMPTS
from tracegrad.adapters.proxy.kept import MISSING_LOGPROB, Set, flags_with, sets_of_chat, sets_of_completion
from tracegrad.adapters.proxy.sampling import SAMPLING_FIELDS, Sampling
from tracegrad.adapters.proxy.version_spans import COMMENT, Judged, Told, judge, read_told
from tracegrad.tracestore.records import (
    Attribution,
    Call,
    CallStatus,
    CallTiming,
    Choice,
    Continues,
    Endpoint,
    Json,
    LateAttribution,
    Purpose,
)

REASONING_HIDDEN = "reasoning hidden"
_NULL = msgspec.Raw(b"null")


class _Token(msgspec.Struct):
    logprob: float | None = None
    top_logprobs: msgspec.Raw = _NULL


class _Logprobs(msgspec.Struct):
    """Of chat (`content`) or of a completion (`token_logprobs`)."""

    content: list[_Token] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: msgspec.Raw = _NULL


class _Choice(msgspec.Struct):
    index: int = 0
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Answer(msgspec.Struct):
    """The part of vLLM's answer (or stream chunk) that is recorded; unknown fields are passed over.

    The prompt's ids stand here for chat, in the choices for completions.
    """

    id: str | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None
    prompt_token_ids: list[int] | None = None
    error: msgspec.Raw = _NULL

    @property
    def failed(self) -> bool:
        """Whether this is an error instead of an answer."""
        return bytes(self.error) != b"null"


_decode_answer = msgspec.json.Decoder(Answer).decode


def read_answer(data: bytes) -> Answer:
    """Decode an answer or chunk. vLLM writes NaN as `null` in chunks, which comes out as None.

    Raises:
        msgspec.MsgspecError: `data` is no such answer.
    """
    return _decode_answer(data)


@dataclass(slots=True)
class Sampled:
    """One choice as it comes in. `logprobs` holds None where the engine gave no number, `kept` where no set is known.

    `asked`: it was asked for top logprobs, so that `kept` is read.
    """

    index: int
    asked: bool = False
    token_ids: list[int] | None = None
    logprobs: list[float | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    message: dict[str, Any] = field(default_factory=dict)
    kept: list[Set | None] = field(default_factory=list)

    def extend(self, choice: _Choice) -> None:
        """Add what one answer or one chunk says of this choice."""
        if choice.token_ids is not None:
            if self.token_ids is None:
                self.token_ids = []
            self.token_ids.extend(choice.token_ids)
        if choice.logprobs is not None:
            self._extend_logprobs(choice.logprobs)
        self.finish_reason = choice.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if choice.stop_reason is None else choice.stop_reason
        if choice.message is not None:
            self.message = choice.message
        if choice.delta:
            merge_delta(self.message, choice.delta)
        if choice.text is not None:
            merge_delta(self.message, {"content": choice.text})

    def _extend_logprobs(self, logprobs: _Logprobs) -> None:
        if logprobs.content is not None:
            values = [token.logprob for token in logprobs.content]
            if self.asked:
                self.kept += sets_of_chat(token.top_logprobs for token in logprobs.content)
        elif logprobs.token_logprobs is not None:
            values = logprobs.token_logprobs
            if self.asked:
                self.kept += sets_of_completion(logprobs.top_logprobs)
        else:
            return
        if self.logprobs is None:
            self.logprobs = []
        self.logprobs.extend(values)

    def frozen(self, flags: tuple[str, ...], *, one_tool_call: bool) -> Choice:
        """Return the record; logprobs only where they are exact. `one_tool_call`: the engine cut any further ones."""
        ids = tuple(self.token_ids or ())
        logprobs = _numbers(self.logprobs or []) if _flaw(self) in (None, "no finish reason") else None
        kept = None if logprobs is None else self._known_sets(ids)
        flags = flags_with(flags, kept)
        if isinstance(self.stop_reason, str):
            flags = (*flags, "stop_string")
        if self.message.get("reasoning") or self.message.get("reasoning_content"):
            flags = (*flags, "reasoning")
        if one_tool_call and self.message.get("tool_calls"):
            flags = (*flags, "hidden_tool_calls")
        return Choice(
            index=self.index,
            token_ids=ids,
            logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=self.finish_reason,
            message=self.message,
            flags=flags,
            kept_ids=kept,
        )

    def _known_sets(self, ids: tuple[int, ...]) -> tuple[Set, ...] | None:
        """Return the kept sets where each token has one with itself in it: else none of them says anything."""
        known = tuple(each for token, each in zip(ids, self.kept, strict=False) if each is not None and token in each)
        return known if self.asked and ids and len(known) == len(ids) == len(self.kept) else None


@dataclass(slots=True)
class Transcript:
    """Everything one answer said, gathered from a body or from chunks. `asked`: also top logprobs (see `kept`)."""

    completion_id: str | None = None
    prompt_ids: list[int] | None = None
    choices: dict[int, Sampled] = field(default_factory=dict)
    usage: _Usage | None = None
    flaw: str | None = None
    """A reason to quarantine that only the reader of the wire can know."""
    failure: str | None = None
    """The engine's error inside a stream, as it wrote it."""
    told: Told | None = None
    """Which weights sampled which tokens; None where the engine said nothing of it."""
    asked: bool = False

    def add(self, answer: Answer) -> None:
        """Take in a whole answer or one chunk of it."""
        self.completion_id = answer.id or self.completion_id
        if answer.prompt_token_ids is not None:
            self.prompt_ids = answer.prompt_token_ids
        if answer.usage is not None:
            self.usage = answer.usage
        if answer.failed:
            self.failure = bytes(answer.error).decode(errors="replace")
        for choice in answer.choices:
            if choice.prompt_token_ids is not None:
                self.prompt_ids = choice.prompt_token_ids
            sampled = self.choices.get(choice.index)
            if sampled is None:
                sampled = self.choices[choice.index] = Sampled(choice.index, self.asked)
            sampled.extend(choice)

    def hear(self, comment: bytes) -> bytes | None:
        """Take in a comment of a stream; return what the client may see of it."""
        if not comment.startswith(COMMENT):
            return comment
        self.told = read_told(comment[len(COMMENT) :])
        return None

    def finished(self, n: int) -> bool:
        """True once each of `n` choices has its finish reason."""
        return len(self.choices) >= n and all(choice.finish_reason for choice in self.choices.values())

    def verdict(self, n: int) -> tuple[str | None, str | None]:
        """Return (reason, details) to quarantine a complete call for, (None, None) where it is exact."""
        if self.flaw is not None:
            return self.flaw, None
        if self.prompt_ids is None:
            return "no prompt ids", "the engine sent no prompt_token_ids"
        if len(self.choices) != n:
            return "choices missing", f"{n} choices were asked for, {len(self.choices)} came"
        for choice in self.choices.values():
            if (reason := _flaw(choice)) is not None:
                ids, logprobs = len(choice.token_ids or ()), len(choice.logprobs or ())
                return reason, f"choice {choice.index}: {ids} token ids, {logprobs} logprobs"
        return self._usage_verdict()

    def _usage_verdict(self) -> tuple[str | None, str | None]:
        if self.usage is None:
            return "no usage", "the engine sent no usage to check the token counts against"
        prompt = len(self.prompt_ids or ())
        completion = sum(len(choice.token_ids or ()) for choice in self.choices.values())
        if (self.usage.prompt_tokens, self.usage.completion_tokens) != (prompt, completion):
            said = f"{self.usage.prompt_tokens} + {self.usage.completion_tokens}"
            return "usage mismatch", f"usage says {said} tokens, the ids are {prompt} + {completion}"
        return None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What is known of a call before it is answered. `body` is the client's decoded request.

    `flaw` is a reason to quarantine it whatever the answer says.
    """

    call_id: str
    attribution: Attribution
    model: str
    requested_model: str
    body: Json
    sampling: Sampling
    n: int
    stream: bool
    received_at: float
    endpoint: Endpoint = "chat"
    request_hash: str | None = None
    project: str = "default"
    flaw: str | None = None
    dissent: tuple[LateAttribution, ...] = ()
    """What other sources say of it than `attribution`."""
    retry_of: str | None = None
    outside: str | None = None
    """The name by which somebody else's API knows the model; None where the engine is ours."""
    purpose: Purpose = "live"
    """Its run's."""
    before: str | None = None
    """The model that answers for this one before it has a version: an adapter's base, which computes the same."""


@dataclass(slots=True)
class Progress:
    """Times (Unix seconds) and versions that fill in while the call runs."""

    dispatched_at: float = 0.0
    first_token_at: float | None = None
    completed_at: float = 0.0
    version_dispatched: int | None = None
    version_completed: int | None = None
    continues: Continues | None = None
    swapped: bool = False
    """A swap began while the call was with the engine, without our acknowledgement, or one failed under it."""
    exchanged: bool = False
    """Weights may have been exchanged while it was with the engine, with our acknowledgement."""
    lived: Container[int] = ()
    """The versions that were seen live until now."""


def compose(
    draft: Draft, progress: Progress, transcript: Transcript, *, status: CallStatus, error: str | None = None
) -> Call:
    """Return the call as it will be stored. Only a complete call is judged for exactness, every one for its version."""
    reason, detail = _verdict(draft, transcript) if status == "complete" else (None, None)
    began, ended = progress.version_dispatched, progress.version_completed
    ordered = sorted(transcript.choices.values(), key=lambda choice: choice.index)
    counts = {each.index: len(each.token_ids or ()) for each in ordered}
    versions = judge(transcript.told, counts, began=began, ended=ended, lived=progress.lived)
    untold = progress.exchanged and transcript.told is None
    if progress.swapped or untold or versions.detail is not None:
        versions = Judged(ended, detail=versions.detail or f"{began} -> {ended}")
        reason, detail = "version changed", versions.detail
    one_tool_call = draft.body.get("parallel_tool_calls") is False
    choices = tuple(choice.frozen(draft.sampling.flags, one_tool_call=one_tool_call) for choice in ordered)
    if versions.spans:
        choices = tuple(replace(each, version_spans=versions.spans.get(each.index, ())) for each in choices)
    prompt_ids = None if draft.flaw == SEVERAL_PROMPTS or draft.outside else transcript.prompt_ids
    return Call(
        call_id=draft.call_id,
        completion_id=transcript.completion_id,
        attribution=draft.attribution,
        model=draft.model,
        requested_model=draft.requested_model,
        version_dispatched=progress.version_dispatched,
        version_completed=versions.completed,
        prompt_ids=None if prompt_ids is None else tuple(prompt_ids),
        choices=choices if draft.outside is None else tuple(map(_text_only, choices)),
        status=status,
        timing=CallTiming(
            received_at=draft.received_at,
            dispatched_at=progress.dispatched_at,
            first_token_at=progress.first_token_at,
            completed_at=progress.completed_at,
        ),
        request={name: value for name, value in draft.body.items() if name not in SAMPLING_FIELDS},
        requested=draft.sampling.requested,
        effective=draft.sampling.effective,
        stream=draft.stream,
        quarantine=reason,
        error=error if error is not None else detail,
        endpoint=draft.endpoint,
        request_hash=draft.request_hash,
        retry_of=draft.retry_of,
        project=draft.project,
        continues=progress.continues,
    )


def _verdict(draft: Draft, transcript: Transcript) -> tuple[str | None, str | None]:
    """Return (reason, details) to quarantine a complete call for.

    An embedding has nothing sampled to judge, and what an outside API samples is not ours to judge.
    """
    if draft.endpoint == "embeddings" or draft.outside is not None:
        return None, None
    if draft.flaw is not None:
        return draft.flaw, None
    reason, detail = transcript.verdict(draft.n)
    if reason in ("no token ids", "no logprobs") and draft.body.get("include_reasoning") is False:
        return REASONING_HIDDEN, "`include_reasoning: false` makes the engine withhold ids and logprobs"
    return reason, detail


def _text_only(choice: Choice) -> Choice:
    """What somebody else's weights said: never trained on, so tokens of it are kept by nobody."""
    return replace(choice, token_ids=(), logprobs=None, flags=(*choice.flags, "external"))


def merge_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a stream delta to the message so far: text is joined, tool calls are joined by their index."""
    for name, value in delta.items():
        if name == "tool_calls" and isinstance(value, list):
            calls = message.setdefault("tool_calls", [])
            for part in value:
                _merge_tool_call(calls, part)
        elif isinstance(value, str) and name != "role":
            message[name] = (message.get(name) or "") + value
        elif value is not None or name not in message:
            message[name] = value


def _merge_tool_call(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    index = part.get("index")
    if not isinstance(index, int) or not 0 <= index < len(calls):
        calls.append({"function": {"name": "", "arguments": ""}})
        index = len(calls) - 1
    call = calls[index]
    call.update({name: part[name] for name in ("id", "type") if part.get(name)})
    function = part.get("function") or {}
    for name in ("name", "arguments"):
        call["function"][name] += function.get(name) or ""


def _numbers(logprobs: list[float | None]) -> list[float] | None:
    """Return `logprobs` where each is a number (NaN included), else None. At C speed: this is the hot path."""
    return None if None in logprobs else cast(list[float], logprobs)


def _flaw(choice: Sampled) -> str | None:
    flaw = None
    if choice.token_ids is None:
        flaw = "no token ids"
    elif choice.logprobs is None:
        flaw = "no logprobs"
    elif len(choice.token_ids) != len(choice.logprobs):
        flaw = "length mismatch"
    elif (exact := _numbers(choice.logprobs)) is None or not math.isfinite(sum(exact)):
        flaw = "nan logprob"
    elif MISSING_LOGPROB in choice.logprobs:
        flaw = "missing logprob"
    elif choice.finish_reason is None:
        flaw = "no finish reason"
    return flaw
