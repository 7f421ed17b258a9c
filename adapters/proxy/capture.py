"""What is added to a request so that it can be recorded, and taken out of the answer again.

Upstream: `return_token_ids`, `logprobs` (with top ones where tails are cut off, see `kept`) and, for streams,
`stream_options.include_usage`, each only where the client did not ask for it itself and where adding it can neither
turn an error of the engine into an answer nor change the answer (a completion with `echo` loses the echoed prompt once
ids are asked for); and the project's `cache_salt`.
Downstream: the same fields become the `null` that vLLM writes where they are not asked for, and the chunks that exist
only because of them are dropped. Everything else passes as the bytes that came (values are never decoded and encoded
again). Refuses what `fields` refuses. Called by `chat` and `exchange`.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tracegrad.adapters.proxy.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, Shape
from tracegrad.adapters.proxy.errors import InvalidRequest
from tracegrad.adapters.proxy.fields import check_body
from tracegrad.tracestore.config import Allowed

SEVERAL_PROMPTS = "several prompts"
ECHO = "echo"
_OFF = (None, False)
_NULL = msgspec.Raw(b"null")
_TRUE = msgspec.Raw(b"true")

RawObject = dict[str, msgspec.Raw]
_decode_object = msgspec.json.Decoder(RawObject).decode
_decode_objects = msgspec.json.Decoder(list[RawObject]).decode
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Ask:
    """The client's request, decoded twice: `raw` keeps the bytes of each field, `body` has the values."""

    raw: RawObject
    body: dict[str, Any]
    shape: Shape = CHAT
    digest: str = ""
    """Of the body as it was sent: two requests with one digest are a retry, or equal calls side by side."""

    @property
    def model(self) -> str | None:
        """The model name as requested, None where the request has none."""
        value = self.body.get("model")
        return value if isinstance(value, str) else None

    @property
    def stream(self) -> bool:
        """Whether the client wants server-sent events."""
        return self.body.get("stream") is True and self.shape is not EMBEDDINGS

    @property
    def n(self) -> int:
        """How many choices the answer will have; what is no count is the engine's to refuse."""
        value = self.body.get("n")
        per_prompt = value if isinstance(value, int) and value > 0 else 1
        return 0 if self.shape is EMBEDDINGS else per_prompt * self.prompts

    @property
    def prompts(self) -> int:
        """How many prompts stand in the request: only a completion can have several."""
        if self.shape is not COMPLETIONS:
            return 1
        prompt, embeds = self.body.get("prompt"), self.body.get("prompt_embeds")
        texts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
        if not embeds:
            return texts
        return (len(embeds) if isinstance(embeds, list) else 1) + (texts if prompt else 0)

    @property
    def flaw(self) -> str | None:
        """A reason to quarantine the call whatever its answer says, None where it can be recorded exactly."""
        if self.prompts != 1:
            return SEVERAL_PROMPTS
        return ECHO if self.shape is COMPLETIONS and self.body.get("echo") else None


@dataclass(frozen=True, slots=True)
class Injection:
    """Which of the three fields we added. `kept`: how many top logprobs we ask for beside the sampled tokens' own."""

    token_ids: bool
    logprobs: bool
    usage: bool
    kept: int = 0


def read_ask(body: bytes, shape: Shape = CHAT, *, allow: Collection[Allowed] = ()) -> Ask:
    """Decode a request body. `allow` is what the operator lets through of what is otherwise refused.

    Raises:
        InvalidRequest: the body is not a JSON object, or has a field that clients must not send.
    """
    try:
        raw = _decode_object(body)
        values = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body must be a JSON object: {error}", code="invalid_json") from error
    check_body(values, allow)
    return Ask(raw, values, shape, hashlib.blake2b(body, digest_size=16).hexdigest())


NOTHING = Injection(token_ids=False, logprobs=False, usage=False)
"""For an outside API, which may refuse what it does not know, and for embeddings."""


def plan_injection(body: Mapping[str, Any], shape: Shape = CHAT, *, kept: int = 0) -> Injection:
    """Decide what to add. Top-logprob fields without `logprobs` are an error that stays the engine's to report.

    `kept` top logprobs are asked for where the client sees no logprobs: ours name tokens by their ids.
    """
    if shape is EMBEDDINGS:
        return NOTHING
    wants_top = body.get("top_logprobs") not in (None, 0) or body.get("logprob_token_ids")
    options = body.get("stream_options")
    plain_options = options is None or (isinstance(options, Mapping) and options.get("include_usage") in _OFF)
    echo = shape is COMPLETIONS and bool(body.get("echo"))
    # a completion's `logprobs` is a count: 0 asks for those of the sampled tokens, and `false` counts as 0
    without_logprobs = body.get("logprobs") is None if shape is COMPLETIONS else _is_off(body.get("logprobs"))
    logprobs = without_logprobs and not wants_top and not echo
    return Injection(
        token_ids=_is_off(body.get("return_token_ids")) and not echo,
        logprobs=logprobs,
        kept=kept if logprobs else 0,
        usage=body.get("stream") is True and plain_options,
    )


def renamed(body: bytes, model: str | None) -> bytes:
    """Return a request of ours for another model; as it is for None."""
    if model is None:
        return body
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return _encode({**fields, "model": msgspec.Raw(_encode(model))})


