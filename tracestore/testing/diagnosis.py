"""What every backend must count for the doctor, each in a small world where the right numbers are plain to see."""

from dataclasses import replace

import pytest

from tracegrad.tracestore.diagnosis_records import (
    CallCounts,
    ChoiceCount,
    Extent,
    FlatGroups,
    GroupCounts,
    HeldLease,
    PayloadReport,
    RunCount,
    SpanReport,
    Tally,
    Training,
    WaitingGroups,
)
from tracegrad.tracestore.overview import DriftCount
from tracegrad.tracestore.records import Attribution, Choice, Continues, LateAttribution, Run
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    Clock,
    account,
    add_group,
    finish_run,
    first_version,
    live_version,
    make_call,
    make_choice,
    make_commit,
    ready_group,
    sql,
    take,
    train,
)

ALL = Extent()


class DiagnosisContract:
    """Counts of calls, choices and runs."""

    def test_an_empty_store_has_nothing_of_anything(self, store: Store) -> None:
        """Zeros and empty lists, no error and no NULL."""
        assert store.count_calls(ALL) == CallCounts()
        assert store.count_groups(ALL) == GroupCounts()
        assert store.count_flat_groups(ALL) == FlatGroups()
        assert store.count_duplicates(ALL) == Tally(what="duplicates", count=0)
        assert store.count_unfinished(ALL) == Tally(what="aborted", count=0)
        assert store.check_payloads(ALL) == PayloadReport()
        assert store.check_version_spans(ALL) == SpanReport()
        for found in (store.count_quarantines, store.count_drift, store.count_forks, store.count_choices):
            assert found(ALL) == []
        assert (store.count_conflicts(ALL), store.count_runs(ALL), store.list_jobs()) == ([], [], [])

    def test_calls_are_counted_by_what_became_of_them(self, store: Store) -> None:
        """And by what is unknown; an embedding needs neither run nor role."""
        store.append_calls(
            [
                make_call("a", "r"),
                make_call("b", "r", status="failed", choices=()),
                make_call("c", "r", status="aborted"),
                make_call("d", "r", quarantine="usage mismatch"),
                make_call("e", "r", quarantine="usage mismatch", role=None),
                make_call("f", None, quarantine="no usage", retry_of="a"),
                make_call("g", None, role=None, endpoint="embeddings", choices=()),
            ]
        )
        assert store.count_calls(ALL) == CallCounts(
            calls=7,
            embeddings=1,
            failed=1,
            aborted=1,
            quarantined=3,
            retries=1,
            no_run=1,
            no_run_example="f",
            no_role=1,
            no_role_example="e",
        )
        assert store.count_quarantines(ALL) == [
            Tally(what="usage mismatch", count=2, example="e"),
            Tally(what="no usage", count=1, example="f"),
        ]

    def test_a_part_of_the_store_is_counted_alone(self, store: Store, clock: Clock) -> None:
        """By run, project, model and time, and by several of them."""
        store.open_run(Run(run_id="theirs", project="elsewhere"))
        store.append_calls(
            [
                make_call("a", "r", at=1_000.0),
                make_call("b", "r", at=2_000.0, model="other"),
                make_call("c", "theirs", at=2_000.0, project="elsewhere"),
            ]
        )
        clock.advance(1_000)
        store.open_run(Run(run_id="later"))
        for extent, n_calls, n_runs in (
            (Extent(run_id="r"), 2, 1),
            (Extent(project="elsewhere"), 1, 1),
            (Extent(models=("other",)), 1, 1),
            (Extent(since=1_500.0), 2, 1),
            (Extent(since=1_500.0, models=(MODEL,), project="default"), 0, 0),
        ):
            assert store.count_calls(extent).calls == n_calls, extent
            assert sum(one.choices for one in store.count_choices(extent)) == n_calls, extent
            assert sum(one.runs for one in store.count_runs(extent)) == n_runs, extent

    def test_drift_is_counted_by_cause(self, store: Store) -> None:
        """Calls that go on from nothing do not count."""
        origin = Continues(call_id="a", choice=0)
        store.append_calls(
            [
                make_call("a", "r"),
                make_call("b", "r", continues=origin),
                make_call("c", "r", continues=replace(origin, drift="template")),
                make_call("d", "r", continues=replace(origin, drift="template")),
                make_call("e", "r", continues=replace(origin, drift="template", token_in=True)),
            ]
        )
        found = store.count_drift(ALL)  # NULL comes first here and last there
        assert sorted(found, key=lambda one: (one.drift or "", one.token_in)) == [
            DriftCount(model=MODEL, drift=None, token_in=False, calls=1),
            DriftCount(model=MODEL, drift="template", token_in=False, calls=2),
            DriftCount(model=MODEL, drift="template", token_in=True, calls=1),
        ]

    @pytest.mark.parametrize(
        ("why", "branches"),
        [
            ("branches", [{}, {}]),
            ("other answers", [{"choice": 0}, {"choice": 1}]),
            ("retokenised", [{}, {"drift": "retokenised"}]),
            ("several causes of drift", [{"drift": "template"}, {"drift": "edited", "choice": None}]),
            ("retry", [{}, {"retry_of": "b0"}]),
        ],
    )
    def test_a_fork_has_its_cause(self, store: Store, why: str, branches: list[dict[str, object]]) -> None:
        """Two calls of a run that go on from one; those that go on from another, or in another run, are none."""
        alone = Continues(call_id="alone", choice=0)
        store.append_calls([make_call("root", "r"), make_call("x", "r", continues=alone)])
        store.append_calls([make_call("y", "s", continues=alone), make_call("z", "s")])
        for number, branch in enumerate(branches):
            fields = {"call_id": "root", "choice": 0, **branch}
            retry_of = fields.pop("retry_of", None)
            origin = Continues(**fields)  # type: ignore[arg-type]
            store.append_calls([make_call(f"b{number}", "r", continues=origin, retry_of=retry_of)])
        assert store.count_forks(ALL) == [Tally(what=why, count=1, example="root")]
        assert store.count_forks(Extent(run_id="s")) == []

    def test_choices_are_counted_by_flags_and_end(self, store: Store) -> None:
        """With their tokens."""
        cut = replace(make_choice(1, (7,)), finish_reason="length", flags=("greedy", "constrained"))
        plain = replace(make_choice(0, (4, 5)), flags=())
        store.append_calls([make_call("a", "r", choices=(plain, cut)), make_call("b", "r", choices=(plain,))])
        assert store.count_choices(ALL) == [
            ChoiceCount(flags=(), finish_reason="stop", choices=2, tokens=4),
            ChoiceCount(flags=("greedy", "constrained"), finish_reason="length", choices=1, tokens=1),
        ]
        assert store.count_choices(Extent(run_id="r")) == store.count_choices(ALL)
        store.open_run(Run(run_id="measured", purpose="eval"))
        store.append_calls([make_call("m", "measured", choices=(plain,)), make_call("loose", None, choices=(plain,))])
        assert [(one.evaluated, one.choices) for one in store.count_choices(ALL) if not one.flags] == [
            (False, 3),
            (True, 1),
        ]

    def test_answers_that_the_engine_gave_up_are_counted(self, store: Store) -> None:
        """Those that a step would leave out and nothing else counts: not of calls that ended badly as a whole."""
        whole, cut = make_choice(0, (4,)), replace(make_choice(0, (4,)), finish_reason="length")
        ends = [replace(make_choice(1 + n, (5,)), finish_reason=end) for n, end in enumerate(("abort", "error", None))]
        store.open_run(Run(run_id="measured", purpose="eval"))
        store.append_calls(
            [
                make_call("a", "r", choices=(whole, *ends)),
                make_call("b", None, choices=(ends[0],)),
                make_call("fine", "r", choices=(cut,)),
                make_call("aborted", "r", choices=ends, status="aborted"),
                make_call("known", "r", choices=ends, quarantine="no finish reason"),
                make_call("eval", "measured", choices=ends),
            ]
        )
        assert store.count_unfinished(ALL) == Tally(what="aborted", count=4, example="b")
        assert store.count_unfinished(Extent(run_id="r")) == Tally(what="aborted", count=3, example="a")
        assert store.count_unfinished(Extent(run_id="measured")).count == 0

    def test_conflicts_are_counted_once_a_call(self, store: Store) -> None:
        """However it is named and however many sources disagree; another project's word is none."""
        store.append_calls([make_call("a", "r"), make_call("b", "r")])
        store.attribute_late(
            [
                LateAttribution(source="langsmith", call_id="a", run_id="other", role="writer"),
                LateAttribution(source="inferred", completion_id="chatcmpl-a", role="critic"),
                LateAttribution(source="rule", call_id="b", role="answerer"),
            ]
        )
        store.attribute_late([LateAttribution(source="hook", call_id="b", role="writer")], "elsewhere")
        found = [Tally(what="run", count=1, example="a"), Tally(what="role", count=1, example="a")]
        assert store.count_conflicts(ALL) == store.count_conflicts(Extent(run_id="r")) == found
        assert store.count_conflicts(Extent(run_id="other")) == []

    def test_duplicates_are_equal_requests_of_a_run_close_in_time(self, store: Store) -> None:
        """Not one that is known to be a retry, nor what is a minute away, nor another run's or another body."""
        store.append_calls(
            [
                make_call("a", "r", request_hash="h", at=1_000.0),
                make_call("again", "r", request_hash="h", at=1_010.0),
                make_call("retry", "r", request_hash="h", at=1_011.0, retry_of="again"),
                make_call("late", "r", request_hash="h", at=1_500.0),
                make_call("other", "r", request_hash="i", at=1_001.0),
                make_call("elsewhere", "s", request_hash="h", at=1_001.0),
                make_call("nowhere", None, request_hash="h", at=1_001.0),
                make_call("unhashed", "s", at=1_001.0),
                make_call("unhashed too", "s", at=1_001.0),
            ]
        )
        assert store.count_duplicates(ALL) == Tally(what="duplicates", count=1, example="again")

    def test_runs_are_counted_with_what_they_lack(self, store: Store) -> None:
        """A reward on a role is a reward; a reward of 0 too."""
        for run_id in ("zero", "bare", "bare too"):
            finish_run(store, run_id, reward=0.0 if run_id == "zero" else None)
        store.open_run(Run(run_id="silent", purpose="eval"))
        assert store.count_runs(ALL) == [
            RunCount(
                purpose="eval",
                status="open",
                runs=1,
                unrewarded=1,
                empty=1,
                unrewarded_example="silent",
                empty_example="silent",
            ),
            RunCount(purpose="live", status="closed", runs=3, unrewarded=2, empty=0, unrewarded_example="bare too"),
        ]

    def test_stubs_lack_nothing(self, store: Store) -> None:
        """What a deletion leaves of a trained run has no reward on purpose."""
        members = ready_group(store)
        train(store)
        store.delete_runs(members)
        (counted,) = store.count_runs(ALL)
        assert (counted.runs, counted.unrewarded, counted.empty) == (2, 0, 0)
        assert store.count_groups(ALL).unrewarded == 0


