"""What every backend must do with gates, evaluations, evaluators and pins."""

import itertools
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound, Pinned
from tracegrad.tracestore.evaluations import Evaluator, Measured
from tracegrad.tracestore.gating import GateTerms, StoredEvaluation, run_prefix
from tracegrad.tracestore.pins import take_turn
from tracegrad.tracestore.records import Publish, PublishState, Run
from tracegrad.tracestore.schema import PUBLISH_STATES
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.publishing import a_version
from tracegrad.tracestore.testing.rows import MODEL, Clock, live_version, make_call, sql

TERMS = GateTerms(share=0.0, engines=("http://e",), timeout_s=60).as_json()
PASSED = {"passed": True, "judged": True, "why": "good"}
FAILED = {"passed": False, "judged": True, "why": "bad"}
_names = itertools.count()


def to_state(store: Store, state: PublishState, *, gate: bool = True, decision: dict[str, object] = PASSED) -> Publish:
    """Bring a publish of a new version to `state` by the way that a gate takes (or, without one, the plain way)."""
    version = a_version(store).version_id
    if state == "skipped":
        return store.skip_publish(version, "pinned")
    publish = store.request_publish(version, gate=TERMS if gate else None)
    way: list[PublishState] = ["draining", "swapping", "evaluating", "settling"] if gate else ["draining", "swapping"]
    if state in way:
        way = way[: way.index(state) + 1]
    elif state == "requested":
        way = []
    else:
        way.append(state)
    for step in way:
        said = decision if step in ("settling", "live", "rejected") and gate else None
        publish = store.advance_publish(publish.publish_id, step, decision=said)
    return publish


class GateContract:
    """The states between `swapping` and the end."""

    @pytest.mark.parametrize("start", PUBLISH_STATES)
    @pytest.mark.parametrize("gate", [True, False])
    def test_only_what_passed_goes_live(self, store: Store, start: PublishState, gate: bool) -> None:
        """Each step from each state, with a decision for and against: what is legal, and nothing else."""
        steps = {("requested", "draining"), ("draining", "swapping"), ("requested", "failed"), ("draining", "failed")}
        steps |= {("swapping", "failed"), ("settling", "failed"), ("evaluating", "settling")}
        for decision, target in itertools.product((PASSED, FAILED, None), PUBLISH_STATES):
            if not gate and start in ("evaluating", "settling", "rejected"):
                continue
            judged = FAILED if start == "rejected" else PASSED
            stored = to_state(store, start, gate=gate, decision=judged)
            decided = decision or stored.decision
            passed = decided is not None and bool(decided["passed"])
            legal = (start, target) in steps or start == target
            legal |= (start, target) == ("swapping", "evaluating") and gate
            legal |= (start, target) == ("swapping", "live") and not gate
            legal |= start in ("evaluating", "settling") and target == "live" and passed
            legal |= start in ("requested", "settling") and target == "rejected" and decided is not None and not passed
            if legal:
                assert store.advance_publish(stored.publish_id, target, decision=decision).state == target
            else:
                with pytest.raises(Conflict):
                    store.advance_publish(stored.publish_id, target, decision=decision)
            self.end_last(store)

    def end_last(self, store: Store) -> None:
        """End the publish of the model, however it stands."""
        last = store.last_publish(MODEL)
        assert last is not None
        if last.state == "evaluating":
            store.advance_publish(last.publish_id, "settling", decision=FAILED)
        if last.state not in ("live", "failed", "rejected", "skipped"):
            store.advance_publish(last.publish_id, "failed")

    @pytest.mark.parametrize("state", ["evaluating", "settling"])
    def test_what_is_judged_is_unfinished(self, store: Store, state: PublishState) -> None:
        """No second publish, by the method and by the index; the live version stays what it was."""
        live = live_version(store, 0)
        publish = to_state(store, state)
        with pytest.raises(Conflict, match=f"is {state}"):
            store.request_publish(a_version(store).version_id)
        with pytest.raises(Conflict):
            sql(
                store,
                "INSERT INTO publishes (version_id, model, state, requested_at) "
                f"SELECT version_id, model, 'requested', 0 FROM publishes WHERE publish_id = {publish.publish_id}",
            )
        view = store.publish_view([MODEL])[MODEL]
        assert (view.live_version, view.candidate) == (live.version_id, publish.version_id)
        assert dict(view.gate or {}) == TERMS

    def test_the_view_says_how_often_engines_changed_and_when_time_is_over(self, store: Store, clock: Clock) -> None:
        """What a proxy must know to tell whether a call spans two versions, and when to stop believing in a judge."""
        seen = []
        states: list[PublishState] = ["requested", "draining", "swapping", "evaluating", "settling", "rejected"]
        publish = store.request_publish(a_version(store).version_id, gate=TERMS)
        for state in states:
            store.advance_publish(publish.publish_id, state, decision=FAILED if state == "settling" else None)
            view = store.publish_view([MODEL])[MODEL]
            assert not view.overdue
            if state == "evaluating":
                clock.advance(61)
                assert store.publish_view([MODEL])[MODEL].overdue
            seen.append(view.swaps)
        assert seen == [0, 0, 1, 1, 1, 2]
        done = store.last_publish(MODEL)
        assert done is not None
        assert list(done.entered) == [*states[:5], "rejected"]
        assert (dict(done.decision or {}), dict(done.gate or {})) == (FAILED, TERMS)

    def test_each_drain_is_acknowledged_for_itself(self, store: Store) -> None:
        """Who stood still before the swap has to stand still again before the next one."""
        store.register_proxy("p", "http://p")
        publish = to_state(store, "draining")
        store.ack_publish(publish.publish_id, "p")
        assert store.waiting_proxies(publish.publish_id, 10) == []
        for state in ("swapping", "evaluating", "settling"):
            store.advance_publish(publish.publish_id, state)
        assert store.waiting_proxies(publish.publish_id, 10) == ["p"]
        store.ack_publish(publish.publish_id, "p", "settling")
        assert store.waiting_proxies(publish.publish_id, 10) == []

    def test_a_skipped_publish_says_why(self, store: Store) -> None:
        """It never held anybody, and the live version stays."""
        live = live_version(store, 0)
        skipped = store.skip_publish(a_version(store).version_id, "the model is pinned")
        assert (skipped.state, skipped.error) == ("skipped", "the model is pinned")
        view = store.publish_view([MODEL])[MODEL]
        assert (view.live_version, view.state, view.swaps) == (live.version_id, "skipped", 0)
        with pytest.raises(NotFound):
            store.skip_publish(9_999, "x")


