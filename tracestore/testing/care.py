"""Contract: runs are deleted whole and provably, what was trained stays true, and what is wrong is found."""

import struct
from dataclasses import replace

import pytest

from tracegrad.tracestore.errors import Conflict, InvalidRecord, LeaseLost, NotFound, TraceStoreError
from tracegrad.tracestore.interchange import Chosen
from tracegrad.tracestore.records import (
    Group,
    LangSmithRun,
    LateAttribution,
    Run,
    Span,
    Task,
)
from tracegrad.tracestore.removal import RUNS_AT_ONCE
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    Clock,
    account,
    add_group,
    finish_run,
    live_version,
    make_call,
    make_choice,
    make_commit,
    make_reward,
    make_rule,
    ready_group,
    sql,
    take,
    train,
)


def rows_of(store: Store, table: str) -> int:
    """Count the rows of a table."""
    with store._db.read() as connection:
        return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one())


def contents(store: Store, table: str, *columns: str) -> list[tuple[object, ...]]:
    """Return these columns of a table as they lie, in order."""
    names = ", ".join(columns)
    with store._db.read() as connection:
        return sorted(map(tuple, connection.exec_driver_sql(f"SELECT {names} FROM {table}")))


def full_run(store: Store, run_id: str) -> None:
    """A live run with a call, a retry of it, a span, rewards, facts of either kind and a LangSmith name; closed."""
    store.append_calls([make_call(f"c1-{run_id}", run_id), make_call(f"c2-{run_id}", run_id, retry_of=f"c1-{run_id}")])
    store.put_spans([Span(span_id="tool", run_id=run_id, name="search", kind="tool", output={"text": "secret"})])
    store.add_rewards(
        [make_reward(f"w1-{run_id}", run_id), make_reward(f"w2-{run_id}", run_id, call_id=f"c1-{run_id}")]
    )
    store.attribute_late(
        [
            LateAttribution(source="langsmith", completion_id=f"chatcmpl-c1-{run_id}", role="other"),
            LateAttribution(source="inferred", call_id=f"c2-{run_id}", run_id=run_id),
        ]
    )
    store.put_langsmith_runs([LangSmithRun(langsmith_id=f"ls-{run_id}", trace_id="t", run_id=run_id, named=("x",))])
    store.end_run(run_id, status="closed", ended_by="explicit")


