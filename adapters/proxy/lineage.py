"""Which earlier call of its run a request goes on from, and the prompt that continues what was really sampled.

A request goes on from a call where its messages begin with that call's and then repeat one of its answers. What a
client sends back of an answer is compared by what it says, not by how it is written: arguments of tool calls as JSON,
text parts as text, no content as empty content; thoughts count only where the client sends them. Ids are never taken
from text: a prompt is spliced from recorded ids and from the tail of what the engine renders. Pure; refuses nothing.
Called by `continuing`.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
)
"""What a chat template reads beside the messages. Source: vLLM 0.32, `ChatCompletionRequest.build_chat_params`."""
_CUT = frozenset(("stop_string", "hidden_tool_calls"))
"""Flags of an answer of which the client got less than was sampled: to it, another history was told."""
_CONTEXT = 4
"""Tokens decoded before a difference: some decoders treat the first token of a text in their own way."""


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


def only_text(request: Json) -> bool:
    """Whether no content is a picture, sound or the like. Source: vLLM 0.32, `has_non_text_content`."""
    messages = request.get("messages")
    return isinstance(messages, list) and all(
        isinstance(part, dict) and part.get("type") == "text"
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def origin_of(request: Json, earlier: Sequence[EarlierCall]) -> Origin | None:
    """Return the call with the longest conversation that `request` goes on from, the newest of equals; None: none."""
    messages = request["messages"]
    best: Origin | None = None
    for call in reversed(earlier):
        before = _messages(call)
        n = len(before)
        if n >= len(messages) or (best is not None and n < best.n_messages):
            continue
        answer = messages[n]
        if not _is_answer(answer):
            continue
        choice = next((one for one in call.choices if one.token_ids and says_the_same(one.message, answer)), None)
        if choice is not None and messages[:n] == before:
            same = _setting(request) == _setting(call.request)
            best = Origin(call, choice, n + 1, same_setting=same, newest=not any(map(_is_answer, messages[n + 1 :])))
    return best


def edited_from(request: Json, role: str | None, earlier: Sequence[EarlierCall]) -> Origin | None:
    """Return the newest call of the same role whose history the app changed before it went on; None: none.

    Either another answer stands in the place of the call's, or its answer stands behind other messages.
    """
    messages = request["messages"]
    answers = [message for message in messages if _is_answer(message)]
    for call in reversed(earlier):
        if call.role != role:
            continue
        before = _messages(call)
        n = len(before)
        if n < len(messages) and _is_answer(messages[n]) and messages[:n] == before:
            return Origin(call, None, n, same_setting=False, newest=False)
        for choice in call.choices:
            if any(_says_something(answer) and says_the_same(choice.message, answer) for answer in answers):
                return Origin(call, None, 0, same_setting=False, newest=False)
    return None


def says_the_same(sampled: Json, sent: Mapping[str, Any]) -> bool:
    """Whether an assistant message of a request says what was sampled."""
    if _text(sampled.get("content")) != _text(sent.get("content")):
        return False
    if _tool_calls(sampled.get("tool_calls")) != _tool_calls(sent.get("tool_calls")):
        return False
    thoughts = _thoughts(sent)
    return thoughts is None or thoughts == _thoughts(sampled)


def begins_with(prompt: Sequence[int], sampled: list[int]) -> bool:
    """Whether a prompt goes on exactly from what was sampled."""
    return list(prompt[: len(sampled)]) == sampled


def difference(rendered: list[int], sampled: list[int]) -> int:
    """Return the place, a few tokens before the first difference, from which on the two have to be compared as text."""
    # Prefixes of one length agree or not, and once they do not, no longer one does: bisection compares at C speed.
    same = bisect_left(range(1, min(len(rendered), len(sampled)) + 1), True, key=lambda n: rendered[:n] != sampled[:n])
    return max(same - _CONTEXT, 0)


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


def _messages(call: EarlierCall) -> list[Any]:
    messages = call.request.get("messages")
    return messages if isinstance(messages, list) else []


def _setting(request: Json) -> list[Any]:
    # with `--exclude-tools-when-tool-choice-none` the template does not see the tools then
    return [request.get("tool_choice") == "none", *(request.get(name) for name in SETTING)]


def _text(content: Any) -> Any:
    """Return text however it is written; what is no text as it is."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _tool_calls(tool_calls: Any) -> list[Any]:
    """Return names and arguments. Ids are names that a client may give anew."""
    if not isinstance(tool_calls, list):
        return []
    functions = [call.get("function") or {} if isinstance(call, dict) else {} for call in tool_calls]
    return [(function.get("name"), _as_json(function.get("arguments"))) for function in functions]


def _as_json(arguments: Any) -> Any:
    try:
        return json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return arguments


def _thoughts(message: Json) -> Any:
    return message.get("reasoning") or message.get("reasoning_content")


def _says_something(answer: Mapping[str, Any]) -> bool:
    return bool(_text(answer.get("content")) or answer.get("tool_calls"))
