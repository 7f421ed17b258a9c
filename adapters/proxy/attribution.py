"""Who is calling: explicit headers first, then the URL prefix. What said so is recorded with the call.

Headers are `x-tracegrad-run`, `x-tracegrad-role`, `x-tracegrad-span` (percent-encoded compact JSON of a span without
its run) and `x-tracegrad-source` ("hook" where our hook added them). They never go to the engine. The URL prefix is
`/run/{run}`, `/role/{role}` or both, in this order, before the OpenAI path. Refuses (400) a header that cannot be
read: a wrong attribution is worse than none. Called by `app` for paths and by `chat` for calls.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, unquote_to_bytes

import msgspec

from tracegrad.adapters.proxy.errors import InvalidRequest
from tracegrad.tracestore.records import Attribution, RoleSource, Span

PREFIX = b"x-tracegrad-"
MAX_ID_CHARS = 256


@dataclass(frozen=True, slots=True)
class Route:
    """A path with its attribution taken off. `path` is percent-decoded and starts with a slash."""

    path: str
    run_id: str | None = None
    role: str | None = None


class _SpanHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    span_id: str
    name: str
    kind: Literal["node", "tool", "graph"] = "node"
    parent_span_id: str | None = None
    namespace: str | None = None
    superstep: int | None = None
    triggers: tuple[str, ...] = ()


def split_path(raw_path: bytes) -> Route:
    """Take `/run/{run}` and `/role/{role}` off the front of a still percent-encoded path.

    Raises:
        InvalidRequest: an id in the path is empty, too long or not printable.
    """
    segments = raw_path.decode("ascii", "replace").split("/")[1:]
    found: dict[str, str] = {}
    for key in ("run", "role"):
        if len(segments) >= 3 and segments[0] == key:
            found[key] = _checked(unquote(segments[1]), f"the {key} in the URL")
            segments = segments[2:]
    return Route("/" + unquote("/".join(segments)), found.get("run"), found.get("role"))


def attribute(headers: Mapping[bytes, bytes], route: Route) -> Attribution:
    """Return who called. `headers` have lower-case names.

    A span is kept only with a run: it is a place inside one.

    Raises:
        InvalidRequest: a tracegrad header cannot be read.
    """
    said_by: RoleSource = "hook" if headers.get(b"x-tracegrad-source") == b"hook" else "header"
    run_id, run_source = _pick(headers, b"run", route.run_id, said_by)
    role, role_source = _pick(headers, b"role", route.role, said_by)
    span = headers.get(b"x-tracegrad-span")
    return Attribution(
        run_id=run_id,
        run_source=run_source,
        role=role,
        role_source=role_source,
        span=_span(span, run_id) if span and run_id is not None else None,
    )


def without_ours(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return `headers` less our own: those must not reach the engine."""
    return [(name, value) for name, value in headers if not name.startswith(PREFIX)]


def _pick(
    headers: Mapping[bytes, bytes], name: bytes, in_path: str | None, said_by: RoleSource
) -> tuple[str | None, RoleSource | None]:
    value = headers.get(PREFIX + name)
    if value:
        return _checked(_text(unquote_to_bytes(value), name), f"the header x-tracegrad-{name.decode()}"), said_by
    return in_path, None if in_path is None else "path"


def _span(header: bytes, run_id: str) -> Span:
    try:
        fields = msgspec.json.decode(unquote_to_bytes(header), type=_SpanHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"the header x-tracegrad-span cannot be read: {error}; send percent-encoded JSON",
            code="invalid_attribution",
        ) from error
    return Span(run_id=run_id, **msgspec.structs.asdict(fields))


def _text(value: bytes, name: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the header x-tracegrad-{name.decode()} is not UTF-8", code="invalid_attribution"
        ) from error


def _checked(value: str, where: str) -> str:
    if not value or len(value) > MAX_ID_CHARS or not value.isprintable():
        raise InvalidRequest(
            f"{where} must be 1 to {MAX_ID_CHARS} printable characters, not {value[:40]!r}", code="invalid_attribution"
        )
    return value
