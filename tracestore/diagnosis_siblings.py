"""What shows only where the calls of a run are compared with one another: forks, and requests that were repeated.

Read only, no payload. The calls come run by run, in the order of the run's index, so the database sorts nothing and
memory holds one run at a time; in a run the time is linear in its calls (a server may be one run for weeks). Called by
`tracegrad doctor`, through `Store`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, select

from tracegrad.tracestore.diagnosis_extent import calls_within
from tracegrad.tracestore.diagnosis_records import Extent, Tally
from tracegrad.tracestore.diagnosis_tallies import Tallier
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.schema import calls

CLOSE_S = 60.0
"""Equal requests of a run that come within this time of each other may be one request that was sent again."""
RETRY = "retry"
SEVERAL_CAUSES = "several causes of drift"
OTHER_ANSWERS = "other answers"
BRANCHES = "branches"
_FETCH = 1_000


class SiblingDiagnosis(Noun):
    """The part of the store that compares the calls of a run."""

    def count_forks(self, extent: Extent) -> list[Tally]:
        """Return the calls from which two or more others go on, by why; the example is the call they go on from.

        The first that applies: `retry` (all but one of them repeat one another), the cause of drift, or `several causes
        of drift`, where a branch drifted; `other answers` (each goes on from another choice); `branches` (the app went
        on from one answer in several ways).
        """
        found = Tallier()
        for siblings in self._runs(extent, calls.c.continues.is_not(None)):
            by_origin: dict[str, list[Any]] = defaultdict(list)
            for call in siblings:
                by_origin[call.continues].append(call)
            for origin, branches in by_origin.items():
                if len(branches) > 1:
                    found.add(_cause(branches), origin)
        return found.tallies()

    def count_duplicates(self, extent: Extent) -> Tally:
        """Return calls like an earlier one of their run, at most `CLOSE_S` before, that name no call as their retry."""
        found = Tallier()
        for siblings in self._runs(extent, calls.c.request_hash.is_not(None), calls.c.endpoint != "embeddings"):
            latest: dict[str, float] = {}
            for call in sorted(siblings, key=lambda one: (one.received_at, one.seq)):
                before = latest.get(call.request_hash)
                latest[call.request_hash] = call.received_at
                if before is not None and call.received_at - before <= CLOSE_S and call.retry_of is None:
                    found.add("duplicates", call.call_id)
        return next(iter(found.tallies()), Tally(what="duplicates", count=0))

    def _runs(self, extent: Extent, *wanted: ColumnElement[bool]) -> Iterator[list[Any]]:
        """Yield the wanted calls of each run."""
        chosen = (
            select(calls.c.run_id, calls.c.seq, calls.c.call_id, calls.c.received_at, calls.c.request_hash)
            .add_columns(calls.c.retry_of, calls.c.continues, calls.c.continues_choice, calls.c.drift)
            .where(calls_within(extent), calls.c.run_id.is_not(None), *wanted)
            .order_by(calls.c.run_id)
        )
        with self._db.read() as connection:
            rows = connection.execute(chosen, execution_options={"yield_per": _FETCH})
            for _, siblings in groupby(rows, key=lambda row: row.run_id):
                yield list(siblings)


def _cause(branches: Sequence[Any]) -> str:
    if sum(call.retry_of is not None for call in branches) >= len(branches) - 1:
        return RETRY
    drifts = {call.drift for call in branches} - {None}
    if drifts:
        return SEVERAL_CAUSES if len(drifts) > 1 else str(drifts.pop())
    answers = {call.continues_choice for call in branches}
    return OTHER_ANSWERS if len(answers) == len(branches) else BRANCHES
