"""Who is calling: every source that says so, by rank. The first that says a thing wins, and is recorded with the call.

The ranks: explicit headers, the URL prefix, the API key's own run and role, the role rules (see `roles`), the hook, and
what is inferred. A source that says something else than the winner is a dissent, recorded beside the call. Headers are
`x-tracegrad-run`, `x-tracegrad-role`, `x-tracegrad-span` (percent-encoded compact JSON of a span without its run) and
`x-tracegrad-source` ("hook" where our hook added them). They never go to the engine. The URL prefix is `/run/{run}`,
`/role/{role}` or both, in this order, before the OpenAI path. Refuses (400) a header that cannot be read: a wrong
attribution is worse than none. Called by `app` for paths and by `roles` for calls.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import unquote, unquote_to_bytes

import msgspec

from tracegrad.adapters.proxy.access import KEY_HEADERS, is_key
from tracegrad.adapters.proxy.errors import InvalidRequest
from tracegrad.tracestore.records import ApiKey, Attribution, LateAttribution, RoleSource, Span

PREFIX = b"x-tracegrad-"
MAX_ID_CHARS = 256


@dataclass(frozen=True, slots=True)
class Route:
    """A path with its attribution taken off. `path` is percent-decoded and starts with a slash."""

    path: str
    run_id: str | None = None
    role: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What one source says."""

    source: RoleSource
    run_id: str | None = None
    role: str | None = None


class SpanHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The place in a graph that a header names; its run is named beside it."""

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


def attribute(headers: Mapping[bytes, bytes], route: Route, key: ApiKey | None = None) -> Attribution:
    """Return who called by headers, path and key alone. Raises InvalidRequest."""
    return settle(read_claims(headers, route, key), read_span(headers))


def read_claims(headers: Mapping[bytes, bytes], route: Route, key: ApiKey | None = None) -> list[Claim]:
    """Return what headers, path and key say, by rank. `headers` have lower-case names.

    Raises:
        InvalidRequest: a tracegrad header cannot be read.
    """
    by_hook = headers.get(b"x-tracegrad-source") == b"hook"
    in_headers = Claim(
        source="hook" if by_hook else "header", run_id=_header(headers, b"run"), role=_header(headers, b"role")
    )
    in_path = Claim(source="path", run_id=route.run_id, role=route.role)
    of_key = Claim(source="key", run_id=key.run_id, role=key.role) if key is not None else None
    ranked = [in_path, of_key, in_headers] if by_hook else [in_headers, in_path, of_key]
    return [claim for claim in ranked if claim is not None and (claim.run_id is not None or claim.role is not None)]


def settle(claims: Iterable[Claim], span: SpanHeader | None = None) -> Attribution:
    """Return who called: of each thing what the first claim says that says it.

    A span is kept only with a run: it is a place inside one.
    """
    settled = Attribution()
    for claim in claims:
        if settled.run_id is None and claim.run_id is not None:
            settled = replace(settled, run_id=claim.run_id, run_source=claim.source)
        if settled.role is None and claim.role is not None:
            settled = replace(settled, role=claim.role, role_source=claim.source)
    if span is None or settled.run_id is None:
        return settled
    return replace(settled, span=Span(run_id=settled.run_id, **msgspec.structs.asdict(span)))


def dissent(claims: Iterable[Claim], settled: Attribution, call_id: str) -> list[LateAttribution]:
    """Return what claims say otherwise than `settled`, as facts for the store."""
    found = []
    for claim in claims:
        run_id = claim.run_id if claim.run_id != settled.run_id else None
        role = claim.role if claim.role != settled.role else None
        if run_id is not None or role is not None:
            found.append(LateAttribution(source=claim.source, call_id=call_id, run_id=run_id, role=role))
    return found


def read_span(headers: Mapping[bytes, bytes]) -> SpanHeader | None:
    """Return the place in a graph that a request names, None where it names none. Raises InvalidRequest."""
    header = headers.get(b"x-tracegrad-span")
    if not header:
        return None
    try:
        return msgspec.json.decode(unquote_to_bytes(header), type=SpanHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"the header x-tracegrad-span cannot be read: {error}; send percent-encoded JSON",
            code="invalid_attribution",
        ) from error


def without_ours(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return `headers` less what must not reach the engine: our own, keys of ours, and the encoding we have undone."""
    return [
        (name, value)
        for name, value in headers
        if not name.startswith(PREFIX) and name != b"content-encoding" and not (name in KEY_HEADERS and is_key(value))
    ]


def _header(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(PREFIX + name)
    if not value:
        return None
    return _checked(_text(unquote_to_bytes(value), name), f"the header x-tracegrad-{name.decode()}")


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
