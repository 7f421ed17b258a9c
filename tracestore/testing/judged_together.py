"""What every backend must do with candidates of several models that one evaluation decides on: all live, or none."""

import pytest

from tracegrad.tracestore.errors import Abandoned, Conflict, InvalidRecord, Pinned, PublishUnderWay
from tracegrad.tracestore.records import Publish, PublishState
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.gating import FAILED, PASSED, TERMS, evaluation
from tracegrad.tracestore.testing.publishing import a_version
from tracegrad.tracestore.testing.rows import MODEL, live_version, make_call

OTHER = "other"


def candidates(store: Store, *states: PublishState) -> list[Publish]:
    """Open a publish for a version of each of two models and bring them to the last of `states`."""
    opened = store.request_together({a_version(store, model=name).version_id: TERMS for name in (OTHER, MODEL)})
    for state in states:
        if state in ("draining", "swapping"):
            opened = [store.advance_publish(each.publish_id, state) for each in opened]
        else:
            decision = None if state == "evaluating" else PASSED
            opened = store.advance_together(opened[0].publish_id, state, decision=decision)
    return opened


def states(store: Store) -> list[PublishState | None]:
    """Return where the newest publishes of the two models stand."""
    return [view.state for view in store.publish_view([MODEL, OTHER]).values()]


class JudgedTogetherContract:
    """Candidates of several models."""

    def test_they_know_of_one_another_and_end_as_one(self, store: Store) -> None:
        """In the order of their models; proxies read it, too; an end keeps the decision and each one's probe."""
        old = [live_version(store, 0, model=name).version_id for name in (MODEL, OTHER)]
        opened = candidates(store, "draining", "swapping", "evaluating")
        ids = tuple(each.publish_id for each in opened)
        assert [each.model for each in opened] == [MODEL, OTHER]
        assert all(each.together == ids for each in opened)
        assert {view.together for view in store.publish_view([MODEL, OTHER]).values()} == {ids}
        entered = {each.entered["evaluating"] for each in opened}
        assert len(entered) == 1, "their time is over at one moment"
        probes = {each: {"result": each} for each in ids}
        done = store.advance_together(ids[1], "live", decision=PASSED, probes=probes)
        assert [(each.state, dict(each.decision or {}), dict(each.probe or {})) for each in done] == [
            ("live", PASSED, probes[each]) for each in ids
        ]
        assert store.advance_together(ids[0], "live") == done, "twice is once"
        live = [store.live_version(name).version_id for name in (MODEL, OTHER)]  # type: ignore[union-attr]
        assert live == [each.version_id for each in opened] != old

    @pytest.mark.parametrize("state", ["evaluating", "settling", "live"])
    def test_none_goes_on_alone(self, store: Store, state: PublishState) -> None:
        """From the first moment at which a call may reach a candidate."""
        way: list[PublishState] = ["draining", "swapping", "evaluating", "settling", "live"]
        opened = candidates(store, *way[: way.index(state)])
        for each in opened:
            with pytest.raises(Conflict, match="together"):
                store.advance_publish(each.publish_id, state, decision=PASSED)
        assert len(set(states(store))) == 1

    @pytest.mark.parametrize("end", ["failed", "rejected"])
    def test_what_one_of_them_ended_as_leaves_none_live(self, store: Store, end: PublishState) -> None:
        """The transaction is undone whole: the one that could go live does not."""
        opened = candidates(store, "draining", "swapping")
        if end == "rejected":
            way: list[PublishState] = ["evaluating", "settling"]
            for state in way:
                store.advance_together(opened[0].publish_id, state, decision=FAILED)
        store.advance_publish(opened[1].publish_id, end, decision=FAILED if end == "rejected" else None)
        here = store.last_publish(MODEL)
        forward: list[PublishState] = ["evaluating", "live"]
        for state in forward:
            with pytest.raises(Conflict):
                store.advance_together(opened[0].publish_id, state, decision=PASSED)
        assert store.last_publish(MODEL) == here
        assert [store.live_version(name) for name in (MODEL, OTHER)] == [None, None]

    def test_a_decision_against_them_makes_none_live(self, store: Store) -> None:
        """Nor does one that is missing."""
        opened = candidates(store, "draining", "swapping", "evaluating")
        for decision in (FAILED, None):
            with pytest.raises(Conflict, match="has not passed"):
                store.advance_together(opened[0].publish_id, "live", decision=decision)
        assert states(store) == ["evaluating", "evaluating"]

    def test_all_are_opened_or_none(self, store: Store) -> None:
        """A pin, a rolled back version or a publish of one of the models is in the way of all."""
        ours, theirs = a_version(store).version_id, a_version(store, model=OTHER).version_id
        gates = {ours: TERMS, theirs: TERMS}
        store.pin_version(a_version(store, model=OTHER).version_id, "by hand")
        with pytest.raises(Pinned):
            store.request_together(gates)
        store.unpin(OTHER, "by hand")
        under_way = store.request_publish(theirs)
        with pytest.raises(PublishUnderWay):
            store.request_together(gates)
        store.advance_publish(under_way.publish_id, "failed")
        store.abandon_version(theirs)
        with pytest.raises(Abandoned):
            store.request_together(gates)
        assert store.last_publish(MODEL) is None
        (alone,) = store.request_together({ours: TERMS})
        assert alone.together == (alone.publish_id,)

    def test_an_evaluation_is_of_a_version_of_each_of_them(self, store: Store) -> None:
        """A baseline of other company is none, and a call that another version of one of them answered spoils it."""
        ours, theirs = live_version(store).version_id, live_version(store, model=OTHER).version_id
        newer = a_version(store, 1, model=OTHER).version_id
        alone, both = {MODEL: ours}, {MODEL: ours, OTHER: theirs}
        of_one, of_both = evaluation(store, ours), evaluation(store, ours, versions=both)
        assert (of_one.versions, of_both.versions) == (alone, both)
        assert store.find_baseline(alone, "t", "f1") == of_one
        assert store.find_baseline(both, "t", "f1") == of_both
        assert store.find_baseline({MODEL: ours, OTHER: newer}, "t", "f1") is None
        assert store.find_baseline({OTHER: theirs}, "t", "f1") is None
        store.append_calls([make_call("theirs", "b", model=OTHER, version_dispatched=newer)])
        evaluation(store, ours)
        with pytest.raises(InvalidRecord, match="1 calls of its runs were answered by another one"):
            evaluation(store, ours, versions=both)
        evaluation(store, ours, versions={MODEL: ours, OTHER: newer})
        with pytest.raises(InvalidRecord, match="is not of 'other'"):
            evaluation(store, ours, versions={OTHER: ours}, run_ids=(), n_failed=0)