class JobDiagnosisContract:
    """What a job did, and what waits for it."""

    def test_conservation_holds_for_a_part_of_the_store_too(self, store: Store) -> None:
        """Stored = trained + excluded, for a run that was trained and for one that was not."""
        ready_group(store, "a")
        lease = take(store)
        store.commit_step(lease, make_commit(account(store, lease, excluded={"call-a-0": "greedy"})))
        store.append_calls([make_call("loose", None, tokens=((1, 2, 3, 4),))])
        of_run = store.consumption(JOB, extent=Extent(run_id="a-0"))
        assert (of_run.stored, of_run.trained, of_run.excluded) == (3, 0, {"greedy": 3})
        assert store.consumption(JOB, extent=Extent(run_id="a-1")).trained == 3
        whole = store.consumption(JOB, extent=Extent(models=(MODEL,)))
        assert whole == store.consumption(JOB)
        assert (whole.conserved, whole.excluded) == (True, {"greedy": 3, "no run": 4})
        assert store.consumption(JOB, extent=Extent(since=5_000.0)).stored == 0

    def test_a_step_is_told_with_what_it_trained_and_how_stale_that_was(self, store: Store) -> None:
        """The first step trains what step 0 sampled; the second what step 0 sampled is one step old."""
        live_version(store)
        ready_group(store, "a")
        ready_group(store, "b")
        first, second = train(store, step=1), train(store, step=2)
        assert store.trained_staleness(JOB, ALL) == {0: 6, 1: 6}
        assert store.trained_staleness(JOB, Extent(run_id="b-0")) == {1: 3}
        assert [(one.step, one.versions, one.metrics) for one in store.last_steps(JOB)] == [
            (2, {MODEL: second.version_id}, {"loss": 0.25}),
            (1, {MODEL: first.version_id}, {"loss": 0.25}),
        ]
        assert len(store.last_steps(JOB, 1)) == 1
        (training,) = store.trained_by("b-0")
        versions = {MODEL: second.version_id}
        assert training == Training(job_id=JOB, epoch=0, step=2, checkpoint_hash="sha-2", versions=versions)
        assert store.trained_by("nobody") == []
        (job,) = store.list_jobs()
        assert (job.job_id, job.models, job.rule is not None) == (JOB, (MODEL,), True)

    def test_what_rolled_back_weights_sampled_was_as_stale_as_the_branch_is_long(self, store: Store) -> None:
        """Trained on the branch it was fresh and stays so; trained from where the branch left, it is two steps old."""
        line = [live_version(store)]
        for step, name in enumerate("ab", start=1):
            ready_group(store, name, version=line[-1].version_id)
            lease = take(store, step=step, max_staleness=9)
            commit = make_commit(account(store, lease), hash_=name, parent=line[-1].version_id)
            line.append(store.commit_step(lease, commit)[MODEL])
        ready_group(store, "c", version=line[2].version_id)
        for version in line[1:]:
            store.abandon_version(version.version_id)
        lease = take(store, step=3, max_staleness=9)
        store.commit_step(lease, make_commit(account(store, lease), hash_="anew", parent=line[0].version_id))
        assert store.trained_staleness(JOB, ALL) == {0: 12, 2: 6}
        assert store.trained_staleness(JOB, Extent(run_id="c-0")) == {2: 3}

    def test_what_waits_is_counted_by_age(self, store: Store) -> None:
        """Also what has become too old; what is trained, held or not ready does not wait."""
        old = live_version(store, 0).version_id
        assert store.waiting_groups(JOB, ALL) is None
        for name in ("trained", "held", "old", "older"):
            ready_group(store, name, version=old)
        train(store, step=1)
        take(store, step=2)
        live_version(store, 2)
        add_group(store, "open")
        ready_group(store, "fresh", version=live_version(store, 3).version_id)
        waits = store.waiting_groups(JOB, ALL)
        assert waits == WaitingGroups(max_staleness=1, by_lag={0: 1, 3: 2})
        assert waits is not None and waits.too_stale == 2
        live_version(store, 1)
        later = store.waiting_groups(JOB, ALL)
        assert later is not None and later.by_lag == {0: 1, 1: 2}, "of a later version than the live one: 0, not -2"
        of_run = store.waiting_groups(JOB, Extent(run_id="fresh-1"))
        assert of_run is not None and of_run.by_lag == {0: 1}

    def test_leases_that_have_not_ended_are_told_with_their_time(self, store: Store, clock: Clock) -> None:
        """Up or not; an acknowledged one has ended."""
        ready_group(store, "a")
        ready_group(store, "b")
        train(store, step=1)
        lease = take(store, step=2, lease_s=60)
        clock.advance(100)
        assert store.held_leases(JOB) == [
            HeldLease(lease_id=lease.lease_id, job_id=JOB, step=2, runs=2, expired_s=40.0, expires_at=clock.now - 40)
        ]
        store.release(lease)
        assert store.held_leases(JOB) == []

    def test_the_newest_publishes_come_first(self, store: Store) -> None:
        """With what the probe saw; of one model."""
        live_version(store, 0)
        publish_id = store.request_publish(first_version(store)).publish_id
        store.advance_publish(publish_id, "failed", error="stale", probe={"result": {"verdict": "stale"}})
        found = store.last_publishes(MODEL)
        assert [(one.state, one.error) for one in found] == [("failed", "stale"), ("live", None)]
        assert found[0].probe == {"result": {"verdict": "stale"}}
        assert (store.last_publishes(MODEL, 1), store.last_publishes("other")) == (found[:1], [])