def evaluation(store: Store, version_id: int, **changed: object) -> StoredEvaluation:
    """Store an evaluation of two tasks."""
    said = {
        "version_id": version_id,
        "publish_id": None,
        "name": f"evaluation {next(_names)}",
        "tasks_hash": "t",
        "score": "f1",
        "started_at": 1.0,
        "run_ids": ("a", "b", "c"),
        "n_failed": 1,
        "values": {"one": 0.5, "two": 1.0},
    }
    return store.add_evaluation(Measured(**{**said, **changed}))  # type: ignore[arg-type]


class EvaluationContract:
    """Evaluations and who makes them."""

    def test_an_evaluation_is_kept_with_its_figures(self, store: Store, clock: Clock) -> None:
        """Per task, and with an interval; listed by version and by publish; names are never used twice."""
        version = live_version(store, 0)
        publish = to_state(store, "evaluating")
        first = evaluation(store, version.version_id, name="first")
        of_gate = evaluation(store, publish.version_id, publish_id=publish.publish_id)
        assert (first.mean, first.n_runs, first.n_failed, first.created_at) == (0.75, 3, 1, clock.now)
        assert first.low is not None and first.high is not None and 0.5 <= first.low <= 0.75 <= first.high <= 1.0
        assert dict(first.values) == {"one": 0.5, "two": 1.0}
        assert store.list_evaluations(MODEL) == [first, of_gate]
        assert store.list_evaluations(version_id=version.version_id) == [first]
        assert store.list_evaluations(publish_id=publish.publish_id) == [of_gate]
        with pytest.raises(Conflict):
            evaluation(store, version.version_id, name="first")
        with pytest.raises(NotFound):
            evaluation(store, 9_999)

    def test_the_baseline_is_the_newest_of_the_same_tasks_and_score(self, store: Store) -> None:
        """One that found nothing is none."""
        version = live_version(store, 0).version_id
        assert store.find_baseline({MODEL: version}, "t", "f1") is None
        evaluation(store, version)
        newer = evaluation(store, version)
        evaluation(store, version, values={}, n_failed=3)
        broken = evaluation(store, version, error="the app cannot be imported", run_ids=(), n_failed=0, values=None)
        assert (broken.mean, broken.low, dict(broken.values)) == (None, None, {})
        assert store.find_baseline({MODEL: version}, "t", "f1") == newer
        assert store.find_baseline({MODEL: version}, "other", "f1") is None
        assert store.find_baseline({MODEL: version}, "t", "other") is None

    def test_an_evaluation_of_other_versions_calls_is_refused(self, store: Store) -> None:
        """Also one whose calls know no version; a call of another model says nothing."""
        old, new = live_version(store, 0).version_id, live_version(store, 1).version_id
        other = live_version(store, 0, model="other").version_id
        for run_id, version, model in (("a", new, MODEL), ("b", new, MODEL), ("b", other, "other")):
            call = make_call(f"{run_id}-{model}", run_id, model=model, version_dispatched=version)
            store.append_calls([call])
        evaluation(store, new)
        store.append_calls([make_call("changed", "x", version_dispatched=new, version_completed=old)])
        with pytest.raises(InvalidRecord, match="1 calls of its runs were answered by another one"):
            evaluation(store, new, run_ids=("x",))
        with pytest.raises(InvalidRecord, match="2 calls of its runs were answered by another one"):
            evaluation(store, old)
        store.append_calls([make_call("blind", "c", version_dispatched=None, version_completed=None)])
        with pytest.raises(InvalidRecord, match="1 calls"):
            evaluation(store, new)

    def test_evaluators_live_by_their_heartbeat(self, store: Store, clock: Clock) -> None:
        """They say what they evaluate on; a silent one expires, one that leaves is gone."""
        one = Evaluator(evaluator_id="one", model=MODEL, tasks_hash="t", score="f1")
        two = Evaluator(evaluator_id="two", model=MODEL, tasks_hash="u", score="f1")
        store.beat_evaluator(one)
        clock.advance(5)
        store.beat_evaluator(two)
        assert store.living_evaluators(MODEL, 10) == [two, one]
        assert store.living_evaluators("other", 10) == []
        clock.advance(6)
        assert store.living_evaluators(MODEL, 10) == [two]
        store.beat_evaluator(one)
        store.remove_evaluator("two")
        store.remove_evaluator("two")
        assert store.living_evaluators(MODEL, 10) == [one]

    def test_what_a_killed_evaluator_left_open_is_found(self, store: Store) -> None:
        """Only open evaluation runs of gates."""
        store.open_run(Run(run_id=f"{run_prefix(3)}_a", purpose="eval"))
        store.open_run(Run(run_id=f"{run_prefix(3)}_b", purpose="eval"))
        store.open_run(Run(run_id="eval_c", purpose="eval"))
        store.open_run(Run(run_id="gate", purpose="live"))
        store.end_run("gate3_b", status="closed", ended_by="explicit")
        assert store.open_gate_runs() == ["gate3_a"]


