"""What stands in the store, counted so that a person can see why something is not trained: calls, choices, groups.

Read only, and no payload is read: the counts come from metadata, aggregated by the database, so memory does not grow
with the store. Each method is one snapshot; on a store in use the figures of two methods may differ by what arrived
between them. Judges nothing: that is `tracegrad doctor`. What compares the calls of a run is in `diagnosis_siblings`,
what is about a training job in `diagnosis_jobs`, what needs payloads in `diagnosis_payloads`.
"""

from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, exists, func, literal, or_, select, true

from tracegrad.tracestore.diagnosis_extent import calls_within, groups_within, runs_within
from tracegrad.tracestore.diagnosis_records import (
    CallCounts,
    ChoiceCount,
    Extent,
    FlatGroups,
    GroupCounts,
    RunCount,
    Tally,
)
from tracegrad.tracestore.diagnosis_tallies import tallied
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.overview import drift_within
from tracegrad.tracestore.records import DriftCount
from tracegrad.tracestore.schema import CONTENT_DELETED, attributions, calls, choices, groups, rewards, runs


def _has_content() -> ColumnElement[bool]:
    """Whether the run of the row is more than the stub that a deletion leaves: that one lacks things on purpose."""
    return runs.c.error.is_distinct_from(CONTENT_DELETED)


