"""Who calls, once everything is heard: the claims of a request, the role rules, and what was learned from others.

A rule gives a role where header, path and key give none; it comes before the hook, whose names it may replace, and is
a source of its own. With `infer_roles`, a call that nobody gives a role gets the one with which its
fingerprint was seen before in this project, if there was exactly one: by this process, since it started. Refuses (400)
what `attribution` refuses. Called by `chat`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tracegrad.adapters.fingerprint import fingerprint_of
from tracegrad.adapters.proxy.attribution import Claim, SpanHeader, read_claims, read_span, settle
from tracegrad.adapters.proxy.role_rules import Evidence, nodes_around, ruled_role
from tracegrad.adapters.proxy.wire import Request
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import Attribution

CAPACITY = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Who called, and everything that was claimed, from which dissent follows."""

    attribution: Attribution
    claims: tuple[Claim, ...]


class Roles:
    """The rules and the memory of one proxy process."""

    def __init__(self, config: Config) -> None:
        self._rules = config.role_rules
        self._infers = config.infer_roles
        self._reads_prompt = self._infers or any(rule.fingerprint is not None for rule in self._rules)
        self._seen: OrderedDict[tuple[str, str], set[str]] = OrderedDict()

    def place(self, request: Request, body: Mapping[str, Any], project: str) -> Placed:
        """Return who called. `body` is the decoded request. Raises InvalidRequest."""
        claims = read_claims(request.headers, request.route, request.key)
        span = read_span(request.headers)
        fingerprint = fingerprint_of(body) if self._reads_prompt else None
        if self._rules and all(claim.role is None for claim in claims if claim.source != "hook"):
            claims = self._ruled(claims, _evidence(claims, span, request.headers, body, fingerprint))
        settled = settle(claims, span)
        if self._infers and fingerprint is not None:
            if settled.role is not None and settled.role_source != "inferred":
                self._learn(project, fingerprint, settled.role)
            elif settled.role is None and (role := self._only_role(project, fingerprint)) is not None:
                settled = replace(settled, role=role, role_source="inferred")
        return Placed(attribution=settled, claims=tuple(claims))

    def _ruled(self, claims: list[Claim], evidence: Evidence) -> list[Claim]:
        """Put the first rule that holds before what the hook says of the role, which it replaces."""
        role = ruled_role(self._rules, evidence)
        if role is None:
            return claims
        return [Claim(source="rule", role=role), *(replace(claim, role=None) for claim in claims)]

    def _learn(self, project: str, fingerprint: str, role: str) -> None:
        self._seen.setdefault((project, fingerprint), set()).add(role)
        self._seen.move_to_end((project, fingerprint))
        while len(self._seen) > CAPACITY:
            self._seen.popitem(last=False)

    def _only_role(self, project: str, fingerprint: str) -> str | None:
        roles = self._seen.get((project, fingerprint), ())
        return next(iter(roles)) if len(roles) == 1 else None


def _evidence(
    claims: list[Claim],
    span: SpanHeader | None,
    headers: Mapping[bytes, bytes],
    body: Mapping[str, Any],
    fingerprint: str | None,
) -> Evidence:
    model = body.get("model")
    return Evidence(
        agent=next((claim.role for claim in claims if claim.source == "hook"), None),
        nodes=frozenset() if span is None else nodes_around(span.name, span.namespace),
        model=model if isinstance(model, str) else None,
        headers=headers,
        fingerprint=fingerprint,
    )
