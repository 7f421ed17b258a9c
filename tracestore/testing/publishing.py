"""What every backend must do with versions, publishes and proxies."""

import threading
from contextlib import suppress

import pytest

from tracegrad.tracestore.errors import Abandoned, Conflict, InvalidRecord, NotFound
from tracegrad.tracestore.records import PolicyVersion, PublishState
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import MODEL, Clock, live_version, make_rule, sql

STATES: tuple[PublishState, ...] = ("requested", "draining", "swapping", "live", "failed")
"""Of a publish without a gate."""


def a_version(store: Store, step: int = 0, *, model: str = MODEL, parent_id: int | None = None) -> PolicyVersion:
    """Add a version of no job."""
    return store.add_version(
        model=model,
        kind="canary",
        parent_id=parent_id,
        checkpoint_path="/c",
        checkpoint_hash="h",
        step=step,
        job_id=None,
    )


class VersionContract:
    """Versions."""

    def test_versions_are_numbered_and_kept(self, store: Store, clock: Clock) -> None:
        """Read back, listed by model, abandoned but never gone."""
        first = a_version(store)
        second = a_version(store, 1, parent_id=first.version_id)
        other = a_version(store, model="other")
        assert first.version_id < second.version_id < other.version_id
        assert store.get_version(second.version_id) == second
        assert (second.parent_id, second.created_at, second.abandoned) == (first.version_id, clock.now, False)
        assert store.list_versions(MODEL) == [first, second]
        assert store.list_versions() == [first, second, other]
        store.abandon_version(second.version_id)
        store.abandon_version(second.version_id)
        assert [version.abandoned for version in store.list_versions()] == [False, True, False]

    def test_ids_are_never_reused(self, store: Store) -> None:
        """Also after the row is gone."""
        gone = a_version(store)
        sql(store, "DELETE FROM policy_versions")
        assert a_version(store).version_id > gone.version_id

    def test_unknown_relatives_are_refused(self, store: Store) -> None:
        """A parent is a version of the same model; a job is registered; an id exists."""
        other = a_version(store, model="other")
        for parent in (99, other.version_id):
            with pytest.raises(InvalidRecord, match="parent"):
                a_version(store, parent_id=parent)
        with pytest.raises(InvalidRecord, match="register_job"):
            store.add_version(
                model=MODEL, kind="step", parent_id=None, checkpoint_path="", checkpoint_hash="", step=0, job_id="none"
            )
        for call in (store.get_version, store.abandon_version, store.request_publish):
            with pytest.raises(NotFound, match="99"):
                call(99)


