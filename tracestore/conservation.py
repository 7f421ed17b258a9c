"""Conservation as a query: sampled tokens stored = trained + excluded by reason, over the whole store (law 5).

A choice that a step accounted for has its consumption row, every other one its reason by `standing`: so nothing is
counted twice and nothing is left over. The stored total is counted apart, without any join, so that the report can
fail. Called by the doctor, the trainer's tests and the demo's summary.
"""

from typing import Any

from sqlalchemy import Connection, Select, and_, func, select

from tracegrad.tracestore.diagnosis_extent import calls_within
from tracegrad.tracestore.diagnosis_records import ConservationReport, Extent
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.schema import calls, choices, consumption
from tracegrad.tracestore.standing import job_view, unaccounted


class Conservation(Noun):
    """The part of the store that adds up."""

    def consumption(self, job_id: str, epoch: int | None = None, *, extent: Extent | None = None) -> ConservationReport:
        """Return what became of every sampled token, for one job and epoch (default: the job's current one).

        `extent`: only of the calls in it.

        Reasons of choices that no step accounted for, the first that applies: `no run`, `eval`, `leased` (being
        trained), `arrived after the lease` (its run is trained, it came later), `refused`, `other model`, `no role`,
        `other role`, `other purpose`, `other project`, `outside the window`, `open`, `run failed`, `failed call`,
        `aborted`, `quarantined: …`, `no version`, `in grace time`, `no reward`, `group trained without it`,
        `group open`, `no group`, `group awaits rewards`, `group too small`, `too stale`, `not leased` (ready,
        waiting). They are judged by the rule that the job last leased by; before its first lease only those that need
        none are said.
        """
        with self._db.read() as connection:
            job = job_view(connection, job_id, epoch, self._db.now())
            extent = extent or Extent()
            stored = connection.execute(stored_within(extent)).scalar_one()
            trained, excluded = _accounted(connection, job_id, job.epoch, extent)
            reasons = unaccounted(job, extent).subquery("reasons")
            counted = select(reasons.c.reason, func.sum(reasons.c.n_tokens)).group_by(reasons.c.reason)
            for reason, tokens in connection.execute(counted):
                excluded[reason] = excluded.get(reason, 0) + int(tokens)
            return ConservationReport(stored=int(stored), trained=trained, excluded=dict(sorted(excluded.items())))


def stored_within(extent: Extent) -> Select[Any]:
    """Select the sampled tokens that are stored."""
    total = select(func.coalesce(func.sum(choices.c.n_tokens), 0))
    if extent.whole:
        return total
    return total.join(calls, calls.c.seq == choices.c.seq).where(calls_within(extent))


def _accounted(connection: Connection, job_id: str, epoch: int, extent: Extent) -> tuple[int, dict[str, int]]:
    mine = and_(consumption.c.job_id == job_id, consumption.c.epoch == epoch)
    chosen = (
        select(
            consumption.c.reason,
            func.sum(consumption.c.trained_tokens).label("trained"),
            func.sum(consumption.c.excluded_tokens).label("excluded"),
        )
        .where(mine)
        .group_by(consumption.c.reason)
    )
    if not extent.whole:
        chosen = chosen.join(calls, calls.c.seq == consumption.c.seq).where(calls_within(extent))
    rows = connection.execute(chosen).all()
    trained = sum(int(row.trained) for row in rows)
    return trained, {row.reason: int(row.excluded) for row in rows if row.reason is not None}
