"""What every backend must do with tasks, groups, runs, calls, traces and rewards."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound
from tracegrad.tracestore.records import Attribution, Call, Choice, Group, Run, Span, Task
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    Clock,
    add_group,
    finish_run,
    live_version,
    make_call,
    make_choice,
    make_reward,
    sql,
)


class TaskContract:
    """Tasks, groups and runs."""

    def test_tasks_are_written_once(self, store: Store) -> None:
        """The same content is a no-op, other content a Conflict that changes nothing."""
        task = Task(task_id="t", input={"question": "?", "n": [1, 2]}, reference={"golds": ["a"]}, project="p")
        store.put_tasks([task])
        store.put_tasks([task])
        assert store.get_task("t") == task
        with pytest.raises(Conflict, match="'t'"):
            store.put_tasks([Task(task_id="new", input={}), replace(task, input={})])
        with pytest.raises(NotFound, match="'new'"):
            store.get_task("new")

    def test_groups_are_written_once(self, store: Store) -> None:
        """Same content no-op; other content, an unknown task and an empty plan are refused."""
        group = Group(group_id="g", task_id="t", planned_size=2, purpose="train")
        with pytest.raises(InvalidRecord, match="unknown task 't'"):
            store.put_groups([group])
        store.put_tasks([Task(task_id="t", input={})])
        store.put_groups([group])
        store.put_groups([group])
        assert store.get_group("g") == group
        with pytest.raises(Conflict, match="'g'"):
            store.put_groups([replace(group, planned_size=3)])
        with pytest.raises(InvalidRecord, match="at least 1"):
            store.put_groups([replace(group, group_id="h", planned_size=0)])
        with pytest.raises(NotFound):
            store.get_group("h")

    def test_opening_a_run_again_returns_it(self, store: Store, clock: Clock) -> None:
        """Opening is idempotent by id, whatever happened since; another content is a Conflict."""
        opened = store.open_run(Run(run_id="r", project="p", purpose="train"))
        assert (opened.opened_at, opened.status) == (clock.now, "open")
        clock.advance(5)
        store.end_run("r", status="closed", ended_by="hook")
        assert store.open_run(Run(run_id="r", project="p", purpose="train")).status == "closed"
        with pytest.raises(Conflict, match="'r'"):
            store.open_run(Run(run_id="r", project="p", purpose="eval"))

    def test_a_run_of_a_group_is_like_its_group(self, store: Store) -> None:
        """It takes the group's task; another purpose, task, member or a taken member is refused."""
        add_group(store, "g", size=2)
        assert [run.task_id for run in store.group_runs("g")] == ["task-g", "task-g"]
        taken = Run(run_id="x", purpose="train", group_id="g", member=0)
        with pytest.raises(Conflict, match=r"member 0 .* is run 'g-0'"):
            store.open_run(taken)
        for wrong in ({"purpose": "live"}, {"task_id": "other"}, {"member": 2}, {"member": None}, {"group_id": "none"}):
            with pytest.raises(InvalidRecord, match="'x'"):
                store.open_run(replace(taken, **wrong))
        with pytest.raises(InvalidRecord, match="unknown task"):
            store.open_run(Run(run_id="x", task_id="none"))
        with pytest.raises(InvalidRecord, match="cannot be opened as"):
            store.open_run(Run(run_id="x", status="closed"))
        with pytest.raises(NotFound):
            store.group_runs("none")

    def test_the_schema_keeps_group_purposes(self, store: Store) -> None:
        """Not even raw SQL gives a run of a group another purpose or task than the group's."""
        add_group(store, "g", size=1)
        add_group(store, "h", size=1)
        for wrong in ("purpose = 'eval'", "task_id = 'task-h'", "task_id = NULL", "member = NULL", "member = -1"):
            with pytest.raises(InvalidRecord):
                sql(store, f"UPDATE runs SET {wrong} WHERE run_id = 'g-0'")

    def test_ending_a_run(self, store: Store, clock: Clock) -> None:
        """Ended once: the same again is a no-op, a failed run stays failed, a closed one cannot fail."""
        for run_id in ("closed", "failed"):
            store.open_run(Run(run_id=run_id))
        clock.advance(3)
        ended = store.end_run("failed", status="failed", ended_by="hook", error="boom")
        assert (ended.status, ended.ended_by, ended.error, ended.ended_at) == ("failed", "hook", "boom", clock.now)
        clock.advance(3)
        assert store.end_run("failed", status="closed", ended_by="explicit") == ended
        closed = store.end_run("closed", status="closed", ended_by="explicit")
        assert store.end_run("closed", status="closed", ended_by="hook") == closed
        with pytest.raises(Conflict, match="closed already"):
            store.end_run("closed", status="failed", ended_by="hook")
        with pytest.raises(NotFound):
            store.end_run("none", status="closed", ended_by="hook")
        with pytest.raises(InvalidRecord):
            store.end_run("closed", status="open", ended_by="hook")

    def test_ensure_runs_opens_only_the_unknown(self, store: Store) -> None:
        """Unknown ids become live runs of the project; known ones are left alone."""
        store.open_run(Run(run_id="known", purpose="train", project="p"))
        store.ensure_runs(["known", "new", "new"], "q")
        store.ensure_runs([], "q")
        assert (store.get_run("known").purpose, store.get_run("known").project) == ("train", "p")
        assert (store.get_run("new").purpose, store.get_run("new").project) == ("live", "q")

    def test_idle_live_runs_are_closed(self, store: Store, clock: Clock) -> None:
        """A call keeps a run awake; train runs and other projects are left alone."""
        store.ensure_runs(["quiet", "busy"], "p")
        store.ensure_runs(["elsewhere"], "q")
        store.open_run(Run(run_id="train", project="p", purpose="train"))
        clock.advance(60)
        store.append_calls([make_call("c", "busy")])
        clock.advance(50)
        assert store.close_idle_runs("p", 100) == 1
        assert store.close_idle_runs("p", 100) == 0
        quiet = store.get_run("quiet")
        assert (quiet.status, quiet.ended_by, quiet.ended_at) == ("closed", "idle", clock.now)
        assert {store.get_run(run_id).status for run_id in ("busy", "elsewhere", "train")} == {"open"}

    def test_runs_are_listed_newest_first(self, store: Store, clock: Clock) -> None:
        """Filters, pages, counts, current rewards, roles and versions."""
        version = live_version(store)
        for index in range(5):
            clock.advance(1 if index != 3 else 0)
            store.open_run(Run(run_id=f"r{index}", project="p" if index else "q", purpose="live"))
        store.append_calls(
            [
                make_call("a", "r1", tokens=[(1, 2), (3,)], version=version.version_id),
                make_call("b", "r1", role="rewriter", tokens=[(1, 2, 3)]),
            ]
        )
        store.add_rewards(
            [
                make_reward("1", "r1", 0.25),
                make_reward("2", "r1", 0.5),
                make_reward("3", "r1", 1.0, role="rewriter"),
                make_reward("4", "r1", 1.0, call_id="a"),
            ]
        )
        first = store.list_runs(project="p", limit=2)
        assert [summary.run.run_id for summary in first] == ["r4", "r3"]
        rest = store.list_runs(project="p", before="r3")
        assert [summary.run.run_id for summary in rest] == ["r2", "r1"]
        one = rest[1]
        assert (one.n_calls, one.n_sampled_tokens) == (2, 6)
        assert dict(one.rewards) == {"f1": 0.5, "rewriter:f1": 1.0}
        assert (one.roles, one.versions) == (("answerer", "rewriter"), (version.version_id,))
        assert (rest[0].n_calls, rest[0].n_sampled_tokens, dict(rest[0].rewards)) == (0, 0, {})
        store.end_run("r2", status="failed", ended_by="hook")
        assert [summary.run.run_id for summary in store.list_runs(status="failed", purpose="live")] == ["r2"]
        assert store.list_runs(task_id="none") == []
        with pytest.raises(NotFound):
            store.list_runs(before="none")


