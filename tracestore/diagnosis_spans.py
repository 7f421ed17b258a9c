"""Whether calls that weights were exchanged under are exact: metadata only, and few rows. Called by `tracegrad doctor`.

Looked at are complete calls that nobody quarantined. Each choice with version spans is held to the trainer's own rule
(`version_spans`); a call whose versions at dispatch and at its end differ needs spans at all.
"""

from typing import Any

from sqlalchemy import and_, or_, select

from tracegrad.tracestore.diagnosis_extent import calls_within
from tracegrad.tracestore.diagnosis_records import Extent, SpanReport
from tracegrad.tracestore.diagnosis_tallies import Tallier
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.reasons import BAD_SPANS, VERSION_CHANGED
from tracegrad.tracestore.schema import calls, choices, policy_versions
from tracegrad.tracestore.version_spans import are_of, cover


class SpanDiagnosis(Noun):
    """The part of the store that looks at which versions sampled what."""

    def check_version_spans(self, extent: Extent) -> SpanReport:
        """Return how many calls weights were exchanged under, and those of which nobody knows what sampled what."""
        differs = calls.c.version_dispatched != calls.c.version_completed
        chosen = (
            select(calls.c.call_id, calls.c.model, choices.c.n_tokens, choices.c.version_spans)
            .join_from(calls, choices, choices.c.seq == calls.c.seq)
            .where(calls_within(extent), calls.c.status == "complete", calls.c.quarantine.is_(None))
            .where(or_(choices.c.version_spans.is_not(None), and_(calls.c.version_dispatched.is_not(None), differs)))
        )
        known = select(policy_versions.c.version_id, policy_versions.c.model)
        spanned: set[str] = set()
        silent: set[str] = set()
        flaws = Tallier()
        with self._db.read() as connection:
            models = {int(version): str(model) for version, model in connection.execute(known)}
            for row in connection.execute(chosen):
                (silent if row.version_spans is None else spanned).add(row.call_id)
                if row.version_spans is not None and not _is_sound(row, models):
                    flaws.add(BAD_SPANS, row.call_id)
        for call_id in silent - spanned:
            flaws.add(VERSION_CHANGED, call_id)
        return SpanReport(calls=len(spanned), flaws=tuple(flaws.tallies()))


def _is_sound(row: Any, models: dict[int, str]) -> bool:
    """Judge what stands in the column, which may be any JSON where somebody else wrote it."""
    try:
        spans = [(int(first), int(version)) for first, version in row.version_spans]
    except (TypeError, ValueError):
        return False
    return cover(spans, row.n_tokens) and are_of(spans, row.model, models)