class PublishContract:
    """The state machine, and the proxies it waits for."""

    def test_only_legal_transitions(self, store: Store) -> None:
        """Every pair of states: one forward step, failure from what is unfinished, the same state again."""
        legal = {("requested", "draining"), ("draining", "swapping"), ("swapping", "live")}
        legal |= {(state, "failed") for state in ("requested", "draining", "swapping")}
        legal |= {(state, state) for state in STATES}
        for start in STATES:
            for target in STATES:
                publish_id = open_at(store, start)
                if (start, target) in legal:
                    assert store.advance_publish(publish_id, target).state == target
                else:
                    with pytest.raises(Conflict, match=f"is {start} and cannot become {target}"):
                        store.advance_publish(publish_id, target)
                self.finish(store)
        with pytest.raises(NotFound):
            store.advance_publish(9_999, "draining")

    def test_times_probe_and_error_are_kept(self, store: Store, clock: Clock) -> None:
        """`entered` says when each state was reached."""
        publish_id = open_at(store, "draining")
        clock.advance(2)
        store.advance_publish(publish_id, "swapping", probe={"verdict": "new"})
        clock.advance(2)
        failed = store.advance_publish(publish_id, "failed", error="engine died")
        assert failed.error == "engine died"
        assert dict(failed.probe or {}) == {"verdict": "new"}
        assert dict(failed.entered) == {
            "requested": clock.now - 4,
            "draining": clock.now - 4,
            "swapping": clock.now - 2,
            "failed": clock.now,
        }
        assert store.last_publish(MODEL) == failed
        assert store.last_publish("other") is None

    def test_one_unfinished_publish_per_model(self, store: Store) -> None:
        """By the method and by the index; other models are free; abandoned versions are refused."""
        publish_id = open_at(store, "draining")
        with pytest.raises(Conflict, match=f"publish {publish_id} of model 'main' is draining"):
            store.request_publish(a_version(store).version_id)
        with pytest.raises(Conflict):
            sql(
                store,
                "INSERT INTO publishes (version_id, model, state, requested_at) "
                "SELECT version_id, model, 'requested', 0 FROM publishes",
            )
        store.request_publish(a_version(store, model="other").version_id)
        assert store.backlog("job", make_rule()).publishing
        store.advance_publish(publish_id, "failed")
        assert not store.backlog("job", make_rule()).publishing
        abandoned = a_version(store)
        store.abandon_version(abandoned.version_id)
        with pytest.raises(Conflict, match="abandoned"):
            store.request_publish(abandoned.version_id)

    def test_the_live_version_is_that_of_the_newest_live_publish(self, store: Store) -> None:
        """A failed publish changes nothing; a rollback publishes the older version anew."""
        assert store.live_version(MODEL) is None
        assert store.publish_view([MODEL])[MODEL].state is None
        first = live_version(store, 0)
        live_version(store, 1)
        rollback = store.request_publish(first.version_id).publish_id
        for state in STATES[1:4]:
            store.advance_publish(rollback, state)
        failed = store.request_publish(a_version(store).version_id, in_flight=True).publish_id
        view = store.publish_view([MODEL, "other"])
        assert (view[MODEL].live_version, view[MODEL].publish_id) == (first.version_id, failed)
        assert (view[MODEL].state, view["other"].live_version) == ("requested", None)
        assert view[MODEL].in_flight and [each.in_flight for each in store.list_publishes(MODEL)][-2:] == [False, True]
        store.advance_publish(failed, "failed")
        live = store.live_version(MODEL)
        assert live is not None
        assert live.version_id == first.version_id
        assert store.publish_view([]) == {}

    def test_a_version_that_is_gone_back_to_leaves_nothing_newer(self, store: Store) -> None:
        """Once it is live, or not at all; other models and jobs that publish nothing keep what they have."""
        first, second = live_version(store, 0), live_version(store, 1)
        store.register_job("offline", [MODEL], {})
        others = [live_version(store, model="other"), a_version(store)]
        sql(store, "UPDATE policy_versions SET job_id = 'offline' WHERE version_id = :id", id=others[1].version_id)
        for end in ("failed", "live"):
            publish_id = store.request_publish(first.version_id).publish_id
            for state in ("draining", "swapping", end):
                store.advance_publish(publish_id, state, goes_back=True)
            assert store.get_version(second.version_id).abandoned is (end == "live")
        assert not any(store.get_version(each.version_id).abandoned for each in (first, *others))
        with pytest.raises(Abandoned):
            store.request_publish(second.version_id)

    def test_a_publish_waits_for_live_proxies(self, store: Store, clock: Clock) -> None:
        """Alive and not acknowledged; a dead one expires, a new one is waited for, a removed one is not."""
        publish_id = open_at(store, "draining")
        for proxy_id in ("a", "b", "dead"):
            store.register_proxy(proxy_id, "http://127.0.0.1:1")
        clock.advance(10)
        store.beat_proxy("a")
        store.beat_proxy("b")
        assert store.waiting_proxies(publish_id, 5) == ["a", "b"]
        store.ack_publish(publish_id, "a")
        store.ack_publish(publish_id, "a")
        assert store.waiting_proxies(publish_id, 5) == ["b"]
        store.register_proxy("dead", "http://127.0.0.1:2")
        assert store.waiting_proxies(publish_id, 5) == ["b", "dead"]
        store.remove_proxy("dead")
        store.remove_proxy("a")
        store.remove_proxy("none")
        assert store.waiting_proxies(publish_id, 5) == ["b"]
        with pytest.raises(NotFound, match="register it again"):
            store.beat_proxy("dead")
        with pytest.raises(NotFound):
            store.ack_publish(publish_id, "dead")
        with pytest.raises(NotFound):
            store.ack_publish(9_999, "b")
        with pytest.raises(NotFound):
            store.waiting_proxies(9_999, 5)

    def test_what_is_over_waits_for_no_proxy(self, store: Store) -> None:
        """Its publisher would wait for its time-out: nobody acknowledges such a drain."""
        publish_id = open_at(store, "draining")
        store.register_proxy("a", "http://127.0.0.1:1")
        store.advance_publish(publish_id, "failed", error="somebody ended it")
        with pytest.raises(Conflict, match=r"is failed \(somebody ended it\): no proxy drains for it any more"):
            store.waiting_proxies(publish_id, 5)

    def finish(self, store: Store) -> None:
        """Fail the publish of the model if it is unfinished."""
        last = store.last_publish(MODEL)
        if last is not None and last.state not in ("live", "failed"):
            store.advance_publish(last.publish_id, "failed")


