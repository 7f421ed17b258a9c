"""What the doctor makes of counts: which sentence, how bad, in which order."""

from dataclasses import replace
from typing import Any

import pytest

from tracegrad.adapters.doctor_report import JobReport, Report
from tracegrad.adapters.doctor_text import lines, verdict_lines
from tracegrad.adapters.doctor_verdict import Finding, is_well, judge
from tracegrad.tracestore.diagnosis_records import (
    CallCounts,
    ChoiceCount,
    ConservationReport,
    Extent,
    FlatGroups,
    GroupCounts,
    HeldLease,
    JobFacts,
    PayloadReport,
    RunCount,
    SpanReport,
    StepFacts,
    Tally,
    Training,
    WaitingGroups,
)
from tracegrad.tracestore.overview import DriftCount
from tracegrad.tracestore.reasons import QUARANTINED, QUARANTINES, REASONS
from tracegrad.tracestore.records import Drift, Publish, PublishState, Run

HEALTHY = Report(
    extent=Extent(),
    calls=CallCounts(calls=100),
    unfinished=Tally(what="aborted", count=0),
    duplicates=Tally(what="duplicates", count=0),
    groups=GroupCounts(),
    flat_groups=None,
)
GROUPED = JobFacts(job_id="main", models=("small",), config={"algorithm": {"credit": {"advantage": "grpo"}}}, rule=None)


def job(trained: int = 1_000, **more: Any) -> JobReport:
    excluded = more.pop("excluded", {})
    stored = more.pop("stored", trained + sum(excluded.values()))
    tokens = ConservationReport(stored=stored, trained=trained, excluded=excluded)
    return JobReport(**{"job": GROUPED, "tokens": tokens, **more})


def publish(publish_id: int, state: PublishState, verdict: str | None = None, error: str | None = None) -> Publish:
    probe = None if verdict is None else {"result": {"verdict": verdict, "mean_abs_new": 0.0123, "bound": 0.05}}
    return Publish(
        publish_id=publish_id,
        version_id=publish_id + 1,
        model="small",
        state=state,
        error=error,
        probe=probe,
        entered={},
    )


def step(**metrics: Any) -> StepFacts:
    return StepFacts(step=4, versions={"small": 5}, created_at=0.0, metrics=metrics)


def flagged(flag: str, choices: int, *, evaluated: bool = False) -> ChoiceCount:
    return ChoiceCount(flags=(flag,), finish_reason="stop", choices=choices, tokens=9, evaluated=evaluated)


def closed(**counts: int) -> RunCount:
    return RunCount(**{"purpose": "train", "status": "closed", "runs": 10, "unrewarded": 0, "empty": 0, **counts})  # type: ignore[arg-type]


def drift(cause: Drift | None, calls: int, *, token_in: bool = False) -> DriftCount:
    return DriftCount(model="small", drift=cause, token_in=token_in, calls=calls)


def run_of(**changed: Any) -> Run:
    return Run(**{"run_id": "r", "purpose": "train", "status": "closed", **changed})


def test_a_healthy_store_gets_no_word() -> None:
    report = replace(HEALTHY, jobs=[job(excluded={"eval": 50, "not leased": 10, "leased": 5})], runs=[closed()])
    assert judge(report) == []
    assert list(verdict_lines([])) == [("well", "nothing here wants action")]


