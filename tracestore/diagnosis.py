"""What stands in the store, counted so that a person can see why something is not trained: calls, choices, runs.

Read only, and no payload is read: the counts come from metadata, aggregated by the database, so memory does not grow
with the store. Each method is one snapshot; on a store in use the figures of two methods may differ by what arrived
between them. Judges nothing: that is `tracegrad doctor`. Groups are in `diagnosis_groups`, what compares the calls of a
run in `diagnosis_siblings`, what is about a training job in `diagnosis_jobs`, what needs payloads in
`diagnosis_payloads`.
"""

from typing import Any

from sqlalchemy import Select, and_, case, exists, func, or_, select

from tracegrad.tracestore.diagnosis_extent import calls_within, runs_within
from tracegrad.tracestore.diagnosis_records import (
    CallCounts,
    ChoiceCount,
    Extent,
    RunCount,
    Tally,
)
from tracegrad.tracestore.diagnosis_tallies import how_many, plain_counts, tallied
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.overview import DriftCount, drift_within
from tracegrad.tracestore.reasons import ABORTED
from tracegrad.tracestore.runs import has_content
from tracegrad.tracestore.schema import attributions, calls, choices, rewards, runs


class Diagnosis(Noun):
    """The part of the store that says what is wrong with its contents."""

    def count_calls(self, extent: Extent) -> CallCounts:
        """Return how the calls ended and what is unknown of them."""
        sampling = calls.c.endpoint != "embeddings"
        no_run, no_role = and_(sampling, calls.c.run_id.is_(None)), and_(sampling, calls.c.role.is_(None))
        chosen = select(
            func.count().label("calls"),
            how_many(calls.c.endpoint == "embeddings").label("embeddings"),
            how_many(and_(sampling, calls.c.status == "failed")).label("failed"),
            how_many(and_(sampling, calls.c.status == "aborted")).label("aborted"),
            how_many(calls.c.quarantine.is_not(None)).label("quarantined"),
            how_many(calls.c.retry_of.is_not(None)).label("retries"),
            how_many(no_run).label("no_run"),
            func.max(case((no_run, calls.c.call_id))).label("no_run_example"),
            how_many(no_role).label("no_role"),
            func.max(case((no_role, calls.c.call_id))).label("no_role_example"),
        ).where(calls_within(extent))
        with self._db.read() as connection:
            return CallCounts(**plain_counts(connection.execute(chosen).one()))

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

    def count_unfinished(self, extent: Extent) -> Tally:
        """Return the choices that the engine gave up in calls that came to their end: no step trains them.

        Not those of aborted, failed or quarantined calls, which are counted as such, and not those of eval runs.
        """
        unfinished = or_(choices.c.finish_reason.is_(None), choices.c.finish_reason.in_(("abort", "error")))
        chosen = (
            select(func.count(), func.max(calls.c.call_id))
            .join_from(choices, calls, calls.c.seq == choices.c.seq)
            .outerjoin(runs, runs.c.run_id == calls.c.run_id)
            .where(unfinished, calls.c.status == "complete", calls.c.quarantine.is_(None))
            .where(runs.c.purpose.is_distinct_from("eval"), calls_within(extent))
        )
        with self._db.read() as connection:
            count, example = connection.execute(chosen).one()
        return Tally(what=ABORTED, count=int(count), example=example)

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
        unrewarded = and_(has_content(), ~exists().where(rewards.c.run_id == runs.c.run_id))
        empty = and_(has_content(), ~exists().where(calls.c.run_id == runs.c.run_id))
        chosen = (
            select(
                runs.c.purpose,
                runs.c.status,
                func.count().label("runs"),
                how_many(unrewarded).label("unrewarded"),
                how_many(empty).label("empty"),
                func.max(case((unrewarded, runs.c.run_id))).label("unrewarded_example"),
                func.max(case((empty, runs.c.run_id))).label("empty_example"),
            )
            .where(runs_within(extent))
            .group_by(runs.c.purpose, runs.c.status)
            .order_by(runs.c.purpose, runs.c.status)
        )
        with self._db.read() as connection:
            return [RunCount(**plain_counts(row)) for row in connection.execute(chosen)]

    def _tallies(self, chosen: Select[Any]) -> list[Tally]:
        """Run a statement of (what, count, example)."""
        with self._db.read() as connection:
            return tallied(connection, chosen)
