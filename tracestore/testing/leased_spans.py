"""What every backend must do with spans that are told after their run was leased."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from sqlalchemy import Connection

from tracegrad.tracestore.records import Attribution, Call, LateAttribution, Lease, RunTrace, Span
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    account,
    add_group,
    first_version,
    make_call,
    make_commit,
    make_reward,
    make_rule,
    sql,
    take,
)

RUNS = ("g-0", "g-1")
PLANNER = Span(span_id="planner", run_id="g-0", name="planner")
WHOLE = replace(PLANNER, namespace="planner:1", superstep=1, wrote=("branch:to:writer",), output={"plan": "p"})
WRITER = replace(WHOLE, span_id="writer", name="writer", triggers=("branch:to:writer",), wrote=(), started_at=5.0)
TOOL = Span(span_id="tool", run_id="g-0", name="search", kind="tool", parent_span_id="writer", error="boom", input="q")
TREE = (WHOLE, WRITER, TOOL, replace(WHOLE, run_id="g-1"))
PARTS = ("tree", "part of a call", "span of a call", "span of a call that waited")


class LeasedSpanContract:
    """Spans of a leased run stay as they were for its lease, whoever tells more of them."""

    @pytest.mark.parametrize("part", PARTS)
    def test_what_is_told_after_a_lease_is_not_in_it(self, store: Store, part: str) -> None:
        """Not where it is reclaimed either; the ordinary view is the newest, and so is the next lease's."""
        tell = ready(store, part)
        lease = take(store)
        before = store.lease_traces(lease)
        known = spans_in(store.traces(RUNS))
        assert spans_in(before) == known
        tell()
        newest = spans_in(store.traces(RUNS))
        assert newest != known
        reclaimed = store.reclaim(JOB, 60)
        assert reclaimed is not None
        assert store.lease_traces(reclaimed) == store.lease_traces(lease) == before
        store.release(reclaimed)
        assert spans_in(store.lease_traces(take(store))) == newest

    def test_a_lease_has_outlines(self, store: Store) -> None:
        """The spans in their order, with all but what they read, returned and raised."""
        ready(store, "tree")()
        found = store.lease_traces(take(store))[0]
        newest = store.trace("g-0").spans
        assert [span.span_id for span in found.spans] == ["writer", "tool", "planner"]
        assert found.spans == tuple(outline(span) for span in newest) != newest
        assert [call.attribution.span for call in found.calls] == [found.spans[2], None]

    def test_each_lease_has_its_own(self, store: Store) -> None:
        """Two jobs hold one run, between them the tree came."""
        tell = ready(store, "tree")
        first = take(store)
        before = store.lease_traces(first)
        tell()
        store.register_job("other", [MODEL], {})
        second = store.lease("other", make_rule(), groups=1, lease_s=60, step=1, epoch=0, seed=7)
        assert second is not None
        assert spans_in(store.lease_traces(second)) == spans_in(store.traces(RUNS)) != spans_in(before)
        store.release(second)
        assert store.lease_traces(first) == before

    @pytest.mark.parametrize("end", ["commit", "release", "refuse", "delete"])
    def test_nothing_of_them_is_left_when_a_lease_is_over(self, store: Store, end: str) -> None:
        """They go with the hold: deleted runs have no copy of their spans anywhere."""
        ready(store, "tree")
        lease = take(store)
        assert sql(store, "UPDATE holds SET spans = spans WHERE spans <> '[]'") == 1
        entries = account(store, lease)
        if end == "commit":
            store.commit_step(lease, make_commit(entries))
        elif end == "release":
            store.release(lease)
        elif end == "refuse":
            none = [replace(one, trained_tokens=0, excluded_tokens=3, reason="greedy") for one in entries]
            store.refuse(lease, none)
        else:
            store.delete_runs(["g-0"], busy="force")
        assert sql(store, "UPDATE holds SET spans = spans") == 0
        assert store.check() == []

    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("first", ["lease", "part"])
    def test_a_lease_and_a_part_in_one_moment(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, first: str, part: str
    ) -> None:
        """Whoever has done all but commit is first: the other waits for it, or is told to ask again."""
        tell = ready(store, part)
        known = spans_in(store.traces(RUNS))
        store.register_job(JOB, [MODEL], {})
        made: list[Lease | None] = []
        lease = partial(store.lease, JOB, make_rule(), groups=1, lease_s=60, step=1, epoch=0, seed=7)
        acts: dict[str, Callable[[], object]] = {"lease": lambda: made.append(lease()), "part": tell}
        one = threading.Thread(target=acts.pop(first))
        other = threading.Thread(target=acts.popitem()[1])
        done, go = threading.Event(), threading.Event()
        write = store._db.write

        @contextmanager
        def written_slowly() -> Iterator[Connection]:
            with write() as connection:
                yield connection
                if threading.current_thread() is one:
                    done.set()
                    assert go.wait(20)

        monkeypatch.setattr(store._db, "write", written_slowly)
        one.start()
        assert done.wait(20)
        other.start()
        other.join(0.2)
        go.set()
        for thread in (one, other):
            thread.join(20)
        newest = spans_in(store.traces(RUNS))
        assert newest != known
        found = made[0] or lease()
        assert found is not None
        assert spans_in(store.lease_traces(found)) == (known if first == "lease" else newest)

    def test_a_call_whose_span_came_late_may_be_appended_again(self, store: Store) -> None:
        """What it took over is no other content."""
        ready(store, "span of a call")()
        store.append_calls([spanless("g-0")])
        assert [call.attribution.span for call in store.trace("g-0").calls] == [PLANNER, PLANNER]


def ready(store: Store, part: str) -> Callable[[], object]:
    """Make a group ready whose first run has a call in a span and one without; return what tells the late part."""
    add_group(store)
    first_version(store)
    fact = LateAttribution(source="langsmith", completion_id="chatcmpl-g-0", run_id="g-0", role="x", span_id="planner")
    if part == "span of a call that waited":
        store.put_spans([PLANNER])
        store.attribute_late([fact])
    store.append_calls([of_planner("planned", PLANNER), spanless("g-0"), spanless("g-1")])
    for run_id in RUNS:
        store.add_rewards([make_reward(f"reward-{run_id}", run_id)])
        store.end_run(run_id, status="closed", ended_by="explicit")
    parts: dict[str, Callable[[], object]] = {
        "tree": partial(store.put_spans, TREE),
        "part of a call": partial(store.append_calls, [of_planner("later", WHOLE)]),
        "span of a call": partial(store.attribute_late, [fact]),
        "span of a call that waited": store.resolve_attributions,
    }
    return parts[part]


def of_planner(call_id: str, span: Span) -> Call:
    """Return a call of the first run that tells its span."""
    who = Attribution(run_id="g-0", run_source="hook", role="planner", role_source="hook", span=span)
    return make_call(call_id, "g-0", version=1, attribution=who)


def spanless(run_id: str) -> Call:
    """Return a call of which nobody knows the role and the span."""
    return make_call(run_id, run_id, version=1, at=1_010.0, attribution=Attribution(run_id=run_id, run_source="header"))


def outline(span: Span) -> Span:
    """Return the span without what it read, returned and raised."""
    return replace(span, input=None, output=None, error=None)


def spans_in(traces: Sequence[RunTrace]) -> list[object]:
    """Return the outlines of the spans of runs, and the span of each call."""
    return [
        (
            [outline(span) for span in trace.spans],
            {call.call_id: call.attribution.span and outline(call.attribution.span) for call in trace.calls},
        )
        for trace in traces
    ]