@pytest.mark.parametrize(
    ("level", "code", "says", "changes"),
    [
        ("problem", "not conserved", "7 of 20 sampled tokens are neither trained nor", {"jobs": [job(13, stored=20)]}),
        (
            "problem",
            "nan logprob",
            "nan logprob (calls with a logprob that is no finite number): found 2 times where nobody",
            {"payloads": PayloadReport(calls=9, choices=9, flaws=(Tally(what="nan logprob", count=2, example="c"),))},
        ),
        (
            "problem",
            "version spans",
            "leave tokens out, or name a version that their model does not have): found in 1 calls that nobody",
            {"spans": SpanReport(calls=9, flaws=(Tally(what="version spans", count=1, example="c"),))},
        ),
        (
            "problem",
            "publish failed",
            "publish 7 of small (version 8) failed: stale head; start `tracegrad train`",
            {"publishes": {"small": [publish(7, "failed", "stale", "stale head"), publish(6, "live")]}},
        ),
        (
            "note",
            "publish skipped",
            "publish 7 of small (version 8) was skipped: it is pinned; `tracegrad versions`",
            {"publishes": {"small": [publish(7, "skipped", error="it is pinned"), publish(6, "live")]}},
        ),
        (
            "note",
            "probe unresolved",
            "the last 3 probes of small were unresolved",
            {"publishes": {"small": [publish(n, "live", "unresolved") for n in (3, 2, 1)]}},
        ),
        (
            "problem",
            "lease expired",
            "lease 3 of job 'main' (step 4, 16 runs) expired 40 s ago",
            {
                "jobs": [
                    job(leases=[HeldLease(lease_id=3, job_id="main", step=4, runs=16, expired_s=40.2, expires_at=0.0)])
                ]
            },
        ),
        (
            "problem",
            "logprobs apart",
            "in step 4 of job 'main' trainer and engine differ by 0.12 nats a token",
            {"jobs": [job(steps=[step(logprob_abs_diff=0.12)])]},
        ),
        ("note", "clipped", "40% of the tokens were clipped", {"jobs": [job(steps=[step(clip_fraction=0.4)])]}),
        (
            "problem",
            "quarantined: usage mismatch",
            "usage mismatch (calls whose token counts are not those that the engine says it used): 2 of 100 calls are "
            "never trained (such as call c)",
            {"quarantines": [Tally(what="usage mismatch", count=2, example="c")]},
        ),
        (
            "note",
            "quarantined: usage mismatch",
            "2 of 1000 calls are never trained",
            {"quarantines": [Tally(what="usage mismatch", count=2)], "calls": CallCounts(calls=1_000)},
        ),
        (
            "note",
            "quarantined: redacted",
            "redacted (calls whose text was masked",
            {"quarantines": [Tally(what="redacted", count=90)]},
        ),
        ("problem", "no run", "5 of 100 calls belong to no run", {"calls": CallCounts(calls=100, no_run=5)}),
        ("note", "no role", "5 of 100 calls have no role", {"calls": CallCounts(calls=100, no_role=5)}),
        (
            "problem",
            "role conflict",
            "the sources disagree about the role of 2 calls (such as call c)",
            {"conflicts": [Tally(what="role", count=2, example="c")]},
        ),
        ("note", "duplicates", "1 calls repeat an earlier", {"duplicates": Tally(what="duplicates", count=1)}),
        ("problem", "no reward", "2 of 10 closed runs have no reward", {"runs": [closed(unrewarded=2)]}),
        ("note", "no reward", "1 of 20 closed runs have no", {"runs": [closed(unrewarded=1), closed()]}),
        ("problem", "empty runs", "1 of 10 closed runs have no call", {"runs": [closed(empty=1)]}),
        (
            "problem",
            "run failed",
            "10 of 20 runs failed",
            {"runs": [closed(), RunCount(purpose="live", status="failed", runs=10, unrewarded=10, empty=0)]},
        ),
        ("problem", "group short", "1 of 4 groups have fewer", {"groups": GroupCounts(groups=4, missing=1)}),
        (
            "note",
            "group short",
            "1 of 4 groups have fewer runs than planned",
            {
                "groups": GroupCounts(groups=4, missing=1),
                "runs": [RunCount(purpose="train", status="open", runs=1, unrewarded=1, empty=1)],
            },
        ),
        (
            "problem",
            "group short",
            "1 of 4 groups have fewer runs than planned",
            {
                "groups": GroupCounts(groups=4, missing=1),
                "runs": [RunCount(purpose="eval", status="open", runs=1, unrewarded=1, empty=1)],
            },
        ),
        (
            "note",
            "group members",
            "3 of 4 groups are short of members that count: 2 have failed ones, 1 unrewarded ones (such as group g)",
            {"groups": GroupCounts(groups=4, failed=2, unrewarded=1, failed_example="g")},
        ),
        (
            "problem",
            "zero variance",
            "in 3 of 4 groups all members have the same reward for job 'main', which teaches nothing under group "
            "advantages (such as group g); use harder",
            {"jobs": [job(flat_groups=FlatGroups(compared=4, flat=3, example="g"))]},
        ),
        (
            "note",
            "zero variance",
            "in 1 of 4 groups all members have the same reward",
            {"jobs": [job(flat_groups=FlatGroups(compared=4, flat=1, example="g"))]},
        ),
        ("problem", "aborted", "aborted: 30 of 100 calls; look for", {"calls": CallCounts(calls=100, aborted=30)}),
        ("note", "failed call", "failed call: 3 of 100 calls; read", {"calls": CallCounts(calls=100, failed=3)}),
        (
            "problem",
            "aborted",
            "aborted: 5 of 10 answers were given up by the engine, in calls that came to their end (such as call c);",
            {
                "unfinished": Tally(what="aborted", count=5, example="c"),
                "choices": [
                    ChoiceCount(flags=(), finish_reason="abort", choices=5, tokens=5),
                    ChoiceCount(flags=(), finish_reason="stop", choices=5, tokens=5),
                    ChoiceCount(flags=(), finish_reason="stop", choices=90, tokens=90, evaluated=True),
                ],
            },
        ),
        (
            "note",
            "length",
            "5 of 10 answers were cut off",
            {
                "choices": [
                    ChoiceCount(flags=(), finish_reason="length", choices=5, tokens=5),
                    ChoiceCount(flags=(), finish_reason="stop", choices=5, tokens=5),
                ]
            },
        ),
        (
            "problem",
            "greedy",
            "greedy (tokens of calls at temperature 0, which are no samples): job 'main' does not train 500 of 91000",
            {"jobs": [job(500, excluded={"greedy": 500, "eval": 90_000})]},
        ),
        (
            "note",
            "constrained",
            "constrained (tokens sampled under a grammar",
            {"jobs": [job(excluded={"constrained": 10})]},
        ),
        (
            "problem",
            "truncated sampling",
            "truncated sampling: 5 of 5 answers would not train; if it stays so",
            {"choices": [flagged("truncated_sampling", 5), flagged("greedy", 50, evaluated=True)], "jobs": [job()]},
        ),
        (
            "note",
            "greedy",
            "greedy: 2 of 10 answers would not train",
            {"choices": [flagged("stop_string", 8), flagged("greedy", 2)]},
        ),
        (
            "problem",
            "too stale",
            "2 groups wait for job 'main' and are too stale for it (sampled by weights more than 1 updates behind the "
            "live ones)",
            {"jobs": [job(waiting=WaitingGroups(max_staleness=1, by_lag={0: 1, 1: 1, 2: 2}))]},
        ),
        (
            "note",
            "drift",
            "3 of 12 prompts that go on from an earlier call do not begin with what was sampled (edited, template)",
            {
                "drift": [
                    drift(None, 7),
                    drift("template", 2),
                    drift("template", 2, token_in=True),
                    drift("edited", 1),
                ]
            },
        ),
        ("note", "nothing", "no calls are recorded here", {"calls": CallCounts()}),
    ],
)
def test_each_flaw_has_its_sentence(level: str, code: str, says: str, changes: dict[str, Any]) -> None:
    (found,) = judge(replace(HEALTHY, **changes))
    assert (found.level, found.code) == (level, code)
    assert found.text.startswith(says) or says in found.text, found.text
    assert is_well([found]) == (level == "note")


