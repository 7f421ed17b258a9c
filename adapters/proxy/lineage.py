"""Which earlier call of its run a request goes on from, and the prompt that continues what was really sampled.

A request goes on from a call where its messages begin with that call's and then repeat one of its answers. What a
client sends back of an answer is compared by what it says, not by how it is written: arguments of tool calls as JSON,
text parts as text, no content as empty content; thoughts count only where the client sends them. Ids are never taken
from text: a prompt is spliced from recorded ids and from the tail of what the engine renders. Pure; refuses nothing.
Called by `continuing`.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from tracegrad.tracestore.records import Choice, EarlierCall, Json

SETTING = (
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "add_special_tokens",
    "continue_final_message",
    "truncate_prompt_tokens",
)
"""What a prompt is made of beside the messages. Source: vLLM 0.32, `build_chat_params` and `build_tok_params`."""
_RENDERED = ("echo", "truncate_prompt_tokens", "return_prompt_text")
"""Fields of a request that vLLM can only follow where it renders the messages itself."""
_MEDIA = frozenset(
    (
        "audio_embeds",
        "audio_url",
        "image_embeds",
        "image_pil",
        "image_url",
        "input_audio",
        "input_image",
        "prompt_embeds",
        "video_embeds",
        "video_url",
    )
)
"""Keys that make a part more than text, whatever its type says. Source: vLLM 0.32, `_MEDIA_CONTENT_PART_KEYS`."""
_CUT = frozenset(("stop_string", "hidden_tool_calls"))
"""Flags of an answer of which the client got less than was sampled: to it, another history was told."""
_CONTEXT = 4
"""Tokens decoded before a difference: some decoders treat the first token of a text in their own way."""
RECENT = 64
"""Calls of its role that a request may be an edit of: it costs time on the event loop, and decides a label only."""
_BLOCK = 512
_EXACT_FLOATS = 2**53
_Said = tuple[str, ...]
_SILENCE: _Said = ("",)


@dataclass(frozen=True, slots=True)
class Told:
    """An earlier call, and what each of its choices says, worked out once: it is compared with many requests."""

    call: EarlierCall
    said: tuple[_Said, ...]

    @property
    def messages(self) -> list[Any]:
        """The messages of its request."""
        messages = self.call.request.get("messages")
        return messages if isinstance(messages, list) else []


@dataclass(frozen=True, slots=True)
class Origin:
    """The call that a request goes on from; `choice` is the answer it repeats, None where it repeats none."""

    call: EarlierCall
    choice: Choice | None
    n_messages: int
    """How many messages of the request are the earlier call's and its answer."""
    same_setting: bool
    """Whether tools and the like are what they were."""
    newest: bool
    """Whether no further answer follows in the request: then no other call can be meant."""

    @property
    def sampled(self) -> list[int]:
        """The ids of the earlier prompt and answer: how a prompt that goes on from them begins."""
        return [*self.call.prompt_ids, *(self.choice.token_ids if self.choice is not None else ())]

    @property
    def continuable(self) -> bool:
        """Whether the prompt may be built from `sampled`: nothing was changed, and nothing kept from the client."""
        return self.same_setting and self.choice is not None and not _CUT.intersection(self.choice.flags)


def may_continue(request: Json) -> bool:
    """Whether some answer stands in the messages at all, and nothing but text."""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return False
    return any(map(_is_answer, messages)) and only_text(request)


def takes_ids(request: Json) -> bool:
    """Whether the answer would be the same but for the prompt, if that were given as ids."""
    return all(request.get(name) in (None, False) for name in _RENDERED)


