"""What every backend must do with spans, late attribution and retried requests."""

from dataclasses import replace
from typing import Any

import pytest

from tracegrad.tracestore.errors import InvalidRecord
from tracegrad.tracestore.records import Attribution, LangSmithRun, LateAttribution, Span
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    JOB,
    account,
    add_group,
    finish_run,
    first_version,
    make_call,
    make_commit,
    make_reward,
    take,
)

NOWHERE = Attribution()


class SpanContract:
    """Spans are told in parts."""

    def test_a_span_is_told_in_parts(self, store: Store) -> None:
        """What a later part leaves out is kept, what it says counts; who told of it first is the source."""
        start = Span(
            span_id="s",
            run_id="r",
            name="tools",
            namespace="tools:1",
            superstep=2,
            triggers=("branch:to:tools",),
            input={"q": [1, None]},
            started_at=1.0,
            source="hook",
        )
        store.put_spans([start], "p")
        store.put_spans([Span(span_id="s", run_id="r", name="tools", output="3", ended_at=2.5, source="langsmith")])
        store.put_spans([Span(span_id="s", run_id="r", name="tools", wrote=("branch:to:model", "send:model"))])
        store.put_spans([Span(span_id="s", run_id="r", name="tools")])
        whole = replace(start, output="3", ended_at=2.5, wrote=("branch:to:model", "send:model"))
        assert store.list_spans("r") == [whole]
        assert store.get_run("r").project == "p"
        told = replace(whole, error="boom", output={"a": 1}, name="tool")
        store.put_spans([Span(span_id="s", run_id="r", name="tool", output={"a": 1}, error="boom")])
        assert store.trace("r").spans == (told,)
        assert store.list_spans("none") == []
        store.put_spans([])

    def test_what_is_told_again_is_not_written(self, store: Store) -> None:
        """Each call of a span tells it whole, while a client waits for the commit."""
        span = Span(span_id="s", run_id="r", name="tools", triggers=("t",), input={"q": 1})
        store.put_spans([span])
        before = _written(store)
        store.put_spans([span, Span(span_id="s", run_id="r", name="tools")])
        assert _written(store) == before
        store.put_spans([replace(span, superstep=3)])
        assert _written(store) != before

    def test_a_call_completes_its_span(self, store: Store) -> None:
        """The place that a call's header told is kept beside what the hook told before."""
        told = Span(span_id="span-answerer", run_id="r", name="answerer", input="q", started_at=1.0, triggers=("t",))
        store.put_spans([told])
        store.append_calls([make_call("c", "r")])
        span = store.trace("r").calls[0].attribution.span
        assert span == replace(told, superstep=1)

    def test_the_calls_within_a_span(self, store: Store) -> None:
        """Those of the span and of all below it, in this run; a ring of parents ends the search."""
        parents = {"top": None, "node": "top", "tool": "node", "beside": None, "ring": "ring"}
        for run_id in ("r", "s"):
            spans = [Span(span_id=name, run_id=run_id, name=name, parent_span_id=up) for name, up in parents.items()]
            store.put_spans(spans)
            for span in spans:
                at = Attribution(run_id=run_id, run_source="hook", span=span)
                store.append_calls([make_call(f"{run_id}-{span.name}", None, attribution=at)])
        store.append_calls([make_call("r-nowhere", None, attribution=Attribution(run_id="r", run_source="hook"))])
        assert store.calls_within("r", "top") == ["r-top", "r-node", "r-tool"]
        assert store.calls_within("r", "tool") == ["r-tool"]
        assert store.calls_within("r", "ring") == ["r-ring"]
        assert store.calls_within("r", "none") == store.calls_within("none", "top") == []

    def test_the_run_of_a_span_is_found(self, store: Store) -> None:
        """By the span's id alone; what is not stored is left out."""
        store.put_spans([Span(span_id=name, run_id=run, name=name) for name, run in (("a", "r1"), ("b", "r2"))])
        assert store.runs_of_spans(["a", "b", "c"]) == {"a": "r1", "b": "r2"}
        assert store.runs_of_spans([]) == {}

    def test_spans_come_in_order_of_their_start(self, store: Store) -> None:
        """Those whose start nobody told come last, by superstep."""
        parts = [("b", 2.0, 5), ("a", 1.0, 9), ("y", None, 2), ("x", None, 1)]
        store.put_spans([Span(span_id=i, run_id="r", name=i, started_at=at, superstep=n) for i, at, n in parts])
        assert [span.span_id for span in store.list_spans("r")] == ["a", "b", "x", "y"]

    def test_what_is_no_json_is_refused(self, store: Store) -> None:
        """And nothing of the batch is written."""
        with pytest.raises(InvalidRecord):
            store.put_spans(
                [Span(span_id="a", run_id="r", name="n"), Span(span_id="b", run_id="r", name="n", input=object())]
            )
        assert store.list_spans("r") == []