class CallContract:
    """Calls and traces."""

    def test_a_call_comes_back_exactly(self, store: Store) -> None:
        """Every field, float32 logprobs with NaN and infinities, choices by index, None as None."""
        version = live_version(store).version_id
        odd = (-0.1, -math.inf, math.nan, 0.0, -1e-45, -123.456)
        call = make_call("c", "r", version=version, stream=True, quarantine="nan logprob", error="e", status="aborted")
        kept = ((0, 70_000), (1,), (2, 300, 4), (3,), (4,), (5, 2**31 - 1))
        two = replace(make_choice(1, range(6), odd), version_spans=((0, version), (4, version + 1)), kept_ids=kept)
        call = replace(call, choices=(two, replace(make_choice(0, ()), flags=())))
        bare = make_call("d", "r", tokens=[], prompt_ids=None, completion_id=None, status="failed", at=500.0)
        none = replace(
            make_call("e", "r"), choices=(Choice(index=0, token_ids=(9,), logprobs=None, finish_reason=None),)
        )
        store.append_calls([call, bare, none])
        first, second, third = store.trace("r").calls
        assert (first, third) == (bare, none)
        assert [choice.index for choice in second.choices] == [0, 1]
        assert second.choices[1].logprobs is not None
        expected = _float32(odd)
        assert repr(second.choices[1].logprobs) == repr(expected)
        exact = replace(call.choices[0], logprobs=None)
        assert replace(second.choices[1], logprobs=None) == exact
        assert replace(second, choices=()) == replace(call, choices=())

    def test_calls_are_ordered_by_dispatch(self, store: Store) -> None:
        """Arrival order decides nothing."""
        store.append_calls([make_call("late", "r", at=2_000.0)])
        store.append_calls([make_call("early", "r", at=1_500.0)])
        assert [call.call_id for call in store.trace("r").calls] == ["early", "late"]

    def test_appending_again_is_a_no_op(self, store: Store) -> None:
        """By call id, also inside a batch; other content under the id is a Conflict and nothing of the batch stays."""
        call = replace(make_call("c", "r"), choices=(make_choice(0, (1,), (math.nan,)),))
        store.append_calls([])
        store.append_calls([call, call])
        store.append_calls([call, make_call("d", "r")])
        assert [stored.call_id for stored in store.trace("r").calls] == ["c", "d"]
        wrong: list[Callable[[Call], Call]] = [
            lambda c: replace(c, model="other"),
            lambda c: replace(c, prompt_ids=None),
            lambda c: replace(c, choices=()),
            lambda c: replace(c, choices=(replace(c.choices[0], logprobs=(-0.5,)),)),
        ]
        for change in wrong:
            with pytest.raises(Conflict, match="'c'"):
                store.append_calls([make_call("e", "r"), change(call)])
        with pytest.raises(Conflict, match="twice in one batch"):
            store.append_calls([make_call("e", "r"), make_call("e", "s")])
        with pytest.raises(NotFound):
            store.find_call("e")

    def test_unknown_runs_are_opened_and_spans_completed(self, store: Store) -> None:
        """A header-only run is live; a span seen again keeps what it knew and takes what is new."""
        store.append_calls([make_call("c", "r")])
        assert store.get_run("r").purpose == "live"
        span = Span(span_id="span-answerer", run_id="r", name="renamed", namespace="a|b", triggers=("x",))
        again = make_call("d", "r")
        store.append_calls([replace(again, attribution=replace(again.attribution, span=span))])
        merged = replace(span, superstep=1)
        assert [call.attribution.span for call in store.trace("r").calls] == [merged, merged]

    def test_bad_calls_are_refused_whole(self, store: Store) -> None:
        """Lengths, repeated choices, a span of another run, an unknown version, an id outside int32, non-JSON."""
        good = make_call("good", "r")
        bad: list[tuple[Call, str]] = [
            (replace(good, call_id="bad", choices=(make_choice(0, (1, 2), (-0.5,)),)), "2 token ids and 1 logprobs"),
            (replace(good, call_id="bad", choices=good.choices * 2), "choice 0 twice"),
            (replace(good, call_id="bad", attribution=replace(good.attribution, run_id="other")), "its span"),
            (replace(good, call_id="bad", version_dispatched=99), "constraint"),
            *(
                (replace(good, call_id="bad", choices=(replace(make_choice(0, (1, 2)), version_spans=spans),)), "spans")
                for spans in (((1, 5),), ((0, 5), (2, 6)), ((0, 5), (1, 6), (1, 7)))
            ),
            *(
                (replace(good, call_id="bad", choices=(replace(make_choice(0, (1, 2)), kept_ids=kept),)), "kept sets")
                for kept in (((1,),), ((1,), (3, 4)), ((1,), (2,), (3,)), ())
            ),
            (replace(good, call_id="bad", choices=(make_choice(0, (2**31,)),)), "int32"),
            (replace(good, call_id="bad", prompt_ids=(-(2**31) - 1,)), "int32"),
            (replace(good, call_id="bad", request={"x": object()}), "JSON"),
        ]
        for call, message in bad:
            with pytest.raises(InvalidRecord, match=message):
                store.append_calls([good, call])
            with pytest.raises(NotFound):
                store.find_call("good")

    def test_a_version_of_another_model_is_refused(self, store: Store) -> None:
        """A call's versions are versions of its own model."""
        version = live_version(store, model="other")
        with pytest.raises(InvalidRecord):
            store.append_calls([make_call("c", "r", version=version.version_id)])

    def test_the_schema_checks_lengths(self, store: Store) -> None:
        """Not even raw SQL stores a blob whose length is not that of its elements."""
        store.append_calls([make_call("c", "r", tokens=[(1, 2, 3)])])
        for table, column in (("choice_payloads", "token_ids"), ("choice_payloads", "logprobs")):
            with pytest.raises(InvalidRecord):
                sql(store, f"UPDATE {table} SET {column} = :blob", blob=b"\0" * 8)
        with pytest.raises(InvalidRecord):
            sql(store, "UPDATE call_payloads SET tail = :blob", blob=b"\0" * 11)
        with pytest.raises(InvalidRecord):
            sql(store, "UPDATE call_payloads SET tail = NULL")
        with pytest.raises(InvalidRecord):
            sql(store, "UPDATE call_payloads SET n_chained = 128")
        with pytest.raises(InvalidRecord):
            sql(store, "UPDATE choices SET n_tokens = 2")

    def test_finding_a_call(self, store: Store) -> None:
        """By our id or the completion id; an ambiguous completion id is refused."""
        store.append_calls([make_call("c", "r"), make_call("free", None, completion_id="same", role=None)])
        assert store.find_call("c") == ("c", "r")
        assert store.find_call("chatcmpl-c") == ("c", "r")
        assert store.find_call("same") == ("free", None)
        store.append_calls([make_call("d", "r", completion_id="same")])
        with pytest.raises(Conflict, match="several"):
            store.find_call("same")
        with pytest.raises(NotFound):
            store.find_call("none")
        store.append_calls([make_call("e", "s", completion_id="same", project="theirs")])
        assert store.find_call("same", "theirs") == ("e", "s")
        assert store.find_call("e", "theirs") == ("e", "s")
        for name in ("e", "chatcmpl-c"):
            with pytest.raises(NotFound):
                store.find_call(name, "elsewhere")

    def test_a_call_without_a_run_is_kept(self, store: Store) -> None:
        """It is recorded, attributed to nobody."""
        call = make_call("c", None, role=None)
        call = replace(call, attribution=Attribution())
        store.append_calls([call])
        assert store.find_call("c") == ("c", None)
        assert store.get_call("c") == call

    def test_one_call_is_read_alone(self, store: Store) -> None:
        """As its run's trace has it, with its span; the call beside it, with a span of its own, changes nothing."""
        store.append_calls([make_call("c", "r", tokens=[(1,), (2, 3)]), make_call("d", "r", role="other")])
        store.put_spans([Span(span_id="span-answerer", run_id="s", name="the same id in another run")])
        assert store.trace("r").calls == (store.get_call("c"), store.get_call("d"))
        with pytest.raises(NotFound, match="no call 'none'"):
            store.get_call("none")

    def test_traces_keep_the_order_asked_for(self, store: Store) -> None:
        """Order of the ids, repeated ids included; an unknown one is NotFound."""
        for run_id in ("a", "b"):
            finish_run(store, run_id)
        assert [trace.run.run_id for trace in store.traces(["b", "a", "b"])] == ["b", "a", "b"]
        assert store.traces([]) == []
        with pytest.raises(NotFound, match="'none'"):
            store.traces(["a", "none"])