def test_what_does_not_concern_the_job_is_not_said() -> None:
    """Equal rewards matter to jobs that compare; drift that token-in mended, or a rare one, is no matter."""
    rare = [
        drift(None, 99),
        drift("edited", 1),
    ]
    flat = FlatGroups(compared=4, flat=4)
    assert judge(replace(HEALTHY, flat_groups=flat, jobs=[job(flat_groups=None)], drift=rare)) == []
    eval_only = RunCount(purpose="eval", status="closed", runs=5, unrewarded=5, empty=5)
    assert judge(replace(HEALTHY, runs=[eval_only])) == []


def test_problems_come_before_notes_and_the_worst_of_them_first() -> None:
    report = replace(
        HEALTHY,
        calls=CallCounts(calls=100, no_role=1, no_run=50),
        jobs=[job(13, stored=20)],
        quarantines=[Tally(what="nan logprob", count=40)],
    )
    assert [(one.level, one.code) for one in judge(report)] == [
        ("problem", "not conserved"),
        ("problem", "quarantined: nan logprob"),
        ("problem", "no run"),
        ("note", "no role"),
    ]


def test_of_one_run_it_is_said_why_it_waits_and_every_flaw_is_a_problem() -> None:
    waits = replace(HEALTHY, run=run_of(), jobs=[job(0, excluded={"not leased": 800})])
    (found,) = judge(waits)
    assert (found.level, found.text) == (
        "note",
        "not leased (tokens ready and waiting): job 'main' does not train 800 of 800 tokens; start `tracegrad train`, "
        "or wait for enough groups",
    )
    (found,) = judge(replace(HEALTHY, run=run_of(), calls=CallCounts(calls=1_000, aborted=1)))
    assert found.level == "problem"