class SpanDiagnosisContract:
    """Calls that weights were exchanged under."""

    def test_spans_that_do_not_tell_each_tokens_version_are_found(self, store: Store) -> None:
        """However they came to stand there; and calls of two versions that tell of none. Quarantined ones are known."""
        other = live_version(store, model="other").version_id
        old, new = live_version(store, 1).version_id, live_version(store, 2).version_id
        exact = make_call("exact", "r", tokens=[(4, 5, 6)] * 3, version=old)
        spans: list[tuple[tuple[int, int], ...]] = [((0, old), (1, new)), ((0, new),), ()]
        told = [replace(choice, version_spans=each) for choice, each in zip(exact.choices, spans, strict=True)]
        bad = {
            "starts late": f"[[1, {old}]]",
            "goes back": f"[[0, {old}], [2, {new}], [1, {old}]]",
            "beyond the end": f"[[0, {old}], [3, {new}]]",
            "other model's": f"[[0, {old}], [2, {other}]]",
            "unknown version": f"[[0, {old}], [2, 99]]",
            "no spans": "[7]",
        }
        silent = [make_call(f"silent {n}", "s", version=old, version_completed=new) for n in (1, 2)]
        calls = [replace(exact, choices=tuple(told), version_completed=new), *silent]
        calls += [make_call(name, "r", version=old) for name in bad]
        calls += [replace(silent[0], call_id="known", quarantine="version changed")]
        calls += [replace(silent[0], call_id="cut", status="aborted"), make_call("plain", "s", version=new)]
        store.append_calls(calls)
        for name, told_of_it in bad.items():
            seq = "(SELECT seq FROM calls WHERE call_id = :name)"
            sql(store, f"UPDATE choices SET version_spans = :spans WHERE seq = {seq}", name=name, spans=told_of_it)
        assert store.check_version_spans(ALL) == SpanReport(
            calls=7,
            flaws=(
                Tally(what="version spans", count=6, example="unknown version"),
                Tally(what="version changed", count=2, example="silent 2"),
            ),
        )
        assert store.check_version_spans(Extent(run_id="s")).calls == 0
        assert store.models_of([old, other, 99]) == {old: MODEL, other: "other"}
        assert store.models_of([]) == {}


