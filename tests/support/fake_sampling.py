"""What the fake engine samples, and how it parses that: the grammar and parsers of vLLM 0.32, in small.

The sampled text is a function of the request: JSON where a format is asked for, calls in Hermes' markup where tools
are forced or the user says "call" ("call all": each tool once), thoughts where the user says "think", else the last
user message. One byte is one token. Source of the parsing: vLLM 0.32, `tool_parsers/hermes_tool_parser.py`.
"""

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any

FINGERPRINT = "vllm-0.32.0-fake"
EOS = 2
FIRST_BYTE = 3
PAIRS, BASE = 1_000, 512
"""Where the ids of two bytes in one begin."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"


def encode_text(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def token_text(token: int) -> str:
    if token >= PAIRS:
        return "".join(map(token_text, divmod(token - PAIRS, BASE)))
    return "" if token == EOS else bytes([token - FIRST_BYTE]).decode(errors="replace")


def logprob_of(token_id: int, position: int, choice: int) -> float:
    """A float32 in (-4, 0), different for every place, as Python's double of it."""
    digest = hashlib.blake2b(f"{token_id}/{position}/{choice}".encode(), digest_size=4).digest()
    value = -4.0 * int.from_bytes(digest, "little") / 2**32 - 1e-6
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def token_name(body: dict[str, Any], token: int) -> str:
    return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else token_text(token)


def tops_of(body: dict[str, Any], token: int, value: float | None, count: int) -> dict[int, float | None]:
    """Return token -> logprob of the sampled token and `count` others, the likeliest first.

    What top-k leaves has equal shares of the rest; top-p and min-p leave three, and everything else is cut off.
    """
    if value is None or value <= -9999.0 or not count:
        return {token: value}
    top_k = body.get("top_k") or 0
    narrow = (body.get("top_p") or 1.0) < 1.0 or (body.get("min_p") or 0.0) > 0.0
    left = top_k if top_k > 0 else 3 if narrow else 256
    others = [FIRST_BYTE + (token + n) % 256 for n in range(1, count + 1)]
    share = math.log(-math.expm1(value) / (left - 1)) if left > 1 else -9999.0
    if left == 1:
        value = 0.0
    return {token: value, **{other: share if n < left - 1 else -9999.0 for n, other in enumerate(others)}}


def content_entry(body: dict[str, Any], token: int, value: float | None) -> dict[str, Any]:
    """Return what a chat completion says of a sampled token."""
    most = body.get("top_logprobs") or 0
    said = [(token_name(body, one), number) for one, number in tops_of(body, token, value, most).items()]
    own, *others = ({"token": name, "logprob": number, "bytes": list(name.encode())} for name, number in said)
    return {**own, "top_logprobs": [own, *others][:most]}


def too_many_tops(body: dict[str, Any], most: int) -> str | None:
    asked = body.get("logprobs")
    wanted = int(body.get("top_logprobs") or 0) if isinstance(asked, bool) or asked is None else int(asked)
    said = f"Requested sample logprobs of {wanted}, which is greater than max allowed: {most}"
    return f"{said} (parameter=logprobs, value={wanted})" if wanted > most else None


@dataclass(frozen=True)
class Sampled:
    """One choice: its token ids, the text that each of them gives the client, and how it ended."""

    ids: list[int]
    texts: list[str]
    finish: str
    stop_reason: str | None
    n_visible: int

    @property
    def text(self) -> str:
        pairs = (divmod(i - PAIRS, BASE) if i >= PAIRS else (i,) for i in self.ids[: self.n_visible])
        return bytes(i - FIRST_BYTE for pair in pairs for i in pair).decode(errors="replace")


def sample(text: str, body: dict[str, Any]) -> Sampled:
    """Cut `text` at the request's stop strings and its limit. Text that may begin a stop string is held back."""
    text, visible, stopped_by = cut_at_stop(text, body.get("stop"))
    ids = [*encode_text(text), *([] if stopped_by else [EOS])]
    n_visible, finish = len(visible.encode()), "stop"
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if limit is not None and limit < len(ids):
        ids, finish, stopped_by, n_visible = ids[:limit], "length", None, min(limit, len(text.encode()))
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    held = max((len(stop) - 1 for stop in stops), default=0)
    shown, texts = 0, []
    for position in range(1, len(ids) + 1):
        until = n_visible if position == len(ids) else min(max(position - held, shown), n_visible)
        texts.append("".join(token_text(token) for token in ids[shown:until]))
        shown = max(shown, until)
    return Sampled(ids, texts, finish, stopped_by, n_visible)


def message_text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def script(body: dict[str, Any], choice: int) -> str:
    """Return the text that is sampled for a chat request."""
    users = [message_text(m) for m in body["messages"] if m["role"] == "user"]
    said = users[-1] if users else ""
    return (f"{THINK}because{THOUGHT}" if "think" in said else "") + _answer(body, choice, said)


def _answer(body: dict[str, Any], choice: int, said: str) -> str:
    wanted, tools = body.get("tool_choice", "auto"), body.get("tools") or []
    if isinstance(wanted, dict):
        return markup([tool for tool in tools if tool["function"]["name"] == wanted["function"]["name"]])
    if tools and (wanted == "required" or (wanted != "none" and "call" in said)):
        return markup(tools if "all" in said else tools[:1])
    wanted_format = body.get("response_format") or {}
    if wanted_format.get("type") == "json_schema":
        return json.dumps(instance(wanted_format["json_schema"]["schema"]))
    if wanted_format.get("type") == "json_object":
        return json.dumps({"answer": 7, "why": "x"})
    return f"{choice}: {said}"


