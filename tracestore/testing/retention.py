"""Contract: the old are found in order, and what their content weighs."""

from dataclasses import replace

from tracegrad.tracestore.records import Attribution, Run, Span
from tracegrad.tracestore.retention import Place, Retired
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.care import rows_of
from tracegrad.tracestore.testing.rows import (
    Clock,
    add_group,
    finish_run,
    make_call,
    make_choice,
    make_reward,
    ready_group,
    sql,
    take,
    train,
)


class RetentionContract:
    """What is old."""

    def test_the_oldest_ended_runs_page_by_page(self, store: Store, clock: Clock) -> None:
        """Open runs are left out, unless all is asked for."""
        for number in range(5):
            store.append_calls([make_call(f"c{number}", f"r{number}")])
            if number != 1:
                store.end_run(f"r{number}", status="closed", ended_by="explicit")
            clock.advance(10)
        which = Retired(project="default", ended_before=1_035.0)
        first = store.retired_runs(which, limit=2)
        assert [run.place.run_id for run in first] == ["r0", "r2"]  # r1 is open
        rest = store.retired_runs(which, after=first[-1].place, limit=2)
        assert [run.place.run_id for run in rest] == ["r3"]
        assert store.retired_runs(Retired(project="other")) == []
        assert len(store.retired_runs(Retired(project="default"))) == 4
        assert len(store.retired_runs(Retired(project="default", busy_too=True))) == 5

    def test_age_counts_from_the_end_of_a_run(self, store: Store, clock: Clock) -> None:
        """A long run is not old while it works."""
        store.append_calls([make_call("c", "r")])
        clock.advance(100)
        store.end_run("r", status="closed", ended_by="explicit")
        assert store.retired_runs(Retired(project="default", ended_before=1_050.0)) == []

    def test_what_is_held_or_a_stub_is_left_alone(self, store: Store) -> None:
        """Neither is retention's business."""
        trained = ready_group(store, "t")
        train(store)
        store.delete_runs(trained)
        ready_group(store, "h")
        take(store, step=2)
        assert store.retired_runs(Retired(project="default")) == []

    def test_a_stub_in_which_something_was_said_again_is_chosen_like_any_run(self, store: Store, clock: Clock) -> None:
        """An app may go on under an old run id; the run is as old then as its last call or span."""
        first, second, third, fourth = ready_group(store, size=4)
        train(store)
        clock.advance(100)
        store.delete_runs([first, second, third, fourth])
        assert store.retired_runs(Retired(project="default")) == []
        store.append_calls([make_call("again", first)])
        store.add_rewards([make_reward("again", second)])
        store.put_spans([Span(span_id="tool", run_id=third, name="search", kind="tool", output={"text": "secret"})])
        everything = store.retired_runs(Retired(project="default"))
        assert {run.place.run_id: run.calls for run in everything} == {first: 1, second: 0, third: 0}
        chosen = store.retired_runs(Retired(project="default", ended_before=1_050.0))
        assert [run.place.run_id for run in chosen] == [second], "call and span are younger"
        clock.advance(100)
        chosen = store.retired_runs(Retired(project="default", ended_before=1_150.0))
        store.delete_runs([run.place.run_id for run in chosen])
        assert rows_of(store, "call_payloads") == rows_of(store, "rewards") == rows_of(store, "spans") == 0
        assert store.retired_runs(Retired(project="default")) == []

    def test_a_run_that_goes_on_after_its_end_is_not_old(self, store: Store, clock: Clock) -> None:
        """It ended when it was quiet for a while, and went on."""
        store.append_calls([make_call("c", "r")])
        store.end_run("r", status="closed", ended_by="explicit")
        clock.advance(100)
        store.append_calls([make_call("d", "r")])
        assert store.retired_runs(Retired(project="default", ended_before=1_050.0)) == []
        assert len(store.retired_runs(Retired(project="default", ended_before=1_101.0))) == 1

    def test_everything_that_was_said_weighs(self, store: Store) -> None:
        """Kept sets can be most of it; version spans, what a span wrote and its error count as well."""
        bare = replace(make_choice(0, (4, 5)), logprobs=(-0.5, -0.5))
        kept = replace(bare, kept_ids=(tuple(range(100)), (5, *range(70_000, 70_199))))
        for name, choice in (
            ("bare", bare),
            ("kept", kept),
            ("versions", replace(bare, version_spans=((0, 1), (1, 2)))),
        ):
            store.append_calls([make_call(name, name, choices=(choice,))])
        store.append_calls([make_call("told", "told", choices=(bare,))])
        store.put_spans([Span(span_id="s", run_id="told", name="s", kind="tool", wrote=("a", "é"), error="wie schön")])
        weights = {run.place.run_id: run.weight_bytes for run in store.weigh_runs(["bare", "kept", "versions", "told"])}
        assert {name: weight - weights["bare"] for name, weight in weights.items()} == {
            "bare": 0,
            "kept": 2 * 2 + 300 * 3,  # two counts of 2 bytes; 300 ids of 3, as the largest of them needs
            "versions": len("[[0,1],[1,2]]"),
            "told": len('["a","é"]'.encode()) + len("wie schön".encode()),
        }

    def test_calls_without_a_run_weigh_like_those_of_a_run(self, store: Store) -> None:
        """Oldest first, in pages; what calls of a page share counts once."""
        long = (*range(100), *range(100, 200))
        store.append_calls([make_call("placed", "r", prompt_ids=long, attribution=Attribution(run_id="r"))])
        alone = [make_call(f"c{number:03}", None, prompt_ids=long, at=10.0 + number) for number in range(150)]
        store.append_calls([*alone, make_call("foreign", None, at=10.0, project="b")])
        (run,) = store.weigh_runs(["r"])
        one = store.weigh_unplaced("default", 11.0)
        assert (one.calls, one.weight_bytes) == (1, run.weight_bytes)
        first = store.weigh_unplaced("default", 1_000.0)
        rest = store.weigh_unplaced("default", 1_000.0, after_seq=first.last_seq)
        assert (first.calls, rest.calls) == (100, 50)
        assert 50 < first.weight_bytes - rest.weight_bytes < 50 * run.weight_bytes
        over = store.weigh_unplaced("default", 1_000.0, after_seq=rest.last_seq)
        assert (over.calls, over.weight_bytes, over.last_seq) == (0, 0, rest.last_seq)

    def test_the_place_beyond_which_there_is_too_much(self, store: Store, clock: Clock) -> None:
        """Weights are the bytes of what was said; the walk goes over many pages."""
        for number in range(250):
            store.append_calls(
                [make_call(f"c{number}", f"r{number:03}", attribution=Attribution(run_id=f"r{number:03}"))]
            )
            if number % 2:
                clock.advance(1)
        (first,) = store.newest_runs("default", limit=1)
        # 3 prompt ids, 3 sampled ids (2 bytes each) with logprobs are 24 bytes; the rest is JSON.
        texts = '{"messages":[{"role":"user","content":"hé"}]}', '{"temperature":0.0}', '{"temperature":1.0}'
        message = '{"role":"assistant","content":"x"}'
        one = 24 + sum(len(text.encode()) for text in (*texts, message))
        assert (first.weight_bytes, first.calls, first.place) == (one, 1, Place(1_124.0, "r249"))
        assert store.place_beyond("default", one * 250) is None
        assert store.place_beyond("default", one * 130) == Place(1_059.0, "r119")
        through = store.place_beyond("default", one * 249)
        assert through == Place(1_000.0, "r000")
        assert len(store.retired_runs(Retired(project="default", through=through, busy_too=True))) == 1

    def test_an_empty_group_member_weighs_nothing(self, store: Store) -> None:
        """A run without calls is a run."""
        for run_id in add_group(store):
            finish_run(store, run_id)
        store.open_run(Run(run_id="empty"))
        assert {run.place.run_id: run.calls for run in store.newest_runs("default")} == {"empty": 0, "g-0": 1, "g-1": 1}
        assert sql(store, "UPDATE runs SET opened_at = opened_at") == 3
