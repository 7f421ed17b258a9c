"""What groups lack, and those whose members earned the same: groups that may train, never those of purpose `eval`.

Read only, no payload. Called by `tracegrad doctor`, through `Store`.
"""

from typing import Any

from sqlalchemy import ColumnElement, and_, case, exists, func, literal, or_, select, true

from tracegrad.tracestore.diagnosis_extent import groups_within, has_content
from tracegrad.tracestore.diagnosis_records import Extent, FlatGroups, GroupCounts
from tracegrad.tracestore.diagnosis_tallies import how_many, plain_counts, tallied
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.schema import groups, rewards, runs


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
        self, extent: Extent, reward_names: tuple[str, ...] = (), reward_sources: tuple[str, ...] = ()
    ) -> FlatGroups:
        """Return the groups whose members were all rewarded the same: they have no advantage over one another.

        Compared are the current rewards of closed members, by name and role, in groups that may train (not `eval`).
        `reward_names`, `reward_sources`: only those count (empty: all), as by a lease rule.
        """
        newer = rewards.alias("newer")
        outdated = exists().where(
            newer.c.run_id == runs.c.run_id,
            groups.c.group_id == runs.c.group_id,  # so that it is asked of runs in groups only
            newer.c.name == rewards.c.name,
            newer.c.seq > rewards.c.seq,
            _same(newer.c.role, rewards.c.role),
            _same(newer.c.call_id, rewards.c.call_id),
            newer.c.source.in_(reward_sources) if reward_sources else true(),
        )
        one_name = (
            select(
                runs.c.group_id,
                func.count(func.distinct(rewards.c.run_id)).label("members"),
                case((func.max(rewards.c.value) > func.min(rewards.c.value), 1), else_=0).label("differs"),
            )
            .join_from(rewards, runs, runs.c.run_id == rewards.c.run_id)
            .join(groups, groups.c.group_id == runs.c.group_id)
            .where(groups_within(extent), groups.c.purpose != "eval", runs.c.status == "closed", ~outdated)
            .group_by(runs.c.group_id, rewards.c.name, rewards.c.role)
        )
        if reward_names:
            one_name = one_name.where(rewards.c.name.in_(reward_names))
        if reward_sources:
            one_name = one_name.where(rewards.c.source.in_(reward_sources))
        named = one_name.subquery("one_name")
        group = (
            select(named.c.group_id, func.max(named.c.differs).label("differs"))
            .group_by(named.c.group_id)
            .having(func.max(named.c.members) > 1)
            .subquery("compared_group")
        )
        flat = group.c.differs == 0
        chosen = select(
            func.count().label("compared"),
            how_many(flat).label("flat"),
            func.max(case((flat, group.c.group_id))).label("example"),
        ).select_from(group)
        with self._db.read() as connection:
            return FlatGroups(**plain_counts(connection.execute(chosen).one()))


def _same(left: ColumnElement[Any], right: ColumnElement[Any]) -> ColumnElement[bool]:
    return or_(left == right, and_(left.is_(None), right.is_(None)))
