"""What the proxy answers when it cannot answer: OpenAI-shaped errors.

Raised by every module of the proxy, turned into a response (or an SSE error event) by `app` and `exchange`. An error of
the engine is not one of these: its status and body are passed on as they came.

ProxyError
├── InvalidRequest     400  the body, a header or a field cannot be used
├── InvalidKey         401  a key is needed, and none that is valid came with the request
├── MissingScope       403  the key may not do this
├── OtherProject       403  the run belongs to another project than the key
├── UnknownPath        404  not a path of this proxy
├── UnknownModel       404  no engine serves the requested model
├── UnknownRecord      404  the store has no such run, group or call
├── MethodNotAllowed   405  the path exists, the method does not
├── StateConflict      409  the record exists and says something else
├── BodyTooLarge       413  the body is larger than proxy.limits.max_body_bytes
├── EngineUnreachable  503  the engine broke the connection before it had answered; the client may come back
├── Held               503  held until the client's own deadline came near; it shall come back
├── EngineTimeout      504  the engine sent nothing for proxy.upstream_timeout_s
├── StoreDown          503  the store cannot be reached
├── WorkerDown         503  the one of our workers that must answer this is being started again
└── NotRecorded        503  the answer was sampled and could not be committed, so it is withheld (law 3)
"""

from typing import ClassVar

import msgspec

from tracegrad.tracestore.errors import Conflict, NotFound, StoreUnavailable, TraceStoreError


class ProxyError(Exception):
    """Root. `message` says what, which id, and what to do; `param` names the offending field."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    default_code: ClassVar[str] = "internal_error"
    default_retry_after_s: ClassVar[int | None] = None
    """Seconds after which the client shall try again, None where that is its own affair."""

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s

    def body(self) -> bytes:
        """Return the JSON object that OpenAI's SDK turns into an exception."""
        return error_body(self.message, kind=self.type, code=self.code, param=self.param)


class InvalidRequest(ProxyError):
    """The request cannot be used as sent."""

    status, type, default_code = 400, "invalid_request_error", "invalid_request"


class InvalidKey(ProxyError):
    """No valid key came with the request."""

    status, type, default_code = 401, "invalid_request_error", "invalid_api_key"


class MissingScope(ProxyError):
    """The key is valid and may not do this."""

    status, type, default_code = 403, "permission_error", "missing_scope"


class OtherProject(ProxyError):
    """The key belongs to another project than what it asks for."""

    status, type, default_code = 403, "permission_error", "other_project"


class UnknownPath(ProxyError):
    """Only the listed paths exist; nothing else goes to the engine."""

    status, type, default_code = 404, "invalid_request_error", "unknown_path"


class UnknownModel(ProxyError):
    """No engine serves that model."""

    status, type, default_code = 404, "invalid_request_error", "model_not_found"


class UnknownRecord(ProxyError):
    """The store has no such record."""

    status, type, default_code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(ProxyError):
    """The path does not take that method."""

    status, type, default_code = 405, "invalid_request_error", "method_not_allowed"


class StateConflict(ProxyError):
    """The record exists and says something else, or its state forbids the change."""

    status, type, default_code = 409, "invalid_request_error", "conflict"


class BodyTooLarge(ProxyError):
    """The request body exceeds the configured limit."""

    status, type, default_code = 413, "invalid_request_error", "body_too_large"


class EngineUnreachable(ProxyError):
    """The engine broke the connection, or is somebody else's and cannot be reached."""

    status, type, default_code = 503, "api_connection_error", "engine_unreachable"
    default_retry_after_s = 1


class Held(ProxyError):
    """The model did not take calls while the client could wait."""

    status, type, default_code = 503, "server_error", "held"


class EngineTimeout(ProxyError):
    """The engine was silent for too long."""

    status, type, default_code = 504, "api_connection_error", "engine_timeout"


class StoreDown(ProxyError):
    """The trace store cannot be reached."""

    status, type, default_code = 503, "server_error", "store_unavailable"


class WorkerDown(ProxyError):
    """Another process of this proxy must answer, and does not."""

    status, type, default_code = 503, "server_error", "worker_unavailable"
    default_retry_after_s = 1


class NotRecorded(ProxyError):
    """The call could not be committed; the answer is withheld."""

    status, type, default_code = 503, "server_error", "call_not_recorded"


def error_body(message: str, *, kind: str, code: str | None, param: str | None = None) -> bytes:
    """Return ``{"error": {...}}`` in OpenAI's shape, as JSON bytes."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": code, "param": param}})


def from_store(error: TraceStoreError) -> ProxyError:
    """Return the HTTP face of a store error."""
    if isinstance(error, NotFound):
        return UnknownRecord(str(error))
    if isinstance(error, Conflict):
        return StateConflict(str(error))
    if isinstance(error, StoreUnavailable):
        return StoreDown(str(error))
    return InvalidRequest(str(error))
