"""What a client may send to an engine: fields and headers that reach deeper than a request are refused (400).

vLLM takes far more than OpenAI's fields. Some of them choose other weights, code or prompts than the operator
configured, make the engine fetch URLs, read another request's cache, or pass other clients in the queue. Each is
refused unless `proxy.access.allow` names its switch; what has no switch is never let through. Everything else passes,
unknown fields too: `chat_template_kwargs` as well, because it only fills variables of the operator's own template
(models switch thinking on and off by it), but not the `chat_template` that may hide in it.
The prefix cache is salted per project, so that the time to the first token tells nobody what another project asked.
Called by `capture` (bodies) and `chat` (headers). Source: vLLM 0.32, `openai/*/protocol.py`, `renderers/chat_utils.py`,
`generate/base/serving.py`.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tracegrad.adapters.proxy.errors import InvalidRequest
from tracegrad.tracestore.config import Allowed

NEVER = ("kv_transfer_params", "ec_transfer_params", "lora_request", "lora_path", "lora_name", "lora_modules")
"""Fields that no configuration lets through: they make the engine read other requests' caches or other weights."""

SWITCHES: Mapping[str, Allowed] = {
    "chat_template": "chat_template",
    "mm_processor_kwargs": "media_kwargs",
    "media_io_kwargs": "media_kwargs",
    "prompt_embeds": "embeds",
    "priority": "priority",
}
"""Field -> the word in `proxy.access.allow` that lets it through."""

_HEADERS: Mapping[bytes, Allowed | None] = {b"x-vllm-priority": "priority", b"x-data-parallel-rank": None}
_CARRIERS = ("vllm_xargs", "extra", "extra_args", "extra_body")
"""Fields that hold fields."""

_MEDIA = ("image_url", "audio_url", "video_url", "file_url")
_EMBEDS = ("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds")
_SALT_CHARS = 128
_SALT_FORBIDDEN = frozenset("@/\\\x00")


def check_body(body: Mapping[str, Any], allow: Collection[Allowed]) -> None:
    """Let a client's request pass, or not.

    Raises:
        InvalidRequest: with code `field_not_allowed`, the field as `param`, and the setting that would allow it.
    """
    carriers = [body, *(carrier for name in _CARRIERS if isinstance(carrier := body.get(name), Mapping))]
    for carrier in carriers:
        for name in NEVER:
            if carrier.get(name) is not None:
                raise _not_allowed(name, None)
        for name, switch in SWITCHES.items():
            if carrier.get(name) and switch not in allow:
                raise _not_allowed(name, switch)
    variables = body.get("chat_template_kwargs")
    if isinstance(variables, Mapping) and variables.get("chat_template") is not None and "chat_template" not in allow:
        raise _not_allowed("chat_template_kwargs.chat_template", "chat_template")
    for where in ("messages", "input"):
        for part in _parts(body.get(where)):
            _check_part(part, where, allow)


def check_headers(headers: Mapping[bytes, bytes], allow: Collection[Allowed]) -> None:
    """The same for headers that vLLM reads. `headers` have lower-case names. Raises as `check_body`."""
    for name, switch in _HEADERS.items():
        if name in headers and (switch is None or switch not in allow):
            raise _not_allowed(name.decode(), switch)


def salt_of(project: str, theirs: Any) -> str | None:
    """Return the cache salt of a request: a digest of the project and of the client's own salt, where it sent one.

    None where the client's is one that the engine refuses: that error stays the engine's to report.
    """
    if theirs is None:
        return hashlib.blake2b(project.encode(), digest_size=16).hexdigest()
    if not isinstance(theirs, str) or not theirs or len(theirs) > _SALT_CHARS or _SALT_FORBIDDEN & set(theirs):
        return None
    return hashlib.blake2b(f"{project}\0{theirs}".encode(), digest_size=16).hexdigest()


def _parts(messages: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the content parts of chat messages; a text content has none. Batched conversations are looked into."""
    if not isinstance(messages, list):
        return
    for message in messages:
        if isinstance(message, list):
            yield from _parts(message)
        elif isinstance(message, Mapping) and isinstance(content := message.get("content"), list):
            yield from (part for part in content if isinstance(part, Mapping))


def _check_part(part: Mapping[str, Any], where: str, allow: Collection[Allowed]) -> None:
    for name in _MEDIA:
        if (said := part.get(name)) is not None and "media_urls" not in allow:
            url = said.get("url") if isinstance(said, Mapping) else said
            if isinstance(url, str) and not url[:5].lower() == "data:":
                raise _not_allowed(f"{where}[].content[].{name}", "media_urls", "a URL other than `data:`")
    for name in _EMBEDS:
        if (part.get("type") == name or part.get(name) is not None) and "embeds" not in allow:
            raise _not_allowed(f"{where}[].content[].{name}", "embeds")


def _not_allowed(name: str, switch: Allowed | None, what: str = "the field") -> InvalidRequest:
    remedy = "remove it" if switch is None else f"remove it, or let the operator set `proxy.access.allow: [{switch}]`"
    kind = what if what == "the field" else f"{what} in"
    return InvalidRequest(
        f"{kind} {name!r} is not allowed through this proxy; {remedy}", code="field_not_allowed", param=name
    )