class AttributionContract:
    """What is said of a call after it was stored."""

    def test_a_call_takes_what_it_does_not_know(self, store: Store) -> None:
        """Run, role and span come late, by call id or completion id; each remembers its source."""
        store.append_calls([make_call("c", None, role=None), make_call("d", None, role="known")])
        store.put_spans([Span(span_id="s", run_id="r", name="node")])
        by_call = LateAttribution(source="langsmith", call_id="c", run_id="r", role="planner", span_id="s")
        by_completion = LateAttribution(source="langsmith", completion_id="chatcmpl-d", run_id="r", role="known")
        store.attribute_late([by_call, by_completion])
        store.attribute_late([by_call])
        store.append_calls([make_call("c", None, role=None), make_call("d", None, role="known")])
        first, second = store.trace("r").calls
        span = Span(span_id="s", run_id="r", name="node")
        assert first.attribution == Attribution(
            run_id="r", run_source="langsmith", role="planner", role_source="langsmith", span=span
        )
        assert second.attribution == Attribution(
            run_id="r", run_source="langsmith", role="known", role_source="header", span=None
        )
        assert store.attribution_conflicts() == []
        assert store.list_runs()[0].roles == ("known", "planner")

    def test_a_source_that_disagrees_is_a_conflict(self, store: Store) -> None:
        """The call keeps what it has; the conflict shows from both runs' side, and from no third."""
        store.append_calls([make_call("c", "r", role="a")])
        store.attribute_late([LateAttribution(source="langsmith", call_id="c", run_id="other", role="b")])
        store.attribute_late([LateAttribution(source="inferred", call_id="c", run_id="r", role="a")])
        assert store.trace("r").calls[0].attribution.role == "a"
        found = store.attribution_conflicts("r")
        assert [(c.call_id, c.field, c.kept, c.kept_source, c.said, c.said_source) for c in found] == [
            ("c", "run", "r", "header", "other", "langsmith"),
            ("c", "role", "a", "header", "b", "langsmith"),
        ]
        assert store.attribution_conflicts("other") == found
        assert store.attribution_conflicts(call_id="c") == found
        assert store.attribution_conflicts(call_id="d") == []
        store.ensure_runs(["third"], "p")
        assert store.attribution_conflicts("third") == []

    def test_a_fact_may_come_before_its_call(self, store: Store) -> None:
        """It waits, and is joined once the call is there."""
        store.attribute_late([LateAttribution(source="langsmith", completion_id="chatcmpl-c", run_id="r", role="a")])
        assert store.resolve_attributions() == 0
        store.append_calls([make_call("c", None, role=None)])
        assert store.resolve_attributions() == 1
        assert store.resolve_attributions() == 0
        assert store.trace("r").calls[0].attribution.role == "a"

    def test_a_fact_that_finds_its_call_late_is_not_part_of_an_earlier_lease(self, store: Store) -> None:
        """Fact, call, lease, and only then joined: who holds the lease sees and accounts for what it saw."""
        run, _ = add_group(store)
        for member in ("g-0", "g-1"):
            finish_run(store, member)
        store.attribute_late([LateAttribution(source="langsmith", completion_id="chatcmpl-late", run_id=run)])
        store.append_calls([make_call("late", None, version=first_version(store))])
        lease = take(store)
        entries = account(store, lease)
        assert store.resolve_attributions() == 1
        assert account(store, lease) == entries
        store.commit_step(lease, make_commit(entries))
        assert dict(store.consumption(JOB).excluded) == {"arrived after the lease": 3}

    def test_a_fact_is_about_calls_of_its_project_only(self, store: Store) -> None:
        """Another project's call learns nothing, shows no conflict, and its own facts are not kept out."""
        ours: dict[str, Any] = {"project": "ours", "completion_id": "chatcmpl-same"}
        store.append_calls([make_call("c", None, role=None, **ours), make_call("known", "r", role="a", project="ours")])
        by_completion = LateAttribution(source="langsmith", completion_id="chatcmpl-same", run_id="stolen", role="x")
        store.attribute_late([by_completion, replace(by_completion, completion_id=None, call_id="known")], "theirs")
        assert store.resolve_attributions() == 0
        assert store.get_call("c").attribution == NOWHERE
        assert store.attribution_conflicts() == []
        assert store.get_run("stolen").project == "theirs"
        store.attribute_late([replace(by_completion, run_id="mine")], "ours")
        assert store.get_call("c").attribution.run_id == "mine"
        store.append_calls([make_call("d", None, role=None, **(ours | {"project": "theirs"}))])
        assert store.resolve_attributions() == 1
        assert store.get_call("d").attribution.run_id == "stolen"

    def test_a_fact_names_its_call(self, store: Store) -> None:
        """A call by one of its ids; a span with its run."""
        with pytest.raises(InvalidRecord, match="names no call"):
            store.attribute_late([LateAttribution(source="langsmith", run_id="r")])
        with pytest.raises(InvalidRecord, match="needs its run"):
            store.attribute_late([LateAttribution(source="langsmith", call_id="c", span_id="s")])
        store.attribute_late([])

    def test_what_comes_after_a_lease_is_not_in_it(self, store: Store) -> None:
        """A late call, and a late role: the reclaimed lease reads the same batch, and its commit owes nothing."""
        run_ids = add_group(store, "g", size=2)
        version = first_version(store)
        for run_id in run_ids:
            finish_run(store, run_id)
        store.append_calls([make_call("late", None, role=None, version=version)])
        store.append_calls([make_call("roleless", run_ids[0], role=None, version=version)])
        lease = take(store)
        before = store.lease_traces(lease)
        store.attribute_late([LateAttribution(source="langsmith", call_id="late", run_id=run_ids[0], role="x")])
        store.attribute_late([LateAttribution(source="langsmith", call_id="roleless", role="x")])
        assert store.lease_traces(lease) == before
        assert [call.attribution.role for call in store.trace(run_ids[0]).calls].count("x") == 2
        store.commit_step(lease, make_commit(account(store, lease)))
        report = store.consumption(JOB)
        assert report.conserved
        assert report.excluded["arrived after the lease"] == 3

    def test_a_call_placed_before_the_lease_is_in_it(self, store: Store) -> None:
        """A run made of late calls only is trained like any other."""
        version = first_version(store)
        store.append_calls([make_call("c", None, role=None, version=version)])
        store.attribute_late([LateAttribution(source="langsmith", call_id="c", run_id="r", role="a")])
        store.add_rewards([make_reward("w", "r")])
        store.end_run("r", status="closed", ended_by="hook")
        lease = take(store, min_group=1)
        assert [call.call_id for call in store.lease_traces(lease)[0].calls] == ["c"]
        store.commit_step(lease, make_commit(account(store, lease)))
        assert store.consumption(JOB).trained == 3


