"""The fingerprint of a prompt: a digest of its system prompt and the names of its tools.

Calls of one role usually share it, whatever the user asked; that makes it a handle on a role where nothing else says
who calls. A system prompt with a date or retrieved text in it gives a new one each time: it is no handle then. Pure,
no I/O. Called by the proxy (role rules, inference) and by `tracegrad show --json`, from which people copy it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec


def fingerprint_of(request: Mapping[str, Any]) -> str | None:
    """Return `fp_` and 16 hex digits for a chat request; None where it has neither system prompt nor tools.

    The system prompt is the text of the system and developer messages that come first. The order of the tools is of no
    account, and so are their descriptions.
    """
    prompt = _system_prompt(request.get("messages"))
    tools = _tool_names(request.get("tools"))
    if not prompt and not tools:
        return None
    return "fp_" + hashlib.blake2b(msgspec.json.encode([prompt, tools]), digest_size=8).hexdigest()


def _system_prompt(messages: Any) -> list[str]:
    prompt: list[str] = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "developer"):
            break
        prompt.append(_text(message.get("content")))
    return prompt


def _tool_names(tools: Any) -> list[str]:
    found = set()
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping):
            found.add(str(function.get("name")))
    return sorted(found)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""