class RewardContract:
    """Rewards."""

    def test_the_newest_of_a_target_and_name_counts(self, store: Store) -> None:
        """Run, role and call targets are apart; nothing is overwritten."""
        store.append_calls([make_call("c", "r")])
        given: list[dict[str, Any]] = [{}, {"role": "a"}, {"call_id": "c"}, {"name": "em"}]
        for value in (0.5, 1.0):
            store.add_rewards([make_reward(f"{value}-{i}", "r", value, **more) for i, more in enumerate(given)])
        current = store.trace("r").rewards
        assert [reward.value for reward in current] == [1.0] * 4
        assert {(reward.role, reward.call_id, reward.name) for reward in current} == {
            (None, None, "f1"),
            ("a", None, "f1"),
            (None, "c", "f1"),
            (None, None, "em"),
        }

    def test_the_rewards_of_one_call(self, store: Store) -> None:
        """The newest of each name on the call itself: not those of its run, its role or its neighbour."""
        store.append_calls([make_call("c", "r"), make_call("d", "r"), make_call("free", None)])
        for index, where in enumerate([{}, {"role": "answerer"}, {"call_id": "d"}, {"call_id": "c"}, {"call_id": "c"}]):
            store.add_rewards([make_reward(f"w{index}", "r", value=index, **where)])
        assert [(reward.reward_id, reward.value) for reward in store.call_rewards("c")] == [("w4", 4.0)]
        assert store.call_rewards("free") == store.call_rewards("none") == []
        assert (store.get_reward("w3").call_id, store.get_reward("w3").value) == ("c", 3.0)
        with pytest.raises(NotFound):
            store.get_reward("none")

    def test_rewards_are_idempotent_by_id(self, store: Store, clock: Clock) -> None:
        """Again the same: returned as stored. Again, but different: Conflict."""
        store.ensure_runs(["r"], "p")
        first = store.add_rewards([make_reward("x", "r", 1.0)])
        assert first[0].created_at == clock.now
        clock.advance(1)
        assert store.add_rewards([make_reward("x", "r", 1.0)]) == first
        with pytest.raises(Conflict, match="'x'"):
            store.add_rewards([make_reward("x", "r", 2.0)])
        assert store.add_rewards([]) == []

    def test_values_that_say_nothing_are_refused(self, store: Store) -> None:
        """NaN and infinities, through the method and through raw SQL."""
        store.ensure_runs(["r"], "p")
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(InvalidRecord, match="finite"):
                store.add_rewards([make_reward("ok", "r"), make_reward("x", "r", value)])
            with pytest.raises(InvalidRecord):
                sql(
                    store,
                    "INSERT INTO rewards (reward_id, run_id, name, value, source, created_at) "
                    "VALUES ('x', 'r', 'f1', :value, 't', 0)",
                    value=value,
                )
        assert store.trace("r").rewards == ()

    def test_targets_must_exist(self, store: Store) -> None:
        """Unknown run or call, a call of another run, two targets at once."""
        store.append_calls([make_call("c", "r"), make_call("d", "s")])
        with pytest.raises(NotFound, match="unknown run"):
            store.add_rewards([make_reward("x", "none")])
        with pytest.raises(NotFound, match="unknown call"):
            store.add_rewards([make_reward("x", "r", call_id="none")])
        with pytest.raises(InvalidRecord, match="'d' is of run 's'"):
            store.add_rewards([make_reward("x", "r", call_id="d")])
        with pytest.raises(InvalidRecord, match="one target"):
            store.add_rewards([make_reward("x", "r", call_id="c", role="a")])


def _float32(values: tuple[float, ...]) -> tuple[float, ...]:
    import struct

    return tuple(struct.unpack("<f", struct.pack("<f", value))[0] for value in values)