@pytest.mark.parametrize("reason", [*REASONS, *(QUARANTINED + one for one in QUARANTINES)])
def test_every_reason_is_explained_for_a_run(reason: str) -> None:
    """Whatever keeps all tokens of a run from training, the verdict says so: in tokens, or in what holds them."""
    quarantine = reason.removeprefix(QUARANTINED)
    counted: dict[str, dict[str, Any]] = {
        "no run": {"calls": CallCounts(calls=4, no_run=4)},
        "run failed": {"runs": [RunCount(purpose="train", status="failed", runs=1, unrewarded=1, empty=0)]},
        "failed call": {"calls": CallCounts(calls=4, failed=4)},
        "aborted": {"calls": CallCounts(calls=4, aborted=4)},
        "too stale": {"jobs": [job(0, waiting=WaitingGroups(max_staleness=1, by_lag={5: 1}))]},
    }
    if reason.startswith(QUARANTINED):
        changes: dict[str, Any] = {"quarantines": [Tally(what=quarantine, count=4)]}
    else:
        changes = counted.get(reason, {"jobs": [job(0, excluded={reason: 100})]})
    words = (QUARANTINES if reason.startswith(QUARANTINED) else REASONS)[quarantine]
    found = judge(replace(HEALTHY, run=run_of(), **changes))
    assert any(words.do in one.text for one in found), found


def test_the_lines_of_a_report() -> None:
    """Every theme once: what a person reads above the verdict."""
    report = replace(
        HEALTHY,
        run=run_of(group_id="g", member=2, status="failed", error="no oven\nat all"),
        trainings=[Training(job_id="main", epoch=0, step=4, checkpoint_hash="h", versions={"small": 5})],
        calls=CallCounts(calls=9, aborted=1, no_run=2, retries=1),
        quarantines=[Tally(what="no usage", count=3)],
        drift=[
            drift(None, 7),
            drift("edited", 2, token_in=True),
        ],
        forks=[Tally(what="edited", count=1), Tally(what="branches", count=2)],
        choices=[
            ChoiceCount(flags=("greedy", "stop_string"), finish_reason="length", choices=5, tokens=50),
            ChoiceCount(flags=(), finish_reason=None, choices=1, tokens=2),
        ],
        spans=SpanReport(calls=3),
        conflicts=[Tally(what="run", count=1)],
        duplicates=Tally(what="duplicates", count=2),
        runs=[closed(unrewarded=1)],
        groups=GroupCounts(groups=3, missing=1, running=1),
        flat_groups=FlatGroups(compared=2, flat=1),
        jobs=[
            job(
                10,
                excluded={"greedy": 5, "aborted": 2},
                trained_lags={0: 8, 1: 2},
                waiting=WaitingGroups(max_staleness=1, by_lag={0: 3, 2: 1}),
                flat_groups=FlatGroups(compared=3, flat=2),
                leases=[HeldLease(lease_id=3, job_id="main", step=5, runs=8, expired_s=-20.0, expires_at=0.0)],
                steps=[step(reward=0.25, ratio_mean=1.0, clip_fraction=0.015, kl=None, stale_tokens=12)],
            )
        ],
        publishes={"small": [publish(2, "rejected", "new"), publish(1, "live")], "unpublished": []},
        payloads=PayloadReport(calls=9, choices=12),
    )
    told = [f"{theme}: {text}" for theme, text in lines(report)]
    assert told == [
        "run: r, train, failed: no oven, member 2 of group g",
        "trained: by job main in step 4 (epoch 0), which made version 5",
        "calls: 9: 1 aborted, 1 sent again, 2 without a run",
        "quarantines: 3 no usage",
        "prompts: 9 go on from an earlier call: 7 as sampled, 2 edited; 2 built from sampled ids",
        "forks: 1 edited, 2 branches",
        "answers: 6 of 52 tokens: 5 greedy, 5 stop string, 5 cut off by length, 1 aborted",
        "in flight: 3 calls went on while weights were exchanged: every token's version is known",
        "conflicts: 1 run",
        "repeated: 2 calls like an earlier one, within a minute",
        "runs: 10 train, closed; 1 without a reward",
        "groups: 3: 1 short of runs, 1 running; in 1 of 2 all rewards are equal",
        "job main: model small: 17 sampled tokens = 10 trained + 7 excluded",
        ": excluded: 5 greedy, 2 aborted",
        ": trained tokens by age in updates: 0: 8, 1: 2",
        ": waiting groups by age in updates (at most 1): 0: 3, 2: 1",
        ": groups that it compares: in 2 of 3 all members have the same reward",
        ": lease 3 for step 5: 8 runs, 20 s left",
        told[-3],
        "publishes: of small: 2 of version 3 rejected (probe new, 0.012 of 0.05 nats); 1 of version 2 live",
        "payloads: 9 calls with 12 answers read: all are as they should be",
    ]
    assert told[-3].startswith(": step 4, 19")
    assert told[-3].endswith(": reward 0.25, ratio 1, clipped 1.5%, stale tokens 12")


def test_a_verdict_is_a_line_a_finding() -> None:
    note = Finding(level="note", code="x", text="so and so")
    assert list(verdict_lines([note])) == [("note", "so and so"), ("well", "nothing here wants action")]
    assert list(verdict_lines([replace(note, level="problem")])) == [("problem", "so and so")]
