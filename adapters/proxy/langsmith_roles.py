"""The role rules on what a LangSmith tree says of calls, as on what the hook says: a rule replaces its names.

A tree brings agent and node; the requested model and the fingerprint are those of the stored call, and of a call that
is not stored yet only the model's name is known. Headers are never stored, so a rule that wants one does not hold here.
A role that header, path or key gave asks no rule, and one that a rule gave when the call came stays: the tree's name is
then no disagreement. Refuses nothing. Called by `langsmith`, in a worker thread.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tracegrad.adapters.caller import caller_of
from tracegrad.adapters.fingerprint import fingerprint_of
from tracegrad.adapters.proxy.langsmith_wire import RunPart
from tracegrad.adapters.proxy.role_rules import Evidence, nodes_around, ruled_role
from tracegrad.tracestore.config import RoleRule
from tracegrad.tracestore.errors import Conflict, NotFound
from tracegrad.tracestore.records import Call, LateAttribution
from tracegrad.tracestore.store import Store

_EXPLICIT = ("header", "path", "key")


class TreeRoles:
    """The rules as they apply to the facts of a tree."""

    def __init__(self, store: Store, rules: Sequence[RoleRule]) -> None:
        self._store = store
        self._rules = rules

    def ruled(self, facts: Iterable[LateAttribution], part: RunPart, project: str) -> Iterator[LateAttribution]:
        """Yield what is to be said of the calls of a model run. Raises StoreUnavailable."""
        for fact in facts:
            call = self._call(fact, project) if self._rules else None
            source = None if call is None else call.attribution.role_source
            if not self._rules or source in _EXPLICIT:
                yield fact
                continue
            role = None if source == "rule" else ruled_role(self._rules, _evidence(part, call))
            said = source == "rule" or role is not None
            yield replace(fact, role=None) if said else fact
            if role is not None:
                yield LateAttribution(source="rule", call_id=fact.call_id, completion_id=fact.completion_id, role=role)

    def _call(self, fact: LateAttribution, project: str) -> Call | None:
        named = fact.call_id or fact.completion_id
        assert named is not None
        try:
            return self._store.get_call(self._store.find_call(named, project)[0])
        except (NotFound, Conflict):
            return None


def _evidence(part: RunPart, call: Call | None) -> Evidence:
    caller = caller_of({"metadata": part.metadata})
    said_model = part.metadata.get("ls_model_name")
    return Evidence(
        agent=caller.role,
        nodes=nodes_around(caller.node, caller.namespace),
        model=call.requested_model if call is not None else said_model if isinstance(said_model, str) else None,
        fingerprint=None if call is None else fingerprint_of(call.request),
    )
