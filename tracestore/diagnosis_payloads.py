"""Whether what was recorded exactly is exact: every payload read, row by row, and judged as the trainer would.

The one diagnosis that reads payloads (`tracegrad doctor --deep`): prompt ids, token ids and logprobs of complete calls
that nobody quarantined. It reads chunk by chunk, so memory is bounded, and takes as long as reading the store once.
Constraints of the schema hold lengths too: this finds what damage or another writer left.
"""

import math
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, and_, func, select

from tracegrad.tracestore.calls import CHUNK
from tracegrad.tracestore.codec import widened
from tracegrad.tracestore.diagnosis_extent import calls_within
from tracegrad.tracestore.diagnosis_records import Extent, PayloadReport
from tracegrad.tracestore.diagnosis_tallies import Tallier
from tracegrad.tracestore.kept_sets import widened_sets
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.payload_schema import choice_payloads
from tracegrad.tracestore.payloads import sound_payloads_of
from tracegrad.tracestore.reasons import LENGTH_MISMATCH, NAN_LOGPROB, NO_LOGPROBS, NO_PROMPT
from tracegrad.tracestore.schema import calls, choices


class PayloadDiagnosis(Noun):
    """The part of the store that looks at every token."""

    def check_payloads(self, extent: Extent, on_progress: Callable[[int, int], None] | None = None) -> PayloadReport:
        """Read the payloads of the extent. `on_progress` hears (calls done, calls in all) once a chunk.

        Each chunk is a snapshot of its own, so that a long check holds no database back.
        """
        flaws = Tallier()
        n_calls = n_choices = last = 0
        judged = and_(
            calls_within(extent),
            calls.c.status == "complete",
            calls.c.quarantine.is_(None),
            calls.c.endpoint != "embeddings",
        )
        with self._db.read() as connection:
            total = int(connection.execute(select(func.count()).select_from(calls).where(judged)).scalar_one())
        chunk = select(calls.c.seq, calls.c.call_id).where(judged).order_by(calls.c.seq).limit(CHUNK)
        while True:
            with self._db.read() as connection:
                rows = connection.execute(chunk.where(calls.c.seq > last)).all()
                if not rows:
                    break
                ids, last = {row.seq: row.call_id for row in rows}, rows[-1].seq
                n_choices += _check(connection, ids, flaws)
            n_calls += len(rows)
            if on_progress is not None:
                on_progress(n_calls, max(total, n_calls))
        return PayloadReport(calls=n_calls, choices=n_choices, flaws=tuple(flaws.tallies()))


def _check(connection: Connection, call_ids: dict[int, str], flaws: Tallier) -> int:
    """Judge the choices of some calls, and their prompts; return how many choices there are."""
    sampled = (
        select(
            choices.c.seq,
            choices.c.n_tokens,
            choices.c.flags,
            choice_payloads.c.token_ids,
            choice_payloads.c.logprobs,
            choice_payloads.c.kept_counts,
            choice_payloads.c.kept_ids,
        )
        .join_from(choices, choice_payloads)
        .where(choices.c.seq.in_(call_ids))
    )
    ours: set[int] = set()
    n_choices = 0
    for row in connection.execute(sampled):
        n_choices += 1
        if "external" in row.flags:
            continue
        ours.add(row.seq)
        if row.n_tokens and row.logprobs is None:
            flaws.add(NO_LOGPROBS, call_ids[row.seq])
        elif not _are_counted(row) or len(row.logprobs or ()) != row.n_tokens:
            flaws.add(LENGTH_MISMATCH, call_ids[row.seq])
        elif not all(map(math.isfinite, row.logprobs or ())):
            flaws.add(NAN_LOGPROB, call_ids[row.seq])
    asked = {seq: call_id for seq, call_id in call_ids.items() if seq in ours}
    payloads, broken = sound_payloads_of(connection, list(asked))
    for seq, call_id in asked.items():
        payload = payloads.get(seq)
        if seq in broken:
            flaws.add(LENGTH_MISMATCH, call_id)
        elif payload is not None and not payload.prompt:
            flaws.add(NO_PROMPT, call_id)
    return n_choices


def _are_counted(row: Any) -> bool:
    """Whether the token ids of a choice, and its kept sets, are as many as they say."""
    try:
        widened(row.token_ids, row.n_tokens)
        widened_sets(row.kept_counts, row.kept_ids, row.n_tokens)
    except ValueError:
        return False
    return True
