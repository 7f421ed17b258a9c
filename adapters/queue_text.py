"""The queue of a training job as lines for people: (theme, text). Pure. Called by `queue_command`."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from tracegrad.tracestore.diagnosis_records import HeldLease
from tracegrad.tracestore.queue_records import DeadRun, Queue, ReasonCount, RunStanding
from tracegrad.tracestore.reasons import NO_RUN, TRAINED, Stage, words_of

_STAGES: tuple[Stage, ...] = ("ready", "held", "waiting", "trained", "dead", "elsewhere")
_HOW_TO_SEE = {NO_RUN: "`tracegrad runs --unplaced` lists them"}


def queue_lines(queue: Queue) -> Iterator[tuple[str, str]]:
    """Yield what stands where, by stage, each reason with its words."""
    sign = "=" if queue.conserved else "≠"
    sums = ", ".join(f"{queue.tokens(stage)} {stage}" for stage in _STAGES if queue.tokens(stage))
    yield (
        f"job {queue.job_id}",
        f"model{'s' if len(queue.models) > 1 else ''} {', '.join(queue.models)}, epoch {queue.epoch}",
    )
    yield "tokens", f"{queue.stored} sampled {sign} {sums or '0'}"
    if queue.rule is None:
        yield "rule", "the job has not leased yet: which groups are ready is known when it has"
    if queue.groups:
        yield "groups", ", ".join(f"{count} {reason}" for reason, count in queue.groups.items())
    for lease in queue.leases:
        yield "lease", _lease(lease)
    for stage in _STAGES:
        of_stage = [one for one in queue.reasons if one.stage == stage and one.reason != TRAINED]
        for number, one in enumerate(of_stage):
            yield stage if number == 0 else "", _reason(one)


def dead_lines(job_id: str, found: Sequence[DeadRun], limit: int) -> Iterator[tuple[str, str]]:
    """Yield a page of runs with dead letters, and how to see the next one."""
    yield f"job {job_id}", "no dead letters" if not found else f"{len(found)} runs with dead letters, newest first"
    for one in found:
        run = one.run
        group = "" if run.group_id is None else f", group {run.group_id}"
        beside = f"; {one.trained} tokens were trained" if one.trained else ""
        yield run.run_id, f"{_time(run.opened_at)}, {run.purpose}, {run.status}{group}{beside}"
        for reason, tokens in one.reasons.items():
            words = words_of(reason)
            yield "", f"{reason}: {tokens} tokens {words.means}; {words.do}"
        for reason, tokens in one.refused.items():
            words = words_of(reason)
            yield "", f"refused for {reason}: {tokens} tokens {words.means}; {words.do}"
    if len(found) == limit:
        yield "", f"the next page: --dead --job {job_id} --before {found[-1].run.run_id}"


def run_lines(job_id: str, standing: RunStanding) -> Iterator[tuple[str, str]]:
    """Yield one run before one job: what it waits for, then where each answer stands."""
    run, group = standing.run, standing.group
    yield f"job {job_id}", f"run {run.run_id}, {run.purpose}, {run.status}"
    if standing.lease is not None:
        yield "held", f"by {_lease(standing.lease)}"
    if standing.grace_until is not None:
        yield "waits", f"for its grace time, until {_time(standing.grace_until)}"
    open_yet = not standing.choices or any(one.stage == "waiting" for one in standing.choices)
    if standing.wants and run.status != "failed" and open_yet:  # what is trained, or dead, waits for nothing
        yield "waits", f"for rewards: {', '.join(standing.wants)}"
    if group is not None and run.group_id is not None:
        yield (
            "group",
            f"{run.group_id}: {group.settled} of {group.planned} members ended and settled, {group.trainable} of them "
            f"can be trained, {group.eligible} are rewarded too",
        )
    for one in standing.choices:
        words = words_of(one.reason)
        what = f"call {one.call_id} answer {one.choice_index} ({one.role or 'no role'}): {one.tokens} tokens"
        yield one.stage, f"{what}, {one.reason}" + ("" if one.reason == TRAINED else f" ({words.means}); {words.do}")
    for reason, tokens in standing.refused.items():
        yield "refused", f"{reason}: {tokens} tokens {words_of(reason).means}; {words_of(reason).do}"


def _reason(one: ReasonCount) -> str:
    words = words_of(one.reason)
    such = f", such as {one.example}" if one.example and one.stage in ("waiting", "dead") else ""
    runs = f" ({one.runs} run{'' if one.runs == 1 else 's'}{such})" if one.runs else ""
    do = _HOW_TO_SEE.get(one.reason, words.do) if one.stage != "elsewhere" else "not for this job"
    return f"{one.reason}: {one.tokens} tokens{runs} {words.means}; {do}"


def _lease(lease: HeldLease) -> str:
    until = f"until {_time(lease.expires_at)}"
    passed = (
        f", which was {lease.expired_s:.0f} s ago: `tracegrad train` goes on with it" if lease.expired_s > 0 else ""
    )
    return f"lease {lease.lease_id} of {lease.runs} runs for step {lease.step}, {until}{passed}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
