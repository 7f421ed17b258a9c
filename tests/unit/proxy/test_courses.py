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


def view(state: PublishState = "evaluating", *, share: float = 0.0, engines: tuple[str, ...] = (B,)) -> ModelState:
    gate = {"share": share, "engines": list(engines), "timeout_s": 1.0}
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
