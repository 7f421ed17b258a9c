"""Runs with everything training needs: calls by dispatch time, choices by index, the current view of the rewards.
A single call too, whether it has a run or not. Raises TraceStoreError, with the call, where what lies there is broken.

Read only. Called by the trainer (`traces`, `lease_traces`) and by whoever shows a run, through `Store`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, or_, select, true

from tracegrad.tracestore.calls import CHUNK
from tracegrad.tracestore.codec import decode_int32, decode_json, widened
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.kept_sets import sets_of
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.payload_schema import choice_payloads
from tracegrad.tracestore.payloads import Payload, payloads_of, unreadable
from tracegrad.tracestore.records import (
    Attribution,
    Call,
    CallTiming,
    Choice,
    Continues,
    Lease,
    LeaseRule,
    Reward,
    Run,
    RunTrace,
    Span,
)
from tracegrad.tracestore.rewards import current_rewards
from tracegrad.tracestore.runs import run_of
from tracegrad.tracestore.schema import calls, choices, leases, runs
from tracegrad.tracestore.spans import leased_spans, span_of, spans_of


class Traces(Noun):
    """The part of the store that gives runs back whole."""

    def trace(self, run_id: str) -> RunTrace:
        """Return one run with its calls and current rewards. Raises NotFound."""
        return self.traces([run_id])[0]

    def traces(self, run_ids: Sequence[str]) -> list[RunTrace]:
        """Return the runs in the order asked for, from one snapshot. Raises NotFound for an unknown one."""
        with self._db.read() as connection:
            return _traces(connection, run_ids, None)

    def get_call(self, call_id: str) -> Call:
        """Return one call with its choices, of a run or of none. Raises NotFound. See `Calls.find_call` for its id."""
        with self._db.read() as connection:
            named = calls.c.call_id == call_id
            place = connection.execute(select(calls.c.run_id, calls.c.span_id).where(named)).one_or_none()
            if place is None:
                raise NotFound(f"no call {call_id!r}: `find_call` knows completion ids as well")
            span = None if place.span_id is None else span_of(connection, place.run_id, place.span_id)
            known = {} if span is None else {(span.run_id, span.span_id): span}
            found = next(_calls(connection, named, None, known), None)
            if found is None:
                raise NotFound(
                    f"the content of call {call_id!r} was deleted; what was trained of it stays accounted for"
                )
            return found

    def lease_traces(self, lease: Lease, rule: LeaseRule | None = None) -> list[RunTrace]:
        """Return the runs of a lease as they stood when it was made: what came later is not in it.

        With the rule of the lease, the rewards are those that count by it. A reclaimed lease therefore gives the same
        data as the first claim did. Spans are without input, output and error; once the lease is over, its runs have
        the spans that are known now. Raises NotFound.
        """
        with self._db.read() as connection:
            row = connection.execute(select(leases).where(leases.c.lease_id == lease.lease_id)).one_or_none()
            if row is None:
                raise NotFound(f"no lease {lease.lease_id}: lease again")
            until = _Until(row.lease_id, row.calls_through, row.rewards_through, row.attributions_through)
            return _traces(connection, lease.plan.run_ids, until, rule)


@dataclass(frozen=True, slots=True)
class _Until:
    """A lease, and the last call, reward and late attribution that it knows."""

    lease_id: int
    calls: int
    rewards: int
    attributions: int


def stood_when_leased(calls_through: Any, attributions_through: Any) -> ColumnElement[bool]:
    """Whether the call of the row was in its run when a lease was made."""
    placed = or_(calls.c.placed_by.is_(None), calls.c.placed_by <= attributions_through)
    return and_(calls.c.seq <= calls_through, placed)


def _traces(
    connection: Connection, run_ids: Sequence[str], until: _Until | None, rule: LeaseRule | None = None
) -> list[RunTrace]:
    found: dict[str, Run] = {}
    spans: dict[str, list[Span]] = {}
    by_run: dict[str, list[Call]] = defaultdict(list)
    rewards: dict[str, list[Reward]] = defaultdict(list)
    wanted = list(dict.fromkeys(run_ids))
    for start in range(0, len(wanted), CHUNK):
        some = wanted[start : start + CHUNK]
        found.update(
            (row.run_id, run_of(row)) for row in connection.execute(select(runs).where(runs.c.run_id.in_(some)))
        )
        held = {} if until is None else leased_spans(connection, until.lease_id, some)
        spans |= held | spans_of(connection, [run_id for run_id in some if run_id not in held])
        known = {(run_id, span.span_id): span for run_id in some for span in spans.get(run_id, ())}
        stood = true() if until is None else stood_when_leased(until.calls, until.attributions)
        for call in _calls(connection, and_(calls.c.run_id.in_(some), stood), until, known):
            by_run[str(call.attribution.run_id)].append(call)
        for reward in current_rewards(connection, some, None if until is None else until.rewards, rule):
            rewards[reward.run_id].append(reward)
    missing = [run_id for run_id in wanted if run_id not in found]
    if missing:
        raise NotFound(f"no run {missing[0]!r}: `tracegrad runs` lists what there is")
    return [
        RunTrace(
            run=found[run_id],
            calls=tuple(by_run[run_id]),
            rewards=tuple(rewards[run_id]),
            spans=tuple(spans.get(run_id, ())),
        )
        for run_id in run_ids
    ]


def _calls(
    connection: Connection,
    within: ColumnElement[bool],
    until: _Until | None,
    known: Mapping[tuple[str, str], Span],
) -> Iterator[Call]:
    """The calls that `within` selects; `known` holds their spans by run and id."""
    columns = select(choices.c.seq, choices.c.finish_reason, choices.c.flags, choices.c.version_spans)
    sampled = _choices(connection, columns, within)
    rows = connection.execute(select(calls).where(within).order_by(calls.c.dispatched_at, calls.c.seq))
    found = rows.all()
    payloads = payloads_of(connection, [row.seq for row in found])
    for row in found:
        payload = payloads.get(row.seq)
        if payload is None:
            continue  # the stub of a deleted run's
        knows_span = row.span_id is not None and _knows(until, row.span_by)
        span = known[row.run_id, row.span_id] if knows_span else None
        yield _call(row, payload, span, tuple(sampled[row.seq]), knows_role=_knows(until, row.role_by))


def _knows(until: _Until | None, fact: int | None) -> bool:
    """Whether what a call took from a late fact (None: it took nothing) is known yet."""
    return until is None or fact is None or fact <= until.attributions


def _choices(connection: Connection, columns: Select[Any], within: Any) -> dict[int, list[Choice]]:
    statement = (
        columns.add_columns(
            choices.c.choice_index,
            choices.c.n_tokens,
            calls.c.call_id,
            calls.c.run_id,
            choice_payloads.c.token_ids,
            choice_payloads.c.logprobs,
            choice_payloads.c.message,
            choice_payloads.c.kept_counts,
            choice_payloads.c.kept_ids,
        )
        .join(
            choice_payloads,
            (choice_payloads.c.seq == choices.c.seq) & (choice_payloads.c.choice_index == choices.c.choice_index),
        )
        .join(calls, calls.c.seq == choices.c.seq)
        .where(within)
        .order_by(choices.c.seq, choices.c.choice_index)
    )
    by_call: dict[int, list[Choice]] = defaultdict(list)
    for row in connection.execute(statement).all():
        try:
            token_ids = decode_int32(widened(row.token_ids, row.n_tokens))
            kept_ids = sets_of(row.kept_counts, row.kept_ids, row.n_tokens)
        except ValueError as error:
            raise unreadable(
                f"choice {row.choice_index} of call {row.call_id!r}, run {row.run_id!r},", error
            ) from error
        by_call[row.seq].append(
            Choice(
                index=row.choice_index,
                token_ids=token_ids,
                logprobs=row.logprobs,
                finish_reason=row.finish_reason,
                message=row.message,
                flags=tuple(row.flags),
                kept_ids=kept_ids,
                version_spans=tuple((first, version) for first, version in row.version_spans or ()),
            )
        )
    return by_call


def _call(row: Any, payload: Payload, span: Span | None, sampled: tuple[Choice, ...], *, knows_role: bool) -> Call:
    return Call(
        call_id=row.call_id,
        completion_id=row.completion_id,
        attribution=Attribution(
            run_id=row.run_id,
            run_source=row.run_source,
            role=row.role if knows_role else None,
            role_source=row.role_source if knows_role else None,
            span=span,
        ),
        model=row.model,
        requested_model=row.requested_model,
        version_dispatched=row.version_dispatched,
        version_completed=row.version_completed,
        prompt_ids=payload.prompt_ids,
        choices=sampled,
        status=row.status,
        timing=CallTiming(
            received_at=row.received_at,
            dispatched_at=row.dispatched_at,
            first_token_at=row.first_token_at,
            completed_at=row.completed_at,
        ),
        request=payload.request_json,
        requested=decode_json(payload.requested),
        effective=decode_json(payload.effective),
        stream=row.stream,
        quarantine=row.quarantine,
        error=row.error,
        endpoint=row.endpoint,
        request_hash=row.request_hash,
        retry_of=row.retry_of,
        project=row.project,
        continues=_continues(row),
    )


def _continues(row: Any) -> Continues | None:
    if row.continues is None:
        return None
    return Continues(
        call_id=row.continues,
        choice=row.continues_choice,
        drift=row.drift,
        token_in=row.token_in,
    )
