"""The role rules of the configuration: the first all of whose conditions hold gives the role. Pure.

Refuses nothing: what a rule wants to look at and nobody told does not hold. Called by `roles` for each request, and by
`langsmith_roles` for the model runs of a posted tree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tracegrad.tracestore.config import RoleRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a rule may look at. `headers` have lower-case names."""

    agent: str | None
    nodes: frozenset[str]
    model: str | None
    fingerprint: str | None
    headers: Mapping[bytes, bytes] = field(default_factory=dict)


def ruled_role(rules: Sequence[RoleRule], seen: Evidence) -> str | None:
    """Return the role that the rules give, None where none of them holds."""
    return next((rule.role for rule in rules if _holds(rule, seen)), None)


def nodes_around(node: str | None, namespace: str | None) -> frozenset[str]:
    """Return the node and those it runs in: `answerer:1f|model:2e` lies in `answerer` and `model`."""
    around = [segment.rsplit(":", 1)[0] for segment in (namespace or "").split("|") if segment]
    return frozenset(around if node is None else [node, *around])


def _holds(rule: RoleRule, seen: Evidence) -> bool:
    return (
        rule.agent in (None, seen.agent)
        and (rule.node is None or rule.node in seen.nodes)
        and rule.model in (None, seen.model)
        and rule.fingerprint in (None, seen.fingerprint)
        and all(seen.headers.get(name.lower().encode()) == value.encode() for name, value in rule.header.items())
    )
