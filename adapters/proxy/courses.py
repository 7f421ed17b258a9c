"""Where a call may go now: to which version, on which engines, or nowhere yet.

Normally every engine of a model serves its live version. While a candidate is judged, the engines that have it take the
runs of its evaluation and the share of other runs that the gate gives it (by a hash of the run's id, so that all calls
of a run and all proxies agree), the rest of the engines goes on with the live version. An adapter's engine may have
both, each under a name of its own: then the candidate's stands beside the live one's. Where there is no rest, others
wait, or all pass with a share of 1. Once its time is over, or where an engine is not known here, the candidate gets
nothing. Candidates of several models that are judged together are reached by the same runs. Pure. Called by `hold`.
"""

from dataclasses import dataclass
from hashlib import blake2b

from tracegrad.tracestore.gating import publish_of_run
from tracegrad.tracestore.records import ModelState, PublishState, Purpose

HOLDING: tuple[PublishState, ...] = ("draining", "swapping", "settling")
_JUDGED: tuple[PublishState, ...] = ("evaluating", "settling")
"""States in which the engines of the candidate serve it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who wants to be dispatched. `number` is its place in line, `judging` the publish whose candidate it evaluates.

    Of publishes that are judged together that is the first.
    """

    number: int
    run_id: str | None = None
    judging: int | None = None


def caller_of(number: int, run_id: str | None, purpose: Purpose) -> Caller:
    """Return who calls. An evaluation that is not a gate's is of the version that serves: no candidate gets a part."""
    if purpose == "eval":
        return Caller(number=number, judging=publish_of_run(run_id))
    return Caller(number=number, run_id=run_id)


@dataclass(frozen=True, slots=True)
class Course:
    """A version and the engines that serve it (None: any of the model's). `beside`: under the name of what is next."""

    version: int | None
    engines: frozenset[str] | None = None
    beside: bool = False


def course_of(state: ModelState, urls: frozenset[str], caller: Caller, *, stays: bool = False) -> Course | None:
    """Return where a call goes, None where it has to wait. `stays`: its run has been with the live version."""
    if state.state in HOLDING:
        return None
    if state.state != "evaluating" or state.gate is None:
        return Course(state.live_version)
    mine, beside = frozenset(state.gate["engines"]), is_beside(state)
    rest, candidate = urls if beside else urls - mine, Course(state.candidate, mine, beside)
    if not mine <= urls:
        return None
    share = 0.0 if state.overdue else state.gate["share"]
    if caller.judging is not None and caller.judging == state.together[0] and not state.overdue:
        return candidate
    if not rest:
        return candidate if share >= 1 else None
    chosen = caller.run_id is not None and not stays and _place(caller.run_id) < share
    return candidate if chosen else Course(state.live_version, rest)


def is_beside(state: ModelState) -> bool:
    """Whether the newest publish has its candidate served beside what is live, until it is decided on."""
    return state.gate is not None and bool(state.gate.get("beside"))


def version_on(state: ModelState, engines: frozenset[str] | None, *, beside: bool = False) -> int | None:
    """Return the version that these engines serve; with `beside` under the name of what is next, None: nothing."""
    judged = state.state in _JUDGED
    if beside:
        return state.candidate if judged and is_beside(state) else None
    mine = state.gate["engines"] if judged and state.gate is not None and not is_beside(state) else ()
    return state.candidate if engines and engines <= frozenset(mine) else state.live_version


def _place(run_id: str) -> float:
    """Return where in [0, 1) a run lies: the same in every proxy and at every publish."""
    return int.from_bytes(blake2b(run_id.encode(), digest_size=6).digest(), "big") / 2**48
