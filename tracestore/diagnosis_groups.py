"""What groups lack, and those whose members earned the same: groups that may train, never those of purpose `eval`.

Read only, no payload. What members earned is compared in Python, since it is a weighted sum over what stands on a call,
its role and its run: their rewards are streamed group by group. Called by `tracegrad doctor`, through `Store`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import fsum
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, and_, case, exists, func, literal, null, select, true, union_all

from tracegrad.tracestore.diagnosis_extent import groups_within
from tracegrad.tracestore.diagnosis_records import Extent, FlatGroups, GroupCounts
from tracegrad.tracestore.diagnosis_tallies import how_many, tallied
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.readiness import calls_that_count, is_allowed, is_exact, is_rewarded, rewards_that_count
from tracegrad.tracestore.records import LeaseRule
from tracegrad.tracestore.runs import has_content
from tracegrad.tracestore.schema import calls, groups, rewards, runs

_FETCH = 1_000


class GroupDiagnosis(Noun):
    """The part of the store that says what is wrong with groups."""

    def count_groups(self, extent: Extent) -> GroupCounts:
        """Return how many groups lack what. Groups of purpose `eval`, never leased, are not counted."""
        silent = ~exists().where(rewards.c.run_id == runs.c.run_id)
        unrewarded = and_(runs.c.status == "closed", has_content(), silent)
        group = (
            select(
                groups.c.group_id,
                groups.c.planned_size.label("planned"),
                func.count(runs.c.run_id).label("members"),
                how_many(runs.c.status == "open").label("open"),
                how_many(runs.c.status == "failed").label("failed"),
                how_many(unrewarded).label("unrewarded"),
            )
            .select_from(groups.outerjoin(runs, runs.c.group_id == groups.c.group_id))
            .where(groups_within(extent), groups.c.purpose != "eval")
            .group_by(groups.c.group_id, groups.c.planned_size)
            .subquery("counted_group")
        )
        lacks = case(
            (group.c.members < group.c.planned, literal("missing")),
            (group.c.open > 0, literal("running")),
            (group.c.failed > 0, literal("failed")),
            (group.c.unrewarded > 0, literal("unrewarded")),
            else_=literal("whole"),
        ).label("lacks")
        judged = select(lacks, group.c.group_id).subquery("judged")
        chosen = select(judged.c.lacks, func.count(), func.max(judged.c.group_id)).group_by(judged.c.lacks)
        with self._db.read() as connection:
            found = {one.what: one for one in tallied(connection, chosen)}
        counts = {what: found[what].count for what in ("missing", "running", "failed", "unrewarded") if what in found}
        examples = {f"{what}_example": found[what].example for what in counts if what != "running"}
        return GroupCounts(groups=sum(one.count for one in found.values()), **counts, **examples)  # type: ignore[arg-type]

    def count_flat_groups(
        self,
        extent: Extent,
        rule: LeaseRule | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        scope: str = "call",
    ) -> FlatGroups:
        """Return the groups whose members all earned the same: they have no advantage over one another.

        Compared are closed members that `rule` could lease, by their current rewards that count by it, weighed by
        `weights` (name -> weight; empty or None weighs every name 1): for each role that called, what stands on the
        call, the role and the run; the run's own where a role called in one member alone. In the scopes `role` and
        `graph`, where rewards reach earlier calls, members also differ where the sums over their role, or over all,
        do; discounts are left out. Calls of a role that earned differently make a difference wherever they stand.
        Without a rule every call and every reward counts.
        """
        compared, flat, example = 0, 0, None
        with self._db.read() as connection:
            rows = connection.execute(_earnings(extent, rule), execution_options={"yield_per": _FETCH})
            for group_id, found in groupby(rows, key=lambda row: str(row.group_id)):
                varied = _varied(_members(found, weights), scope)
                if varied is not None:
                    compared += 1
                if varied is False:
                    flat, example = flat + 1, max(example or "", group_id)
        return FlatGroups(compared=compared, flat=flat, example=example)


@dataclass(slots=True)
class _Member:
    """A closed run of a group: how often each role called, and its weighted rewards by what they stand on.

    `elsewhere`: on calls that do not count, of another model perhaps.
    """

    calls: dict[str | None, int] = field(default_factory=dict)
    own: list[float] = field(default_factory=list)
    by_role: dict[str | None, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_call: dict[str | None, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(dict))
    elsewhere: list[float] = field(default_factory=list)

    def returns(self, role: str | None) -> set[float]:
        """What the calls of a role earned; nothing where no reward stands on them."""
        shared, marked = [*self.own, *self.by_role.get(role, ())], self.by_call.get(role, {})
        found = {fsum([*shared, *values]) for values in marked.values()}
        if shared and len(marked) < self.calls.get(role, 0):
            found.add(fsum(shared))
        return found

    def of_role(self, role: str | None) -> list[float]:
        """All that stands on the run, the role, and calls of the role."""
        return [*self.own, *self.by_role.get(role, ()), *_flattened(self.by_call.get(role, {}).values())]

    def everything(self) -> list[float]:
        """All that stands anywhere in the run."""
        on_calls = _flattened(values for marked in self.by_call.values() for values in marked.values())
        return [*self.own, *_flattened(self.by_role.values()), *on_calls, *self.elsewhere]


def _earnings(extent: Extent, rule: LeaseRule | None) -> CompoundSelect[Any]:
    """Select, group by group, the roles that called in its closed runs (`calls` of them), and every reward by arrival.

    A reward on a call has the call's role; `calls` is 1 where that call counts, else 0.
    """
    wanted = select(groups.c.group_id).where(groups_within(extent), groups.c.purpose != "eval")
    closed = and_(runs.c.group_id.in_(wanted), runs.c.status == "closed")
    called = (
        select(
            runs.c.group_id,
            runs.c.run_id,
            calls.c.role,
            func.count().label("calls"),
            null().label("call_id"),
            null().label("name"),
            null().label("value"),
            literal(0).label("seq"),
        )
        .join_from(calls, runs, runs.c.run_id == calls.c.run_id)
        .where(closed, _counts(rule), true() if rule is None else and_(is_allowed(rule), is_rewarded(rule)))
        .group_by(runs.c.group_id, runs.c.run_id, calls.c.role)
    )
    earned = (
        select(
            runs.c.group_id,
            runs.c.run_id,
            func.coalesce(rewards.c.role, calls.c.role).label("role"),
            case((_counts(rule), 1), else_=0).label("calls"),
            rewards.c.call_id,
            rewards.c.name,
            rewards.c.value,
            rewards.c.seq,
        )
        .join_from(rewards, runs, runs.c.run_id == rewards.c.run_id)
        .outerjoin(calls, calls.c.call_id == rewards.c.call_id)
        .where(closed, true() if rule is None else rewards_that_count(rule))
    )
    return union_all(earned, called).order_by("group_id", "seq")


def _counts(rule: LeaseRule | None) -> ColumnElement[bool]:
    return calls.c.endpoint != "embeddings" if rule is None else and_(calls_that_count(rule), is_exact())


def _members(rows: Iterable[Any], weights: Mapping[str, float] | None) -> list[_Member]:
    """Return the members of a group in which a call counts, each with its current rewards."""
    members: dict[str, _Member] = defaultdict(_Member)
    current: dict[tuple[str, str | None, str | None, str], tuple[float, bool]] = {}
    for row in rows:
        if row.name is None:
            members[row.run_id].calls[row.role] = int(row.calls)
        elif not weights or row.name in weights:
            value = row.value * (weights[row.name] if weights else 1.0)
            current[row.run_id, row.role, row.call_id, row.name] = (value, bool(row.calls))
    for (run_id, role, call_id, _), (value, counts) in current.items():
        member = members[run_id]
        if call_id is not None and counts:
            member.by_call[role].setdefault(call_id, []).append(value)
        elif call_id is not None:
            member.elsewhere.append(value)
        elif role is not None:
            member.by_role[role].append(value)
        else:
            member.own.append(value)
    return [member for member in members.values() if member.calls]


def _varied(members: list[_Member], scope: str) -> bool | None:
    """Whether the members of a group differ in what they earned; None where there is nothing to compare."""
    own = [fsum(member.own) for member in members if member.own]
    compared: list[list[float]] = []
    for role in {role for member in members for role in member.calls}:
        cell = [member for member in members if member.returns(role)]
        if len(cell) > 1:
            compared.append(_flattened(member.returns(role) for member in cell))
            compared.append([fsum(member.of_role(role)) for member in cell] if scope != "call" else [])
        elif cell and cell[0].own:
            compared.append(own)
    if scope == "graph":
        compared.append([fsum(member.everything()) for member in members if member.everything()])
    told = [len(set(values)) > 1 for values in compared if len(values) > 1]
    return any(told) if told else None


def _flattened(several: Iterable[Iterable[float]]) -> list[float]:
    return [value for each in several for value in each]