class LangSmithContract:
    """What the runs of LangSmith trees became."""

    def test_a_run_is_told_in_parts(self, store: Store) -> None:
        """What a later part leaves out is kept; each project has rows of its own; an unknown run is opened."""
        start = LangSmithRun(langsmith_id="m", trace_id="t", run_id="r")
        store.put_langsmith_runs([start, LangSmithRun(langsmith_id="t", trace_id="t")], "p")
        named = replace(start, named=("chatcmpl-1", "call_2"))
        store.put_langsmith_runs([named, replace(start, run_id=None, span_id="s")], "p")
        whole = replace(start, span_id="s", named=("chatcmpl-1", "call_2"))
        assert store.find_langsmith_run("m", "p") == whole
        assert store.find_langsmith_run("t", "p") == LangSmithRun(langsmith_id="t", trace_id="t")
        assert store.get_run("r").project == "p"
        assert store.find_langsmith_run("m", "q") is store.find_langsmith_run("none", "p") is None
        store.put_langsmith_runs([replace(start, run_id="other")], "q")
        assert store.find_langsmith_run("m", "p") == whole
        store.put_langsmith_runs([])

    def test_the_runs_of_a_trace(self, store: Store) -> None:
        """Each once."""
        told = [LangSmithRun(langsmith_id=str(i), trace_id="t", run_id=run) for i, run in enumerate(["b", "a", "b"])]
        store.put_langsmith_runs([*told, LangSmithRun(langsmith_id="x", trace_id="t")])
        assert store.runs_of_trace("t") == ["a", "b"]
        assert store.runs_of_trace("t", "elsewhere") == store.runs_of_trace("none") == []