class Diagnosis(Noun):
    """The part of the store that says what is wrong with its contents."""

    def count_calls(self, extent: Extent) -> CallCounts:
        """Return how the calls ended and what is unknown of them."""
        sampling = calls.c.endpoint != "embeddings"
        no_run, no_role = and_(sampling, calls.c.run_id.is_(None)), and_(sampling, calls.c.role.is_(None))
        chosen = select(
            func.count().label("calls"),
            _sum(calls.c.endpoint == "embeddings").label("embeddings"),
            _sum(and_(sampling, calls.c.status == "failed")).label("failed"),
            _sum(and_(sampling, calls.c.status == "aborted")).label("aborted"),
            _sum(calls.c.quarantine.is_not(None)).label("quarantined"),
            _sum(calls.c.retry_of.is_not(None)).label("retries"),
            _sum(no_run).label("no_run"),
            func.max(case((no_run, calls.c.call_id))).label("no_run_example"),
            _sum(no_role).label("no_role"),
            func.max(case((no_role, calls.c.call_id))).label("no_role_example"),
        ).where(calls_within(extent))
        with self._db.read() as connection:
            return CallCounts(**_plain(connection.execute(chosen).one()))

    def count_quarantines(self, extent: Extent) -> list[Tally]:
        """Return the reasons for which calls are quarantined, the most frequent first."""
        chosen = (
            select(calls.c.quarantine, func.count(), func.max(calls.c.call_id))
            .where(calls_within(extent), calls.c.quarantine.is_not(None))
            .group_by(calls.c.quarantine)
        )
        return self._tallies(chosen)

    def count_drift(self, extent: Extent) -> list[DriftCount]:
        """Return the calls that go on from an earlier call of their run, by model and cause of drift."""
        with self._db.read() as connection:
            return drift_within(connection, extent)

    def count_choices(self, extent: Extent) -> list[ChoiceCount]:
        """Return the choices by their flags and their end, the most frequent first."""
        evaluated = case((runs.c.purpose == "eval", 1), else_=0).label("evaluated")
        by = (choices.c.flags, choices.c.finish_reason, evaluated)
        chosen = (
            select(*by, func.count().label("n"), func.sum(choices.c.n_tokens).label("tokens"))
            .join_from(choices, calls, calls.c.seq == choices.c.seq)
            .outerjoin(runs, runs.c.run_id == calls.c.run_id)
            .where(calls_within(extent))
            .group_by(*by)
        )
        with self._db.read() as connection:
            found = [
                ChoiceCount(
                    flags=tuple(row.flags),
                    finish_reason=row.finish_reason,
                    choices=int(row.n),
                    tokens=int(row.tokens),
                    evaluated=bool(row.evaluated),
                )
                for row in connection.execute(chosen)
            ]
        return sorted(found, key=lambda one: (-one.choices, one.flags, one.finish_reason or "", one.evaluated))

    def count_conflicts(self, extent: Extent) -> list[Tally]:
        """Return how many calls a source places in another `run` or `role` than they have."""
        by_call = attributions.c.call_id == calls.c.call_id
        by_completion = attributions.c.completion_id == calls.c.completion_id
        found: dict[str, Tally] = {}
        with self._db.read() as connection:
            for field in ("run", "role"):
                column = {"run": "run_id", "role": "role"}[field]
                differs = attributions.c[column] != calls.c[column]  # what is NULL on either side is no conflict
                within = (calls_within(extent), attributions.c.project == calls.c.project, differs)
                either = (
                    select(calls.c.call_id)
                    .join_from(attributions, calls, by_call)
                    .where(*within)
                    .union(select(calls.c.call_id).join_from(attributions, calls, by_completion).where(*within))
                    .subquery("either")
                )
                count, example = connection.execute(select(func.count(), func.max(either.c.call_id))).one()
                if count:
                    found[field] = Tally(what=field, count=int(count), example=example)
        return list(found.values())

    def count_runs(self, extent: Extent) -> list[RunCount]:
        """Return the runs by purpose and state, with those that have no reward or no call."""
        unrewarded = and_(_has_content(), ~exists().where(rewards.c.run_id == runs.c.run_id))
        empty = and_(_has_content(), ~exists().where(calls.c.run_id == runs.c.run_id))
        chosen = (
            select(
                runs.c.purpose,
                runs.c.status,
                func.count().label("runs"),
                _sum(unrewarded).label("unrewarded"),
                _sum(empty).label("empty"),
                func.max(case((unrewarded, runs.c.run_id))).label("unrewarded_example"),
                func.max(case((empty, runs.c.run_id))).label("empty_example"),
            )
            .where(runs_within(extent))
            .group_by(runs.c.purpose, runs.c.status)
            .order_by(runs.c.purpose, runs.c.status)
        )
        with self._db.read() as connection:
            return [RunCount(**_plain(row)) for row in connection.execute(chosen)]

    def count_groups(self, extent: Extent) -> GroupCounts:
        """Return how many groups lack what. Groups of purpose `eval`, never leased, are not counted."""
        silent = ~exists().where(rewards.c.run_id == runs.c.run_id)
        unrewarded = and_(runs.c.status == "closed", _has_content(), silent)
        group = (
            select(
                groups.c.group_id,
                groups.c.planned_size.label("planned"),
                func.count(runs.c.run_id).label("members"),
                _sum(runs.c.status == "open").label("open"),
                _sum(runs.c.status == "failed").label("failed"),
                _sum(unrewarded).label("unrewarded"),
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
        found = {one.what: one for one in self._tallies(chosen)}
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
            _sum(flat).label("flat"),
            func.max(case((flat, group.c.group_id))).label("example"),
        ).select_from(group)
        with self._db.read() as connection:
            return FlatGroups(**_plain(connection.execute(chosen).one()))

    def _tallies(self, chosen: Select[Any]) -> list[Tally]:
        """Run a statement of (what, count, example)."""
        with self._db.read() as connection:
            return tallied(connection, chosen)


def _sum(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """How many rows hold it; 0, not NULL, of no rows."""
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def _same(left: ColumnElement[Any], right: ColumnElement[Any]) -> ColumnElement[bool]:
    return or_(left == right, and_(left.is_(None), right.is_(None)))


def _plain(row: Any) -> dict[str, Any]:
    """A row of counts and ids: PostgreSQL sums to decimals."""
    return {
        name: value if value is None or isinstance(value, str) else int(value) for name, value in row._mapping.items()
    }