def only_text(request: Json) -> bool:
    """Whether no content is a picture, sound or the like. Source: vLLM 0.32, `has_non_text_content`."""
    messages = request.get("messages")
    return isinstance(messages, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and _MEDIA.isdisjoint(part)
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def told(call: EarlierCall) -> Told:
    """Return the call as it is compared with requests."""
    return Told(call, tuple(_said(choice.message) for choice in call.choices))


def marks_of(one: Told) -> set[int]:
    """Return what `marks_in` of a request has one of, if the request goes on from the call."""
    begins = repr(one.messages[:1])
    return {hash((begins, len(one.messages), said)) for said in one.said}


def marks_in(request: Json) -> set[int]:
    """Return a number for each answer in a request: its place, what it says, and how the conversation begins."""
    messages = request["messages"]
    begins = repr(messages[:1])
    return {hash((begins, n, _said(message))) for n, message in enumerate(messages) if _is_answer(message)}


def origin_of(request: Json, role: str | None, earlier: Sequence[Told]) -> Origin | None:
    """Return the call with the longest conversation that `request` goes on from; None: none.

    Of equals it is the one whose tool calls have the very ids, then one of the same role, then one with the same
    tools and the like, then the newest.
    """
    messages = request["messages"]
    best: Origin | None = None
    likeness = (False, False, False)
    heard: dict[int, _Said] = {}
    for one in reversed(earlier):
        before = one.messages
        n = len(before)
        if n >= len(messages) or not _is_answer(messages[n]):
            continue
        equal = best is not None and n + 1 == best.n_messages
        if best is not None and (n + 1 < best.n_messages or (equal and all(likeness))):
            continue
        if n not in heard:
            heard[n] = _said(messages[n])
        if heard[n] not in one.said or messages[:n] != before:
            continue
        if (choice := _repeated(one, messages[n], heard[n])) is None:
            continue
        same = _setting(request) == _setting(one.call.request)
        alike = (_call_ids(choice.message) == _call_ids(messages[n]), one.call.role == role, same)
        if not equal or alike > likeness:
            newest = not any(map(_is_answer, messages[n + 1 :]))
            best, likeness = Origin(one.call, choice, n + 1, same_setting=same, newest=newest), alike
    return best


def edited_from(request: Json, role: str | None, earlier: Sequence[Told]) -> Origin | None:
    """Return the newest call of the same role whose history the app changed before it went on; None: none.

    Either another answer stands in the place of the call's, or its answer stands behind other messages. An answer that
    the call was given itself (an example in the prompt, say) is no sign of that. Looks at the newest `RECENT` calls.
    """
    messages = request["messages"]
    answers: dict[_Said, list[Any]] | None = None
    for one in islice((one for one in reversed(earlier) if one.call.role == role), RECENT):
        before = one.messages
        n = len(before)
        if n < len(messages) and _is_answer(messages[n]) and messages[:n] == before:
            return Origin(one.call, None, n, same_setting=False, newest=False)
        if answers is None:
            answers = defaultdict(list)
            for message in filter(_is_answer, messages):
                answers[_said(message)].append(message)
        for choice, said in zip(one.call.choices, one.said, strict=True):
            for sent in answers.get(said, ()) if said != _SILENCE else ():
                if _thinks_so(choice.message, sent) and messages.count(sent) > before.count(sent):
                    return Origin(one.call, None, 0, same_setting=False, newest=False)
    return None


def says_the_same(sampled: Json, sent: Mapping[str, Any]) -> bool:
    """Whether an assistant message of a request says what was sampled."""
    return _said(sampled) == _said(sent) and _thinks_so(sampled, sent)


def begins_with(prompt: Sequence[int], sampled: list[int]) -> bool:
    """Whether a prompt goes on exactly from what was sampled."""
    return list(prompt[: len(sampled)]) == sampled


def difference(rendered: list[int], sampled: list[int]) -> int:
    """Return the place, a few tokens before the first difference, from which on the two have to be compared as text."""
    # Block by block, because slices compare at C speed; within a block by bisection: once prefixes differ, longer do.
    shared = min(len(rendered), len(sampled))
    starts = range(0, shared, _BLOCK)
    at = next((at for at in starts if rendered[at : at + _BLOCK] != sampled[at : at + _BLOCK]), shared)
    rest = range(at + 1, min(at + _BLOCK, shared) + 1)
    return max(at + bisect_left(rest, True, key=lambda n: rendered[at:n] != sampled[at:n]) - _CONTEXT, 0)


def ended(sampled: list[int], choice: Choice, end: int) -> list[int] | None:
    """Return `sampled` with its turn ended by `end`; None where the model ended it with another token.

    The template ends the turn of an answer that was cut short, so it is ended here too.
    """
    if sampled[-1] == end:
        return sampled
    return [*sampled, end] if choice.finish_reason == "length" else None


def common_tail(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the ids with which both end."""
    n = 0
    while n < min(len(one), len(other)) and one[-1 - n] == other[-1 - n]:
        n += 1
    return list(one[len(one) - n :])


def splice_point(rendered: Sequence[int], sampled: Sequence[int], end: int) -> int | None:
    """Return where, in the rendered prompt, what follows the sampled answer begins; None where it cannot be told.

    The chat template ends each turn with the same id, so the answer's is the one with the same number in both, however
    the template rewrote what lies between. Whoever uses it makes sure by text, or by rendering the shorter history.
    """
    turns, at = sampled.count(end), -1
    for _ in range(turns):
        try:
            at = rendered.index(end, at + 1)
        except ValueError:
            return None
    return at + 1 if turns and at + 1 < len(rendered) else None


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _repeated(one: Told, sent: Mapping[str, Any], heard: _Said) -> Choice | None:
    """Return the choice that an assistant message repeats, rather the one whose tool calls have the same ids."""
    found = [
        choice
        for choice, said in zip(one.call.choices, one.said, strict=True)
        if said == heard and choice.token_ids and _thinks_so(choice.message, sent)
    ]
    return next((choice for choice in found if _call_ids(choice.message) == _call_ids(sent)), next(iter(found), None))


def _setting(request: Json) -> list[Any]:
    # with `--exclude-tools-when-tool-choice-none` the template does not see the tools then
    return [request.get("tool_choice") == "none", *(request.get(name) for name in SETTING)]


def _said(message: Mapping[str, Any]) -> _Said:
    """Return what a message says: its text, then the name and the arguments of each tool call.

    However text is written; arguments by what they mean as JSON. Ids of calls are names that a client may give anew.
    """
    tool_calls = message.get("tool_calls")
    said = [_text(message.get("content"))]
    for call in tool_calls if isinstance(tool_calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        named = function if isinstance(function, dict) else {}
        said += (_plain(named.get("name")), _meaning(named.get("arguments")))
    return tuple(said)


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return _plain(content)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _meaning(arguments: Any) -> str:
    """Return one text for all ways to write the same JSON; what is no JSON as it is."""
    try:
        value = _decode_arguments(arguments) if isinstance(arguments, str) else arguments
        return msgspec.json.encode(value, order="deterministic").decode()
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return _plain(arguments)


def _number(text: str) -> float | int:
    """Read 1.0 as 1: clients in JavaScript know one kind of number."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < _EXACT_FLOATS else value


_decode_arguments = msgspec.json.Decoder(float_hook=_number).decode


def _thinks_so(sampled: Json, sent: Mapping[str, Any]) -> bool:
    """Whether thoughts are those that were sampled, where the client sends them back at all."""
    thoughts = _thoughts(sent)
    return thoughts is None or thoughts == _thoughts(sampled)


def _thoughts(message: Mapping[str, Any]) -> Any:
    return message.get("reasoning") or message.get("reasoning_content")


def _call_ids(message: Mapping[str, Any]) -> list[Any]:
    tool_calls = message.get("tool_calls")
    return [call.get("id") for call in tool_calls if isinstance(call, dict)] if isinstance(tool_calls, list) else []