def markup(tools: list[dict[str, Any]]) -> str:
    calls = [
        {"name": tool["function"]["name"], "arguments": instance(tool["function"].get("parameters") or {})}
        for tool in tools
    ]
    return "\n".join(f"{OPEN}\n{json.dumps(call)}\n{CLOSE}" for call in calls)


def instance(schema: dict[str, Any], root: dict[str, Any] | None = None) -> Any:
    """Return a small value that a JSON schema accepts."""
    root = schema if root is None else root
    if "$ref" in schema:
        return instance(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return instance(schema["anyOf"][0], root)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: instance(sub, root) for name, sub in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [instance(schema.get("items") or {"type": "integer"}, root)]
    return {"string": "x", "integer": 7, "number": 0.5, "boolean": True, "null": None}[kind]


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Return (reasoning, the rest), as a parser of `<think>` does."""
    if not text.startswith(THINK):
        return None, text
    thought, _, rest = text.removeprefix(THINK).partition(THOUGHT)
    return thought, rest


def split_calls(text: str) -> tuple[str | None, list[dict[str, str]]]:
    """Return (content before the calls, calls with their arguments as JSON text)."""
    found = re.findall(rf"{OPEN}(.*?){CLOSE}|{OPEN}(.*)", text, re.DOTALL)
    try:
        calls = [json.loads(whole or rest) for whole, rest in found]
    except json.JSONDecodeError:
        return text, []
    if not calls:
        return text, []
    return text[: text.find(OPEN)] or None, [
        {"name": call["name"], "arguments": json.dumps(call["arguments"])} for call in calls
    ]


def cut_at_stop(text: str, stop: Any) -> tuple[str, str, str | None]:
    """Return (what was sampled, what the client may see, the stop string that ended it)."""
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    hits = sorted((text.find(word), word) for word in stops if word in text)
    if not hits:
        return text, text, None
    at, word = hits[0]
    return text[: at + len(word)], text[:at], word


class ChoiceStream:
    """One choice of a stream: text in, vLLM's deltas out. None: the parser has nothing to say yet.

    `parser`: the engine has a tool parser; `tools`: it looks for calls in this request.
    """

    def __init__(self, *, reasoning: bool, parser: bool, tools: bool, call_id: str) -> None:
        self._thinking: bool | None = None if reasoning else False
        self._parser = parser
        self._tools = tools
        self._call_id = call_id
        self._raw = self._text = ""
        self._sent = self._shown = 0
        self._args: list[str] = []
        self.called = False

    def feed(self, delta: str) -> dict[str, Any] | None:
        if self._thinking is not False:
            return self._think(delta)
        if not self._tools:
            return {"content": delta} if delta or not self._parser else None
        self._text += delta
        content, calls = self._content(), self._calls()
        if not content and not calls:
            return None
        self.called = self.called or bool(calls)
        return {"content": content, **({"tool_calls": calls} if calls else {})}

    def _think(self, delta: str) -> dict[str, Any] | None:
        self._raw += delta
        if self._thinking is None:
            if THINK.startswith(self._raw):
                self._thinking = True if self._raw == THINK else None
                return None
            self._thinking = False
            return self.feed(self._raw)
        thought = self._raw.removeprefix(THINK)
        if thought.endswith(THOUGHT):
            self._thinking = False
            return None
        held = _overlap(thought, THOUGHT)
        ready = thought[self._sent : len(thought) - held]
        self._sent += len(ready)
        if not held or ready:
            return {"reasoning": ready}
        return None

    def _content(self) -> str | None:
        end = self._text.find(OPEN)
        if end < 0:
            end = len(self._text) - _overlap(self._text, OPEN)
        start, self._shown = self._shown, max(end, self._shown)
        return self._text[start:end] or None

    def _calls(self) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for index, (body, whole) in enumerate(_regions(self._text)):
            if index >= len(self._args):
                named = re.search(r'"name"\s*:\s*"([^"]+)"', body)
                if named is None:
                    break
                self._args.append("")
                head = {"id": f"{self._call_id}-{index}", "type": "function", "index": index}
                deltas.append({**head, "function": {"name": named.group(1)}})
            found = re.search(r'"arguments"\s*:\s*', body)
            if found is None:
                continue
            args = body[found.end() :]
            if whole:
                args = args.rstrip().removesuffix("}").rstrip()
            sent = self._args[index]
            if len(args) > len(sent):
                self._args[index] = args
                deltas.append({"index": index, "function": {"arguments": args[len(sent) :]}})
        return deltas


def _regions(text: str) -> list[tuple[str, bool]]:
    """Return (JSON text, complete) for each opened call."""
    regions = []
    for part in text.split(OPEN)[1:]:
        body, closed, _ = part.partition(CLOSE)
        if not closed:
            body = body[: len(body) - _overlap(body, CLOSE)]
        body = body.strip()
        regions.append((body, bool(closed) or _is_json(body)))
    return regions


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` may be the head of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