def upstream_body(
    ask: Ask,
    injection: Injection,
    *,
    model: str,
    requested: Mapping[str, Any],
    effective: Mapping[str, Any],
    salt: str | None = None,
) -> bytes:
    """Return the request for the engine: the client's fields in their order, then ours. `salt` None: as it came."""
    fields = dict(ask.raw)
    fields["model"] = msgspec.Raw(_encode(model))
    if effective != requested:
        for name in requested.keys() - effective.keys():
            del fields[name]
        for name, value in effective.items():
            if name not in requested or requested[name] != value:
                fields[name] = msgspec.Raw(_encode(value))
    if injection.token_ids:
        fields["return_token_ids"] = _TRUE
    if injection.logprobs:
        fields["logprobs"] = msgspec.Raw(ask.shape.logprobs)
    if injection.kept:
        fields["return_tokens_as_token_ids"] = _TRUE
        fields[ask.shape.top_logprobs] = msgspec.Raw(_encode(injection.kept))
    if injection.usage:
        options = dict(ask.body.get("stream_options") or {})
        options.update(include_usage=True, continuous_usage_stats=False)
        fields["stream_options"] = msgspec.Raw(_encode(options))
    if salt is not None:
        fields["cache_salt"] = msgspec.Raw(_encode(salt))
    return _encode(fields)


def with_prompt_ids(body: bytes, ids: list[int]) -> bytes:
    """Return an upstream body whose messages vLLM does not render: `ids` are the prompt, the parsers stay.

    vLLM 0.32 reads them where disaggregated serving puts what its prefill stage has rendered. No client can send this
    field (`fields.NEVER`), so `body` has none.
    """
    return body[:-1] + b',"kv_transfer_params":' + _encode({"prompt_token_ids": ids}) + b"}"


class Stripper:
    """Turns the engine's answer into the one the client asked for. One per call: it remembers the stream's usage.

    `alias` is the model name the client used, None where the answer's own name stays. `mark` is put into the
    `system_fingerprint` of a stream's finishing chunks: all of an answer's identity that LangChain keeps of a stream.
    """

    def __init__(self, injection: Injection, *, alias: str | None, mark: str | None = None) -> None:
        self._injection = injection
        self._alias = None if alias is None else msgspec.Raw(_encode(alias))
        self._mark = None if mark is None else msgspec.Raw(_encode(mark))
        self._fingerprint: msgspec.Raw | None = None
        injected = injection.token_ids or injection.logprobs or injection.usage
        self._nothing_to_do = not injected and alias is None and mark is None

    def plain(self, body: bytes) -> bytes:
        """Strip a whole answer.

        Raises:
            msgspec.MsgspecError: `body` is not a JSON object with choices.
        """
        if self._nothing_to_do:
            return body
        answer = _decode_object(body)
        self._strip(answer)
        return _encode(answer)

    def chunk(self, data: bytes) -> bytes | None:
        """Strip one stream chunk; None where the client must not see it at all.

        Raises:
            msgspec.MsgspecError: `data` is not a JSON object with choices.
        """
        if self._nothing_to_do:
            return data
        chunk = _decode_object(data)
        if "choices" not in chunk:
            return data
        choices = self._strip(chunk)
        if self._injection.usage and not choices and "usage" in chunk:
            self._fingerprint = chunk.get("system_fingerprint") if self._mark is None else None
            return None
        if self._injection.token_ids and self._injection.logprobs and choices and all(map(_is_silent, choices)):
            return None
        if self._mark is not None and any(map(_finishes, choices)):
            chunk["system_fingerprint"] = self._mark
        return _encode(chunk)

    def stamp(self, data: bytes) -> bytes:
        """Put the fingerprint of a dropped usage chunk where vLLM puts it without one: on the finishing chunk."""
        if self._fingerprint is None or data == b"[DONE]":
            return data
        chunk = _decode_object(data)
        if "choices" in chunk:
            chunk["system_fingerprint"] = self._fingerprint
        return _encode(chunk)

    def _strip(self, answer: RawObject) -> list[RawObject]:
        """Blank the injected fields of an answer or chunk in place, and return its choices."""
        if self._alias is not None and "model" in answer:
            answer["model"] = self._alias
        choices = _decode_objects(answer["choices"]) if "choices" in answer else []
        injected = [
            name
            for name, ours in (
                ("token_ids", self._injection.token_ids),
                ("prompt_token_ids", self._injection.token_ids),  # here in completions, at the top in chat
                ("logprobs", self._injection.logprobs),
            )
            if ours
        ]
        for choice in choices:
            for name in injected:
                if name in choice:
                    choice[name] = _NULL
        if injected and choices:
            answer["choices"] = msgspec.Raw(_encode(choices))
        if self._injection.token_ids and "prompt_token_ids" in answer:
            answer["prompt_token_ids"] = _NULL
        return choices


def _is_silent(choice: RawObject) -> bool:
    """True for the chunk that vLLM sends only to carry ids or logprobs: an empty delta that finishes nothing."""
    return bytes(choice.get("delta", b"")) == b"{}" and bytes(choice.get("finish_reason", b"null")) == b"null"


def _finishes(choice: RawObject) -> bool:
    return bytes(choice.get("finish_reason", b"null")) != b"null"


def _is_off(value: Any) -> bool:
    return value is None or value is False