class AttemptContract:
    """Which call a repeated request repeats."""

    def test_the_newest_attempt_with_the_same_body_in_the_same_run(self, store: Store) -> None:
        """Another run, another body and an older one are not it."""
        store.append_calls(
            [
                make_call("old", "r", at=10.0, request_hash="h"),
                make_call("first", "r", at=20.0, request_hash="h"),
                make_call("second", "r", at=30.0, request_hash="h", retry_of="first"),
                make_call("other", "r", at=40.0, request_hash="i"),
                make_call("elsewhere", "s", at=50.0, request_hash="h"),
                make_call("nowhere", None, at=60.0, request_hash="h", role=None),
                make_call("theirs", None, at=70.0, request_hash="h", role=None, project="theirs"),
            ]
        )
        assert store.find_attempt("h", "r", 15.0) == "second"
        assert store.find_attempt("h", "r", 30.0) is None
        assert store.find_attempt("h", "r", 0.0, exclude=["second"]) == "first"
        assert store.find_attempt("h", None, 0.0) == "nowhere"
        assert store.find_attempt("h", None, 60.0) is None
        assert store.find_attempt("h", None, 0.0, exclude=["nowhere"]) is None
        assert store.find_attempt("h", None, 0.0, project="theirs") == "theirs"
        assert store.find_attempt("h", "r", 0.0, project="theirs") is None
        assert store.find_attempt("none", "r", 0.0) is None
        assert {call.call_id: call.retry_of for call in store.trace("r").calls}["second"] == "first"

    def test_a_run_opened_by_a_call_is_of_its_project(self, store: Store) -> None:
        """And the call comes back as it went in."""
        call = make_call("c", "r", project="p", endpoint="completions", request_hash="h")
        store.append_calls([call])
        assert store.get_run("r").project == "p"
        assert store.trace("r").calls == (replace(call, choices=store.trace("r").calls[0].choices),)


def _written(store: Store) -> str:
    """What is another once the only row of spans was written."""
    with store._db.write() as connection:
        if store._db.is_sqlite:
            driver: Any = connection.connection.driver_connection
            return str(driver.total_changes)
        return str(connection.exec_driver_sql("SELECT xmin FROM spans").scalar_one())