class SilentPublisherContract:
    """A publish whose publisher is not heard of any more."""

    def test_it_ends_where_nothing_was_swapped_and_only_there(self, store: Store, clock: Clock) -> None:
        """Before its time nothing happens, a beat is a sign of life, and twice is once."""
        for state in ("requested", "draining"):
            publish_id = open_at(store, state)
            clock.advance(20)
            store.beat_publishes([publish_id])
            clock.advance(20)
            assert store.publish_view([MODEL])[MODEL].silent_s == 20
            assert store.end_unswapped(publish_id, silent_s=30) == []
            clock.advance(20)
            (ended,) = store.end_unswapped(publish_id, silent_s=30)
            assert (ended.state, ended.error) == ("failed", "its publisher was silent for 40 s; nothing was swapped")
            assert store.end_unswapped(publish_id, silent_s=30) == []
            with pytest.raises(Conflict, match=r"is failed \(its publisher was silent for 40 s; .*cannot become"):
                store.advance_publish(publish_id, "swapping")
            store.beat_publishes([publish_id])
            assert store.last_publish(MODEL) == ended, "what has ended has no publisher"
        swapping = open_at(store, "swapping")
        clock.advance(1_000)
        assert store.end_unswapped(swapping, silent_s=30) == store.end_unswapped(swapping) == []
        assert store.publish_view([MODEL])[MODEL].silent_s == 1_000
        with pytest.raises(NotFound):
            store.end_unswapped(9_999)

    def test_one_that_never_says_anything_is_not_silent(self, store: Store, clock: Clock) -> None:
        """An older trainer's. Who knows that it is dead ends it all the same."""
        publish_id = open_at(store, "draining")
        sql(store, "UPDATE publishes SET beat_at = NULL")
        clock.advance(1_000)
        assert store.publish_view([MODEL])[MODEL].silent_s == 0
        assert store.end_unswapped(publish_id, silent_s=30) == []
        (ended,) = store.end_unswapped(publish_id)
        assert ended.error == "its publisher died while it was draining; nothing was swapped"

    def test_what_is_judged_together_ends_together_but_for_what_swaps(self, store: Store, clock: Clock) -> None:
        """None of the others can go on then: the one that swaps is held until its publisher comes back."""
        for swapping in (False, True):
            versions = [a_version(store, model=model).version_id for model in (MODEL, "other")]
            terms = {"share": 0.0, "engines": ["http://e"], "timeout_s": 1.0}
            first, second = (each.publish_id for each in store.request_together(dict.fromkeys(versions, terms)))
            for state in STATES[1 : 3 if swapping else 1]:
                store.advance_publish(first, state)
            clock.advance(31)
            ended = [each.publish_id for each in store.end_unswapped(second, silent_s=30)]
            assert ended == ([second] if swapping else [first, second])
        assert [view.state for view in store.publish_view([MODEL, "other"]).values()] == ["swapping", "failed"]
        store.advance_publish(second, "failed")
        with pytest.raises(Conflict, match="cannot become evaluating"):
            store.advance_together(first, "evaluating")

    def test_either_it_is_ended_or_it_swaps(self, store: Store, clock: Clock) -> None:
        """Its publisher wakes in the moment in which it is taken for dead: exactly one of the two happens."""
        for _ in range(20):
            publish_id = open_at(store, "draining")
            clock.advance(31)
            start = threading.Barrier(2)
            won: list[PublishState] = []

            def wake(publish_id: int, start: threading.Barrier, won: list[PublishState]) -> None:
                start.wait()
                with suppress(Conflict):
                    won.append(store.advance_publish(publish_id, "swapping").state)

            publisher = threading.Thread(target=wake, args=(publish_id, start, won))
            publisher.start()
            start.wait()
            won += [each.state for each in store.end_unswapped(publish_id, silent_s=30)]
            publisher.join()
            last = store.last_publish(MODEL)
            assert last is not None and won == [last.state]
            store.advance_publish(publish_id, "failed")


def open_at(store: Store, state: PublishState) -> int:
    """Open a publish of a new version and bring it to `state`."""
    publish_id = store.request_publish(a_version(store).version_id).publish_id
    for step in ("failed",) if state == "failed" else STATES[1 : STATES.index(state) + 1]:
        store.advance_publish(publish_id, step)
    return publish_id
