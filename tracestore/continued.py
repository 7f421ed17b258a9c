"""The earlier calls of a run, with as much of each as is needed to tell whether a new one goes on from it.

A proxy remembers what went through itself; this is for what it does not know: calls that another process served, or
that it has forgotten. Read only. Called by the proxy, through `Store`.
"""

from collections import defaultdict
from collections.abc import Collection

from sqlalchemy import select

from tracegrad.tracestore.calls import CHUNK
from tracegrad.tracestore.codec import decode_int32, widened
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.payload_schema import choice_payloads
from tracegrad.tracestore.payloads import payloads_of
from tracegrad.tracestore.records import Choice, EarlierCall
from tracegrad.tracestore.schema import calls, choices


class Continued(Noun):
    """The part of the store that gives the past of a run, as one model has seen it."""

    def earlier_calls(
        self, run_id: str, model: str, *, after: int = 0, known: Collection[str] = ()
    ) -> tuple[list[EarlierCall], int]:
        """Return the complete chat calls of a run to `model` in the order of their commits, and a mark.

        Hand the mark in as `after` and only what was committed since is looked at; the payloads of `known` calls are
        not read. Calls in quarantine or without prompt ids are left out: nothing can be built on them.
        """
        found = (
            select(calls.c.call_id, calls.c.seq)
            .where(calls.c.run_id == run_id, calls.c.model == model, calls.c.seq > after)
            .where(calls.c.endpoint == "chat", calls.c.status == "complete", calls.c.quarantine.is_(None))
            .order_by(calls.c.seq)
        )
        with self._db.read() as connection:
            rows = connection.execute(found).all()
            wanted = [row.call_id for row in rows if row.call_id not in known]
            answers: dict[str, list[Choice]] = defaultdict(list)
            told: dict[str, EarlierCall] = {}
            for start in range(0, len(wanted), CHUNK):
                some = wanted[start : start + CHUNK]
                for row in connection.execute(
                    select(calls.c.call_id, choices.c.finish_reason, choices.c.flags, choice_payloads)
                    .join_from(calls, choices)
                    .join(choice_payloads)
                    .where(calls.c.call_id.in_(some))
                    .order_by(choices.c.choice_index)
                ):
                    answers[row.call_id].append(
                        Choice(
                            index=row.choice_index,
                            token_ids=decode_int32(widened(row.token_ids, row.n_tokens)),
                            logprobs=None,
                            finish_reason=row.finish_reason,
                            message=row.message,
                            flags=tuple(row.flags),
                        )
                    )
                asked = connection.execute(
                    select(calls.c.seq, calls.c.call_id, calls.c.role).where(calls.c.call_id.in_(some))
                ).all()
                payloads = payloads_of(connection, [row.seq for row in asked])
                for row in asked:
                    payload = payloads.get(row.seq)
                    if payload is not None and payload.prompt_ids is not None:
                        told[row.call_id] = EarlierCall(
                            call_id=row.call_id,
                            role=row.role,
                            request=payload.request_json,
                            prompt_ids=payload.prompt_ids,
                            choices=tuple(answers[row.call_id]),
                        )
        return [told[call_id] for call_id in wanted if call_id in told], rows[-1].seq if rows else after