class PayloadDiagnosisContract:
    """Every token looked at."""

    def test_what_the_trainer_would_refuse_is_found(self, store: Store) -> None:
        """Calls that are quarantined or did not end are known already; of somebody else's engine nothing is asked."""
        good = make_choice(0, (4, 5))
        nan = replace(good, logprobs=(-0.5, float("nan")))
        bare = replace(good, logprobs=None)
        alien = Choice(index=0, token_ids=(), logprobs=None, finish_reason="stop", flags=("external",))
        store.append_calls(
            [
                make_call("good", "r", choices=(good, replace(good, index=1))),
                make_call("nan", "r", choices=(nan,)),
                make_call("nan too", "r", choices=(good, replace(nan, index=1))),
                make_call("bare", "s", choices=(bare,)),
                make_call("prompt", "s", prompt_ids=None),
                make_call("known", "r", choices=(bare,), quarantine="no logprobs"),
                make_call("cut", "r", choices=(bare,), status="aborted"),
                make_call("alien", "r", choices=(alien,), prompt_ids=None),
                make_call("vector", "r", choices=(), endpoint="embeddings", attribution=Attribution()),
            ]
        )
        heard: list[tuple[int, int]] = []
        assert store.check_payloads(ALL, lambda done, total: heard.append((done, total))) == PayloadReport(
            calls=6,
            choices=8,
            flaws=(
                Tally(what="nan logprob", count=2, example="nan too"),
                Tally(what="no logprobs", count=1, example="bare"),
                Tally(what="no prompt ids", count=1, example="prompt"),
            ),
        )
        assert heard == [(6, 6)]
        assert store.check_payloads(Extent(run_id="s")).choices == 2

    def test_damage_that_a_constraint_did_not_see_is_found(self, store: Store) -> None:
        """As another program, or a disk, may leave it."""
        if not store._db.is_sqlite:
            pytest.skip("PostgreSQL has no way around its constraints")
        kept = replace(make_choice(0, (4, 5)), kept_ids=((4, 6), (5,)))
        store.append_calls([make_call("a", "r"), make_call("b", "r"), make_call("c", "r", choices=(kept,))])
        with store._db.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA ignore_check_constraints=ON")
            connection.exec_driver_sql(
                "UPDATE choice_payloads SET logprobs = x'00000000'"
                " WHERE seq = (SELECT seq FROM calls WHERE call_id = 'a')"
            )
            connection.exec_driver_sql("UPDATE choice_payloads SET kept_counts = x'02000200' WHERE seq = 3")
            connection.exec_driver_sql("UPDATE call_payloads SET tail = x'0000' WHERE seq = 2")
            connection.commit()
            connection.exec_driver_sql("PRAGMA ignore_check_constraints=OFF")
        assert store.check_payloads(ALL).flaws == (Tally(what="length mismatch", count=3, example="c"),)
