"""Where a call may go: by the state of the newest publish, its terms, and who calls."""

import pytest

from tracegrad.adapters.proxy.courses import Caller, Course, course_of, version_on
from tracegrad.adapters.proxy.hold import Gate
from tracegrad.tracestore.records import ModelState, PublishState
from tracegrad.tracestore.schema import PUBLISH_STATES

A, B = "http://a", "http://b"
BOTH = frozenset((A, B))
JUDGE, USER = Caller(number=1, run_id="gate7_x", judging=7), Caller(number=2, run_id="user")
LIVE, CANDIDATE = 3, 4


def view(
    state: PublishState = "evaluating", *, share: float = 0.0, engines: tuple[str, ...] = (B,), beside: bool = False
) -> ModelState:
    gate = {"share": share, "engines": list(engines), "timeout_s": 1.0, **({"beside": True} if beside else {})}
    return ModelState(model="m", live_version=LIVE, publish_id=7, state=state, candidate=CANDIDATE, gate=gate)


@pytest.mark.parametrize("state", PUBLISH_STATES)
def test_outside_of_a_judgement_everybody_goes_to_the_live_version_or_waits(state: PublishState) -> None:
    if state == "evaluating":
        return
    holds = state in ("draining", "swapping", "settling")
    for caller in (JUDGE, USER):
        assert course_of(view(state), BOTH, caller) == (None if holds else Course(LIVE))


def test_all_shares_are_of_the_same_runs_and_as_large_as_they_say() -> None:
    """A run that a share of 0.2 takes is taken by 0.5 too: a larger share moves nobody away."""
    callers = [Caller(number=i, run_id=f"run {i}") for i in range(4000)]
    taken = {
        share: {
            c.number for c in callers if course_of(view(share=share), BOTH, c) == Course(CANDIDATE, frozenset((B,)))
        }
        for share in (0.0, 0.2, 0.5, 1.0)
    }
    assert taken[0.0] < taken[0.2] < taken[0.5] < taken[1.0]
    assert len(taken[0.2]) == pytest.approx(800, abs=100) and len(taken[1.0]) == 4000
    nobody = Caller(number=1)
    assert course_of(view(share=0.99), BOTH, nobody) == Course(LIVE, frozenset((A,))), "a call of no run is no canary"


def test_what_an_engine_serves_while_a_candidate_is_judged() -> None:
    for state in ("evaluating", "settling"):
        assert [version_on(view(state), frozenset((url,))) for url in (A, B)] == [LIVE, CANDIDATE]
    assert [version_on(view("swapping"), frozenset((url,))) for url in (A, B)] == [LIVE, LIVE]
    assert version_on(view(), None) == LIVE


def test_a_canary_that_is_down_leaves_its_share_to_the_others() -> None:
    gate = Gate("m", BOTH)
    gate.view = view(share=1.0)
    assert gate.course(USER) == Course(CANDIDATE, frozenset((B,)))
    gate.ready = lambda engines: engines is None or B not in engines
    assert gate.course(USER) == Course(LIVE, frozenset((A,)))
    assert gate.course(JUDGE) is None, "nobody else can be judged in its place"


def test_a_candidate_beside_what_is_live_is_reached_by_its_own_name_alone() -> None:
    """One engine has both: the same runs go to it as with replicas, and the others do not wait."""
    own, one = view(share=0.5, beside=True), frozenset((B,))
    callers = [JUDGE, *(Caller(number=i, run_id=f"run {i}") for i in range(50))]
    beside = [course_of(own, one, caller) == Course(CANDIDATE, one, True) for caller in callers]
    assert beside == [course_of(view(share=0.5), BOTH, caller) == Course(CANDIDATE, one) for caller in callers]
    assert {course_of(own, one, c) for c in callers} == {Course(CANDIDATE, one, True), Course(LIVE, one)}
    assert [version_on(own, one, beside=beside) for beside in (False, True)] == [LIVE, CANDIDATE]
    assert version_on(view("swapping", beside=True), one, beside=True) is None, "nobody is to be there yet"
    gate = Gate("m", one)
    gate.view = own
    assert gate.course(JUDGE) is None, "a proxy that knows of no adapter sends nobody"
    gate.ready_beside = lambda _engines: True
    assert gate.course(JUDGE) == Course(CANDIDATE, one, True)
