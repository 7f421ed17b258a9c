"""An engine's errors in the shape, types and codes of OpenAI; the status stays what the engine said.

vLLM writes ``{"error": {message, type, param, code}}`` with Python's class name as type and the HTTP status as code;
its authentication writes ``{"error": "Unauthorized"}``, FastAPI ``{"detail": ...}``, older versions
``{"object": "error", ...}``, whatever stands in front of it HTML. Clients act on the code: LangChain raises its
`ContextOverflowError` only where it reads `context_length_exceeded`. An error that is in OpenAI's shape already
passes as the bytes that came. Refuses nothing; the stored call keeps the raw text. Called by `exchange`, `model_cards`.
Source: vLLM 0.32, `entrypoints/serve/exception_handling`; OpenAI's API reference, "Error codes".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tracegrad.adapters.proxy.endpoints import Shape
from tracegrad.adapters.proxy.errors import error_body

_OVERFLOW = re.compile(
    r"maximum context length|longer than the maximum\s+model length|context_length_exceeded|context window",
    re.IGNORECASE,
)
"""Source: vLLM 0.32, `renderers/params.py`, `serve/utils/api_utils.get_max_tokens`, `v1/engine/input_processor.py`."""

OVERFLOW_WORDS = " (context_length_exceeded: the input exceeds the context window of this model)"
"""LangChain reads the text of the exception, not its code: the first word in an answer's, the rest in a stream's.
Newer SDKs leave the code out of that text. Source: langchain-openai 1.7, `_handle_openai_bad_request`."""

_NO_ROOM = "max_tokens must be at least 1, got 0"
"""What vLLM says of a prompt that fills the context to its last token, and of a client that asks for no tokens."""

_NO_MODEL = re.compile(r"\bmodel\b.*\bdoes not exist", re.IGNORECASE | re.DOTALL)
_OPENAI_TYPE = re.compile(r"[a-z][a-z_]*")
_MAX_TEXT = 500

_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    422: "unprocessable_entity",
    429: "rate_limit_exceeded",
    500: "engine_error",
    501: "not_implemented",
    502: "bad_gateway",
    503: "service_unavailable",
    504: "gateway_timeout",
}


@dataclass(frozen=True, slots=True)
class _Said:
    """What the engine said. `type` and `code` as they came."""

    message: str
    type: Any = None
    code: Any = None
    param: str | None = None


def openai_error(status: int, body: bytes, shape: Shape, request: Mapping[str, Any] | None = None) -> bytes:
    """Return the body of an engine's error answer as OpenAI would write it. `request` is what the client asked."""
    decoded = _decode(body)
    said = _read(decoded) if isinstance(decoded, Mapping) else None
    if said is None:
        return _rewritten(_Said(_text_of(status, body)), status, shape)
    if status == 404 and said.message == "Not Found":
        said = _Said(f"the engine of this model does not answer /{shape.path}")
    if said.message.startswith(_NO_ROOM) and not _asks_for_nothing(request or {}):
        said = _Said(f"the prompt leaves no room in the model's maximum context length: {said.message}")
    if _is_openai(said, decoded) and _code(said, status) == said.code:
        return body
    return _rewritten(said, status, shape)


def openai_error_event(data: bytes, shape: Shape) -> bytes:
    """Return the data of a stream's error event as OpenAI would write it.

    vLLM puts the status it would have answered with into `code`.
    """
    decoded = _decode(data)
    said = _read(decoded) if isinstance(decoded, Mapping) else None
    if said is None:
        return data
    if _is_openai(said, decoded):
        return data
    status = said.code if isinstance(said.code, int) and not isinstance(said.code, bool) else 500
    return _rewritten(said, status, shape)


def _asks_for_nothing(request: Mapping[str, Any]) -> bool:
    return 0 in (request.get("max_tokens"), request.get("max_completion_tokens"))


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _read(body: Mapping[str, Any]) -> _Said | None:
    """Return what an error object says, None where it is none that is known."""
    error = body.get("error", body)
    if isinstance(error, str):
        return _Said(error)
    if not isinstance(error, Mapping):
        return None
    message = error.get("message")
    if isinstance(message, str):
        param = error.get("param")
        return _Said(message, error.get("type"), error.get("code"), param if isinstance(param, str) else None)
    detail = error.get("detail")
    if detail is None:
        return None
    if isinstance(detail, str):
        return _Said(detail)
    first = detail[0] if isinstance(detail, list) and detail and isinstance(detail[0], Mapping) else {}
    where = first.get("loc")
    path = [str(part) for part in where if part != "body"] if isinstance(where, list) else []
    said = first.get("msg")
    text = said if isinstance(said, str) else msgspec.json.encode(detail).decode()[:_MAX_TEXT]
    return _Said(text, param=".".join(path) or None)


def _is_openai(said: _Said, body: Mapping[str, Any]) -> bool:
    """Whether the error is written as OpenAI writes it: under `error`, a snake-case type, no number as code."""
    known = isinstance(said.type, str) and _OPENAI_TYPE.fullmatch(said.type) is not None and said.type != "error"
    return isinstance(body.get("error"), Mapping) and known and (said.code is None or isinstance(said.code, str))


def _code(said: _Said, status: int) -> Any:
    if status in (400, 413, 422) and _OVERFLOW.search(said.message):
        return "context_length_exceeded"
    if status == 404 and _NO_MODEL.search(said.message):
        return "model_not_found"
    if said.code is None and isinstance(said.type, str) and _OPENAI_TYPE.fullmatch(said.type):
        return None
    if isinstance(said.code, str) and not said.code.isdigit():
        return said.code
    return _CODES.get(status, "engine_error" if status >= 500 else "invalid_request")


def _rewritten(said: _Said, status: int, shape: Shape) -> bytes:
    code, message, param = _code(said, status), said.message, said.param
    if code == "context_length_exceeded":
        param = shape.prompt
        message += OVERFLOW_WORDS
    elif code == "model_not_found":
        param = "model"
    kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    return error_body(message, kind=kind, code=code, param=param)


def _text_of(status: int, body: bytes) -> str:
    """Say what can be said of a body that is no error object. Markup is not shown: it is another server's page."""
    text = body[: 4 * _MAX_TEXT].decode(errors="replace").strip()
    if not text or "<" in text[:200]:
        return f"the engine answered HTTP {status} without an error message; its log may say why"
    return text[:_MAX_TEXT]