class RemovalContract:
    """Deletion."""

    def test_a_run_goes_with_all_that_hangs_on_it_and_others_stay(self, store: Store) -> None:
        """Every table that names it is empty of it; another run reads as before."""
        full_run(store, "a")
        full_run(store, "b")
        before = store.trace("b")
        done = store.delete_runs(["a"])
        assert (done.deleted, done.stubs, done.left) == (("a",), (), {})
        assert done.rows == {
            "attributions": 2, "call_payloads": 2, "calls": 2, "choice_payloads": 2, "choices": 2,
            "langsmith_runs": 1, "rewards": 2, "runs": 1, "spans": 2,
        }  # fmt: skip
        with pytest.raises(NotFound):
            store.trace("a")
        assert store.trace("b") == before
        store.delete_runs(["b"])
        for table in ("runs", "calls", "call_payloads", "choices", "choice_payloads", "spans", "rewards",
                      "attributions", "langsmith_runs"):  # fmt: skip
            assert rows_of(store, table) == 0, table

    def test_facts_of_others_about_its_calls_go_and_retries_elsewhere_forget_it(self, store: Store) -> None:
        """Late facts are about its calls, whichever run they name."""
        full_run(store, "a")
        store.append_calls([make_call("again", None, retry_of="c1-a")])
        store.attribute_late([LateAttribution(source="langsmith", completion_id="chatcmpl-c2-a", run_id="elsewhere")])
        store.delete_runs(["a"])
        assert rows_of(store, "attributions") == 0
        assert store.get_call("again").retry_of is None

    def test_an_open_or_held_run_is_refused_and_nothing_is_deleted(self, store: Store) -> None:
        """All or none, with the reason; `skip` leaves such runs alone instead."""
        full_run(store, "a")
        store.open_run(Run(run_id="open"))
        with pytest.raises(Conflict, match="'open' is open"):
            store.delete_runs(["a", "open"])
        held = ready_group(store)
        lease = take(store)
        with pytest.raises(Conflict, match=f"is held by lease {lease.lease_id} of job 'job'"):
            store.delete_runs(["a", *held])
        assert store.trace("a").calls
        done = store.delete_runs(["a", "open", *held], busy="skip")
        assert done.deleted == ("a",) and set(done.skipped) == {"open", *held}

    def test_force_releases_the_lease_and_fences_its_trainer(self, store: Store) -> None:
        """What was computed from deleted runs is never committed (law 9)."""
        held = ready_group(store)
        lease = take(store)
        commit = make_commit(account(store, lease))
        assert store.delete_runs(held, busy="force").left == {}
        with pytest.raises(LeaseLost):
            store.commit_step(lease, commit)
        assert store.reclaim(JOB, 60) is None
        assert rows_of(store, "groups") == rows_of(store, "tasks") == rows_of(store, "holds") == 0
        with store._db.read() as connection:  # nor does the plan of a released lease name them
            assert connection.exec_driver_sql("SELECT run_ids FROM leases").scalar_one() == "[]"

    def test_an_open_run_goes_by_force(self, store: Store) -> None:
        """A run that nobody will end."""
        store.append_calls([make_call("c", "r")])
        assert store.delete_runs(["r"], busy="force").left == {}

    def test_of_a_trained_run_a_stub_stays_and_the_books_stay_true(self, store: Store) -> None:
        """Conservation and ledger say what they said; no content is left."""
        runs = ready_group(store)
        store.attribute_late([LateAttribution(source="langsmith", completion_id=f"chatcmpl-call-{runs[0]}", role="x")])
        version = train(store)
        before = store.consumption(JOB)
        sql(store, "UPDATE calls SET quarantine = 'nan logprob' WHERE run_id = :run", run=runs[1])
        done = store.delete_runs(runs)
        assert (done.deleted, done.stubs) == ((), tuple(runs))
        assert done.left == {"runs": 2, "calls": 2, "choices": 2, "ledger": 2, "consumption": 2}
        assert store.consumption(JOB) == before and before.trained == 6
        with store._db.read() as connection:
            kept = connection.exec_driver_sql("SELECT version_dispatched, completion_id, error, span_id FROM calls")
            assert [tuple(row)[1:] for row in kept] == [(None, None, None)] * 2
        assert contents(store, "calls", "run_id", "quarantine") == [(runs[0], "deleted"), (runs[1], "nan logprob")]
        assert store.get_run(runs[0]).error == "content deleted"
        assert store.trace(runs[0]).calls == ()
        assert version.version_id

    def test_a_stub_is_never_leased_again_not_even_with_new_rewards(self, store: Store) -> None:
        """Not by another job, nor in another epoch; a late call goes at the next deletion."""
        runs = ready_group(store)
        train(store)
        store.delete_runs(runs)
        store.append_calls([make_call(f"late-{run_id}", run_id, version=1) for run_id in runs])
        store.add_rewards([make_reward(f"late-{run_id}", run_id) for run_id in runs])
        store.register_job("second", ["main"], {})
        for job, epoch in (("second", 0), (JOB, 1)):
            assert store.lease(job, make_rule(), groups=1, lease_s=60, step=1, epoch=epoch, seed=0) is None
        report = store.consumption("second")
        assert report.stored == report.trained + sum(report.excluded.values())
        assert store.delete_runs(runs).left == {"runs": 2, "calls": 2, "choices": 2, "ledger": 2, "consumption": 2}

    def test_what_came_after_the_training_leaves_no_stub_of_its_call(self, store: Store) -> None:
        """No ledger speaks of it."""
        runs = ready_group(store)
        train(store)
        store.append_calls([make_call("late", runs[0]), make_call("failed", runs[1], tokens=[], status="failed")])
        assert store.delete_runs(runs).left["calls"] == 2

    def test_a_group_does_not_wait_for_a_deleted_member(self, store: Store) -> None:
        """Its bare row stays until the last member goes, and then all goes."""
        runs = ready_group(store, size=3)
        assert store.delete_runs(runs[:1]).left == {"runs": 1}
        lease = take(store)
        assert set(lease.plan.run_ids) == set(runs[1:])
        store.release(lease)
        assert store.delete_runs(runs[1:]).left == {}
        assert rows_of(store, "runs") == rows_of(store, "groups") == rows_of(store, "tasks") == 0

    def test_a_bare_row_stays_while_what_came_late_names_it(self, store: Store) -> None:
        """A fact of a call that is yet to come, or a trace's part; else the call could never be given its run."""
        for name, late in (("g", "fact"), ("h", "part")):
            first, *rest = ready_group(store, name)
            store.delete_runs([first])
            if late == "fact":
                store.attribute_late([LateAttribution(source="langsmith", completion_id="chatcmpl-z", run_id=first)])
            else:
                store.put_langsmith_runs([LangSmithRun(langsmith_id="x", trace_id="t", run_id=first, named=("x",))])
            assert store.delete_runs(rest).left == {}
            assert store.get_run(first)
        store.append_calls([make_call("z", None, completion_id="chatcmpl-z")])
        assert store.resolve_attributions() == 1
        assert store.delete_runs(["g-0", "h-0"]).left == {}
        assert rows_of(store, "runs") == rows_of(store, "groups") == rows_of(store, "attributions") == 0

    def test_a_task_stays_while_others_name_it(self, store: Store) -> None:
        """It is shared."""
        runs = ready_group(store)
        store.open_run(Run(run_id="other", task_id="task-g"))
        store.delete_runs(runs)
        assert store.get_task("task-g")

    def test_the_task_of_stubs_keeps_no_content_and_takes_it_anew(self, store: Store, clock: Clock) -> None:
        """The question and its gold answer are what was deleted; the next rollout puts the task again."""
        task = Task(task_id="t", input={"question": "secret"}, reference={"golds": ["secret"]})
        store.put_tasks([task])
        store.put_groups([Group(group_id="g", task_id="t", planned_size=2, purpose="train")])
        for member, run_id in enumerate(("a", "b")):
            store.open_run(Run(run_id=run_id, purpose="train", group_id="g", member=member))
            finish_run(store, run_id)
        train(store)
        store.delete_runs(["a"])
        assert store.get_task("t") == task, "b uses it"
        assert store.delete_runs(["b"]).stubs == ("b",)
        assert contents(store, "tasks", "input", "reference") == [("null", "null")]
        with pytest.raises(NotFound, match="content of task 't' was deleted with its runs: put it again"):
            store.get_task("t")
        assert store.project_of_task("t") == "default"
        with pytest.raises(Conflict, match="'t'"):
            store.put_tasks([replace(task, project="other")])
        store.put_groups([Group(group_id="again", task_id="t", planned_size=1, purpose="train")])
        changed = replace(task, input={"question": "anew"})
        store.put_tasks([changed])
        store.put_tasks([changed])
        assert store.get_task("t") == changed
        with pytest.raises(Conflict, match="'t'"):
            store.put_tasks([task])
        store.delete_runs(["a", "b"])
        assert store.get_task("t") == changed, "a group is planned that has not begun"
        store.open_run(Run(run_id="c", purpose="train", group_id="again", member=0))
        store.delete_runs(["c"], busy="force")
        with pytest.raises(NotFound, match="content of task 't'"):
            store.get_task("t")
        assert store.check() == []

    def test_a_task_that_was_put_empty_is_not_one_whose_content_was_deleted(self, store: Store) -> None:
        """It takes no other content."""
        store.put_tasks([Task(task_id="t", input={})])
        with pytest.raises(Conflict, match="'t'"):
            store.put_tasks([Task(task_id="t", input={"question": "?"})])
        assert store.get_task("t").input == {}

    def test_content_of_a_task_that_is_left_is_told(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """The query afterwards looks at tasks too."""
        runs = ready_group(store)
        train(store)
        monkeypatch.setattr("tracegrad.tracestore.removal.blank_tasks", lambda connection, which: 0)
        with pytest.raises(TraceStoreError, match=r"something is left.*\{'tasks': 1\}"):
            store.delete_runs(runs)

    def test_a_key_that_is_bound_to_a_deleted_run_stays_and_is_named(self, store: Store) -> None:
        """It says who may call; what it brings opens the run anew."""
        full_run(store, "a")
        _, bound = store.create_key(scopes=["call"], run_id="a")
        _, revoked = store.create_key(scopes=["call"], run_id="a")
        store.create_key(scopes=["call"])
        store.revoke_key(revoked.key_id)
        assert store.delete_runs(["a"]).keys == (bound.key_id,)
        assert len(store.list_keys()) == 3

    def test_what_a_project_has_beside_its_runs_goes(self, store: Store) -> None:
        """Not while a run is left, whose group may be on its way; not what stubs name, nor keys, nor of others."""
        trained = ready_group(store)
        train(store)
        store.delete_runs(trained)
        for project in ("default", "other"):
            tasks = [Task(task_id=f"{project}-{n}", input={"q": "?"}, project=project) for n in range(3)]
            store.put_tasks(tasks)
            store.put_groups(
                [Group(group_id=f"of-{task.task_id}", task_id=task.task_id, planned_size=1, purpose="train")
                 for task in tasks]
            )  # fmt: skip
            store.attribute_late([LateAttribution(source="langsmith", completion_id="unknown", role="x")], project)
            store.put_langsmith_runs([LangSmithRun(langsmith_id="l", trace_id="t", named=("x",))], project)
            store.create_key(scopes=["call"], project=project)
        store.put_tasks([Task(task_id="task-g", input={"question": "g"})])
        store.open_run(Run(run_id="r"))
        assert store.delete_beside_runs("default") == {}
        store.delete_runs(["r"], busy="force")
        done = [store.delete_beside_runs("default", limit=2) for _ in range(3)]
        assert done == [
            {"attributions": 1, "langsmith_runs": 1, "groups": 2, "tasks": 3},
            {"groups": 1, "tasks": 1},
            {},
        ]
        assert contents(store, "tasks", "task_id", "input") == [
            *((f"other-{n}", '{"q":"?"}') for n in range(3)),
            ("task-g", "null"),
        ]
        assert contents(store, "groups", "group_id") == [("g",), *((f"of-other-{n}",) for n in range(3))]
        assert rows_of(store, "attributions") == rows_of(store, "langsmith_runs") == 1
        assert len(store.list_keys()) == 2

    def test_unknown_runs_and_too_many_are_refused(self, store: Store) -> None:
        """A transaction is bounded."""
        with pytest.raises(NotFound, match="'nobody'"):
            store.delete_runs(["nobody"])
        with pytest.raises(InvalidRecord, match="too many"):
            store.delete_runs([str(number) for number in range(RUNS_AT_ONCE + 1)])
        assert store.delete_runs([]).deleted == ()

    def test_calls_without_a_run_go_by_age(self, store: Store) -> None:
        """Those of one project, with the facts about them."""
        store.append_calls([make_call(name, None, role=None, at=at) for name, at in (("old", 10.0), ("new", 20.0))])
        store.append_calls([make_call("foreign", None, role=None, at=10.0, project="b")])
        store.attribute_late([LateAttribution(source="langsmith", call_id="old", role="x")])
        assert store.delete_unplaced_calls("default", 15.0) == 1
        assert store.delete_unplaced_calls("default", 15.0) == 0
        assert store.get_call("new") and store.get_call("foreign")
        assert rows_of(store, "attributions") == 0


class UpkeepContract:
    """Checks and space."""

    def test_a_sound_store_has_no_faults(self, store: Store) -> None:
        """Stubs of trained runs are none either."""
        trained = ready_group(store, "t")
        train(store)
        full_run(store, "a")
        store.append_calls([make_call("alone", None, role=None)])
        store.delete_runs(trained)
        assert store.check() == []

    def test_what_is_wrong_is_counted_and_named(self, store: Store) -> None:
        """Rows that no constraint forbids to be missing."""
        full_run(store, "a")
        sql(store, "DELETE FROM call_payloads WHERE seq = (SELECT seq FROM calls WHERE call_id = 'c1-a')")
        sql(store, "DELETE FROM choice_payloads WHERE seq = (SELECT seq FROM calls WHERE call_id = 'c2-a')")
        heard: list[str] = []
        found = {fault.what: (fault.count, fault.examples) for fault in store.check(heard.append)}
        assert found == {
            "calls without their payload": (1, ("c1-a",)),
            "choices without their tokens": (1, ("c2-a",)),
        }
        assert set(found) < set(heard)

    @pytest.mark.parametrize(
        ("counts", "ids"),
        [
            (b"\x02\x00\x01\x00", b"\x00"),
            (b"\x02\x00\x01\x00", None),
            (None, b"\x04\x00\x06\x00\x05\x00"),
            (b"\x02\x00\x02\x00", b"\x04\x00\x06\x00\x05\x00"),
            (b"\x02", b"\x04\x00\x06\x00\x05\x00"),
            (struct.pack("<2i", 4, -1), b"\x04\x00\x06\x00\x05\x00"),
        ],
        ids=["ids cut off", "no ids", "no counts", "too few ids", "counts cut off", "below none"],
    )
    def test_kept_sets_that_do_not_add_up_are_found_and_named(
        self, store: Store, counts: bytes | None, ids: bytes | None
    ) -> None:
        """No constraint sees them. Who is to read them says which, and the run can go, its lease with it."""
        version = live_version(store).version_id
        choice = replace(make_choice(0, (4, 5)), kept_ids=((4, 6), (5,)))
        runs = add_group(store)
        for run_id in runs:
            store.append_calls([make_call(f"c-{run_id}", run_id, version=version, choices=(choice,))])
            finish_run(store, run_id, version=version)
        assert store.check() == []
        changed = "UPDATE choice_payloads SET kept_counts = :counts, kept_ids = :ids"
        broken = f"{changed} WHERE seq = (SELECT seq FROM calls WHERE call_id = 'c-g-0')"
        assert sql(store, broken, counts=counts, ids=ids) == 1
        assert [(fault.what, fault.count, fault.examples) for fault in store.check()] == [
            ("choices whose kept sets are not as many as counted", 1, ("c-g-0",))
        ]
        lease = take(store)
        named = "choice 0 of call 'c-g-0', run 'g-0', cannot be put together .* run `tracegrad store check`"
        for read in (
            lambda: store.trace("g-0"),
            lambda: store.get_call("c-g-0"),
            lambda: store.lease_traces(lease),
        ):
            with pytest.raises(TraceStoreError, match=named):
                read()
        with pytest.raises(TraceStoreError, match=r"choice 0 of call number \d+ cannot be put together"):
            list(store.pages("calls", Chosen()))
        with pytest.raises(TraceStoreError, match=r"choice 0 of call number \d+ cannot be put together"):
            store.append_calls([make_call("c-g-0", "g-0")])
        assert store.trace("g-1").calls[0].choices == (choice,)
        store.delete_runs(["g-0"], busy="force")
        assert store.reclaim(JOB, 60) is None and store.check() == []

    def test_a_lease_that_is_over_holds_nothing(self, store: Store) -> None:
        """Its runs could never be deleted."""
        ready_group(store)
        take(store)
        sql(store, "UPDATE leases SET state = 'released'")
        assert [fault.what for fault in store.check()] == ["runs held by a lease that is over"]

    def test_a_vacuum_keeps_everything(self, store: Store) -> None:
        """And says how large the database is."""
        full_run(store, "a")
        before = store.trace("a")
        store.vacuum()
        assert store.trace("a") == before
        assert store.space().size_bytes > 0


class NameContract:
    """Names that nobody knows, and jobs that came to be by mistake."""

    def test_a_project_that_is_not_there_is_refused_where_others_are(self, store: Store) -> None:
        """Known by a run, a task, a key, or a call without a run."""
        store.require_project("demo")
        store.append_calls([make_call("c", "r", project="demo"), make_call("alone", None, role=None, project="loose")])
        store.create_key(scopes=["call"], project="keyed")
        for known in ("demo", "loose", "keyed"):
            store.require_project(known)
        with pytest.raises(NotFound, match=r"no project 'dmeo' in this store; did you mean demo\?"):
            store.require_project("dmeo")

    def test_a_job_that_never_trained_can_go(self, store: Store, clock: Clock) -> None:
        """Its versions stay, of no job and abandoned; what is live, leased or trained stays as it is."""
        ready_group(store)
        version = live_version(store)
        store.register_job("tpyo", [MODEL], {})
        sql(store, "UPDATE policy_versions SET job_id = 'tpyo' WHERE version_id = :id", id=version.version_id)
        with pytest.raises(Conflict, match=f"version {version.version_id} of job 'tpyo' is live"):
            store.remove_job("tpyo")
        live_version(store, 1)
        lease = store.lease("tpyo", make_rule(), groups=1, lease_s=60, step=1, epoch=0, seed=7)
        assert lease is not None
        with pytest.raises(Conflict, match="a trainer holds lease"):
            store.remove_job("tpyo")
        clock.advance(61)
        assert store.remove_job("tpyo") == [version.version_id]
        kept = store.get_version(version.version_id)
        assert (kept.job_id, kept.abandoned, store.list_jobs(), store.check()) == (None, True, [], [])
        with pytest.raises(NotFound, match="no training job 'tpyo'"):
            store.queue("tpyo")
        train(store)
        with pytest.raises(Conflict, match="has trained 1 steps"):
            store.remove_job(JOB)
