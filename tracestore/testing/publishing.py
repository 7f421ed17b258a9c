"""What every backend must do with versions, publishes and proxies."""

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
                publish_id = self.at(store, start)
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
        publish_id = self.at(store, "draining")
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
        publish_id = self.at(store, "draining")
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
        publish_id = self.at(store, "draining")
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

    def at(self, store: Store, state: PublishState) -> int:
        """Open a publish of a new version and bring it to `state`."""
        publish_id = store.request_publish(a_version(store).version_id).publish_id
        path = ("failed",) if state == "failed" else STATES[1 : STATES.index(state) + 1]
        for step in path:
            store.advance_publish(publish_id, step)
        return publish_id

    def finish(self, store: Store) -> None:
        """Fail the publish of the model if it is unfinished."""
        last = store.last_publish(MODEL)
        if last is not None and last.state not in ("live", "failed"):
            store.advance_publish(last.publish_id, "failed")