class PinContract:
    """Serving held at a version."""

    def test_a_pinned_model_publishes_nothing_else(self, store: Store) -> None:
        """The newest pin counts, and other models are free."""
        first, second = live_version(store, 0), live_version(store, 1)
        assert store.pinned(MODEL) is None
        store.pin_version(first.version_id, "by hand")
        store.pin_version(first.version_id, "again")
        assert store.pinned(MODEL) == first.version_id
        with pytest.raises(Pinned, match=f"pinned at version {first.version_id}"):
            store.request_publish(second.version_id)
        assert store.request_publish(a_version(store, model="other").version_id).state == "requested"
        with pytest.raises(Conflict):
            store.advance_publish(store.request_publish(first.version_id).publish_id, "evaluating")
        store.pin_version(first.version_id, "its own publish is no hindrance")
        store.advance_publish(store.last_publish(MODEL).publish_id, "failed")  # type: ignore[union-attr]
        store.pin_version(second.version_id, "moved")
        assert store.unpin(MODEL, "done") == second.version_id
        assert store.unpin(MODEL, "done") is None
        assert store.request_publish(first.version_id).state == "requested"

    def test_pins_are_refused_where_they_would_come_too_late(self, store: Store) -> None:
        """Another version on its way, an abandoned one, an unknown one."""
        live = live_version(store, 0)
        publish = to_state(store, "evaluating")
        with pytest.raises(Conflict, match=f"publish {publish.publish_id} of version {publish.version_id} is evaluat"):
            store.pin_version(live.version_id, "x")
        gone = a_version(store)
        store.abandon_version(gone.version_id)
        with pytest.raises(Conflict, match="abandoned"):
            store.pin_version(gone.version_id, "x")
        with pytest.raises(NotFound):
            store.pin_version(9_999, "x")

    def test_a_pin_and_a_publish_of_a_model_take_turns(self, store: Store) -> None:
        """Or each would see nothing in its way, and both would be."""
        version = a_version(store).version_id
        with ThreadPoolExecutor(3) as pool:
            with store._db.write() as connection:
                take_turn(connection, MODEL)
                waits: list[Future[Any]] = [
                    pool.submit(store.request_publish, version),
                    pool.submit(store.pin_version, version, "by hand"),
                    pool.submit(store.unpin, MODEL, "by hand"),
                ]
                assert len(wait(waits, 0.1).not_done) == 3
            assert [each.exception() for each in waits] == [None] * 3
