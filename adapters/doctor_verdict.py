"""What a person should do: the counts of a report judged, in plain sentences, the worst first.

A `problem` wants action (exit status 1), a `note` may be as meant. Sentences about excluded tokens are those of
`tracestore.reasons`, the words in which the trainer refuses. Pure. Called by `doctor`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tracegrad.adapters.doctor_report import JobReport, Report
from tracegrad.tracestore import reasons
from tracegrad.tracestore.reasons import quarantine_words, words_of
from tracegrad.tracestore.records import Publish

Level = Literal["problem", "note"]

FEW = 0.01
"""Below this share of what there is, a flaw is a note: it is counted and costs next to nothing."""
MANY = 0.10
"""From this share on, what every app has a little of (failed runs, drift) is worth a sentence or an action."""
MOST = 0.5
CLIPPED = 0.3
DEFAULT_BOUND = 0.05

_EXPECTED = {
    *(reasons.EVAL, reasons.LEASED, reasons.OTHER_MODEL, reasons.OTHER_PURPOSE, reasons.SUPERSEDED),
    *(reasons.NOT_LEASED, reasons.EMPTY, reasons.OPEN, reasons.GROUP_OPEN, reasons.GRACE),
    *(reasons.OTHER_PROJECT, reasons.OUTSIDE_WINDOW),
}
"""Why tokens may wait or stay out with nothing being wrong."""
_TOLD_APART = {
    *(reasons.NO_RUN, reasons.TOO_STALE, reasons.RUN_FAILED, reasons.FAILED_CALL, reasons.ABORTED),
}
"""Reasons that calls, runs or groups are counted by, which says more than tokens do."""
_MEANT = {reasons.DELETED, "redacted", "echo", "several prompts", "reasoning hidden"}
"""Quarantines that follow from what the operator or the client asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One sentence, or two: what is wrong and what to do. `code` names the kind for programs."""

    level: Level
    code: str
    text: str


def judge(report: Report) -> list[Finding]:
    """Return what is wrong, the worst first: problems before notes, and each in the order of the checks below."""
    checks = (
        _lost_tokens,
        _payloads,
        _version_spans,
        _publishes,
        _leases,
        _steps,
        _quarantines,
        _placing,
        _runs,
        _groups,
    )
    found = [one for check in (*checks, _ended_badly, _excluded, _waiting, _prompts) for one in check(report)]
    return sorted(found, key=lambda one: one.level != "problem")


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether nothing wants action."""
    return all(one.level != "problem" for one in findings)


def _lost_tokens(report: Report) -> Iterator[Finding]:
    for each in report.jobs:
        tokens = each.tokens
        if not tokens.conserved:
            lost = tokens.stored - tokens.trained - sum(tokens.excluded.values())
            text = (
                f"{lost} of {tokens.stored} sampled tokens are neither trained nor excluded for job "
                f"{each.job.job_id!r}; look again when nothing is being written, and report it if it stays"
            )
            yield Finding(level="problem", code="not conserved", text=text)


def _payloads(report: Report) -> Iterator[Finding]:
    for flaw in report.payloads.flaws if report.payloads is not None else ():
        words = quarantine_words(flaw.what)
        text = f"{flaw.what} (calls {words.means}): found {flaw.count} times where nobody quarantined it"
        text += _such(flaw.example)
        yield Finding(level="problem", code=flaw.what, text=f"{text}; check the disk, and {words.do}")


def _version_spans(report: Report) -> Iterator[Finding]:
    """The trainer leaves them out, in these words, when it comes to them."""
    for flaw in report.spans.flaws:
        words = words_of(flaw.what)
        text = f"{flaw.what} (tokens {words.means}): found in {flaw.count} calls that nobody quarantined"
        text += f"{_such(flaw.example)}; {words.do}"
        yield Finding(level="problem", code=flaw.what, text=text)


def _publishes(report: Report) -> Iterator[Finding]:
    for model, newest in report.publishes.items():
        for publish in newest[:1]:
            if publish.state == "failed":
                text = (
                    f"publish {publish.publish_id} of {model} (version {publish.version_id}) failed: "
                    f"{publish.error or 'it was given up'}; start `tracegrad train` to publish again"
                )
                yield Finding(level="problem", code="publish failed", text=text)
            elif publish.state in ("rejected", "skipped"):
                why = publish.error if publish.decision is None else publish.decision["why"]
                text = (
                    f"publish {publish.publish_id} of {model} (version {publish.version_id}) was {publish.state}: "
                    f"{why}; `tracegrad versions` shows what serves, and the figures"
                )
                yield Finding(level="note", code=f"publish {publish.state}", text=text)
        verdicts = [seen for seen in map(probe_verdict, newest) if seen is not None]
        if len(verdicts) > 2 and set(verdicts) == {"unresolved"}:
            text = (
                f"the last {len(verdicts)} probes of {model} were unresolved: steps are too small to be seen in the "
                "engine; raise `trainer.publish.probe_tokens` or the learning rate"
            )
            yield Finding(level="note", code="probe unresolved", text=text)


def _leases(report: Report) -> Iterator[Finding]:
    for lease in (lease for each in report.jobs for lease in each.leases):
        if lease.expired_s > 0:
            text = (
                f"lease {lease.lease_id} of job {lease.job_id!r} (step {lease.step}, {lease.runs} runs) expired "
                f"{lease.expired_s:.0f} s ago and nobody took it over: start `tracegrad train`, which goes on with it"
            )
            yield Finding(level="problem", code="lease expired", text=text)


def _steps(report: Report) -> Iterator[Finding]:
    for each in report.jobs:
        if not each.steps:
            continue
        last = each.steps[0]
        where = f"in step {last.step} of job {each.job.job_id!r}"
        bound = (each.job.config.get("publish") or {}).get("probe_bound") or DEFAULT_BOUND
        apart, clipped = last.metrics.get("logprob_abs_diff"), last.metrics.get("clip_fraction")
        if apart is not None and apart > bound:
            text = (
                f"{where} trainer and engine differ by {apart:.3g} nats a token under the same weights (bound "
                f"{bound:g}), so what is trained is not what sampled; compare the engine's `dtype` with "
                "`trainer.precision`, and look at the last probe"
            )
            yield Finding(level="problem", code="logprobs apart", text=text)
        if clipped is not None and clipped > CLIPPED:
            text = (
                f"{where} {clipped:.0%} of the tokens were clipped: lower `trainer.optimizer.lr`, `epochs` or "
                "`trainer.batch.max_staleness`"
            )
            yield Finding(level="note", code="clipped", text=text)


def _quarantines(report: Report) -> Iterator[Finding]:
    for one in report.quarantines:
        words = quarantine_words(one.what)
        text = f"{one.what} (calls {words.means}): {one.count} of {report.calls.calls} calls are never trained"
        text += f"{_such(one.example)}; {words.do}"
        meant = one.what in _MEANT
        level: Level = "note" if meant else _level(report, one.count, report.calls.calls, FEW)
        yield Finding(level=level, code=f"quarantined: {one.what}", text=text)


def _placing(report: Report) -> Iterator[Finding]:
    counts = report.calls
    if counts.no_run:
        words = words_of(reasons.NO_RUN)
        text = f"{counts.no_run} of {counts.calls} calls belong to no run and are never trained"
        text += f"{_such(counts.no_run_example)}; {words.do}"
        yield Finding(level=_level(report, counts.no_run, counts.calls, FEW), code="no run", text=text)
    if counts.no_role:
        text = f"{counts.no_role} of {counts.calls} calls have no role and are trained only if `roles` maps `*`"
        text += f"{_such(counts.no_role_example)}; name the role (header, path, `role_rules`)"
        yield Finding(level="note", code="no role", text=text)
    for one in report.conflicts:
        text = f"the sources disagree about the {one.what} of {one.count} calls{_such(one.example)}; "
        text += "`tracegrad show` prints who says what; correct the one that is wrong (header, path, key or rule)"
        yield Finding(level=_level(report, one.count, counts.calls, FEW), code=f"{one.what} conflict", text=text)
    if repeated := report.duplicates.count:
        text = (
            f"{repeated} calls repeat an earlier request of their run within a minute and name no retry"
            f"{_such(report.duplicates.example)}, so both answers are trained; if the client sends again by itself, "
            "let it use the OpenAI SDK, whose retries are known"
        )
        yield Finding(level="note", code="duplicates", text=text)


def _runs(report: Report) -> Iterator[Finding]:
    trainable = [one for one in report.runs if one.purpose != "eval"]
    closed = [one for one in trainable if one.status == "closed"]
    n_closed, unrewarded = sum(one.runs for one in closed), sum(one.unrewarded for one in closed)
    if unrewarded:
        example = max((one.unrewarded_example or "" for one in closed), default="")
        text = f"{unrewarded} of {n_closed} closed runs have no reward{_such(example, 'run')}; "
        text += words_of(reasons.NO_REWARD).do
        yield Finding(level=_level(report, unrewarded, n_closed, MANY), code="no reward", text=text)
    if empty := sum(one.empty for one in closed):
        example = max((one.empty_example or "" for one in closed), default="")
        text = f"{empty} of {n_closed} closed runs have no call{_such(example, 'run')}; make the app call the proxy"
        yield Finding(level=_level(report, empty, n_closed, FEW), code="empty runs", text=text)
    if failed := sum(one.runs for one in trainable if one.status == "failed"):
        total = sum(one.runs for one in trainable)
        text = f"{failed} of {total} runs failed; {words_of(reasons.RUN_FAILED).do}"
        yield Finding(level=_level(report, failed, total, MANY), code="run failed", text=text)


def _groups(report: Report) -> Iterator[Finding]:
    groups = report.groups
    if groups.missing:
        going_on = any(one.status == "open" and one.purpose != "eval" for one in report.runs)
        text = f"{groups.missing} of {groups.groups} groups have fewer runs than planned and are never leased"
        text += f"{_such(groups.missing_example, 'group')}; {words_of(reasons.GROUP_OPEN).do}"
        yield Finding(level="note" if going_on else "problem", code="group short", text=text)
    if short := groups.failed + groups.unrewarded:
        text = (
            f"{short} of {groups.groups} groups are short of members that count: {groups.failed} have failed ones, "
            f"{groups.unrewarded} unrewarded ones"
            f"{_such(groups.failed_example or groups.unrewarded_example, 'group')}; {words_of(reasons.GROUP_SMALL).do}"
        )
        yield Finding(level="note", code="group members", text=text)
    for each in report.jobs:
        flat = each.flat_groups
        if flat is not None and flat.flat:
            text = (
                f"in {flat.flat} of {flat.compared} groups all members have the same reward for job "
                f"{each.job.job_id!r}, which teaches nothing under group advantages{_such(flat.example, 'group')}; use "
                "harder or easier tasks, larger groups, a higher temperature, or a reward with more steps"
            )
            much: Level = "problem" if flat.flat > MOST * flat.compared else "note"
            yield Finding(level=much, code="zero variance", text=text)


def _ended_badly(report: Report) -> Iterator[Finding]:
    counts = report.calls
    for what, count in ((reasons.FAILED_CALL, counts.failed), (reasons.ABORTED, counts.aborted)):
        if count:
            words = words_of(what)
            text = f"{what}: {count} of {counts.calls} calls; {words.do}"
            yield Finding(level=_level(report, count, counts.calls, MANY), code=what, text=text)
    if given_up := report.unfinished.count:
        trainable = sum(one.choices for one in report.choices if not one.evaluated)
        text = (
            f"{reasons.ABORTED}: {given_up} of {trainable} answers were given up by the engine, in calls that came to "
            f"their end{_such(report.unfinished.example)}; read the engine's log; an unfinished answer is never trained"
        )
        yield Finding(level=_level(report, given_up, trainable, MANY), code=reasons.ABORTED, text=text)
    cut, total = report.choices_ending("length"), sum(one.choices for one in report.choices)
    if cut and cut >= MANY * total:
        text = f"{cut} of {total} answers were cut off by their length limit and train as they are; raise `max_tokens`"
        yield Finding(level="note", code="length", text=text)


def _excluded(report: Report) -> Iterator[Finding]:
    """What the trainer excluded, or will, in its own words."""
    told = _TOLD_APART if report.run is not None else _TOLD_APART | _EXPECTED  # of one run: why it waits, too
    if any(one.unrewarded for one in report.runs if one.status == "closed" and one.purpose != "eval"):
        told = told | {reasons.NO_REWARD}
    for each in report.jobs:
        for reason, tokens in sorted(each.tokens.excluded.items(), key=lambda one: (-one[1], one[0])):
            if reason in told or reason.startswith(reasons.QUARANTINED) or not tokens:
                continue
            words = words_of(reason)
            of_job = f"job {each.job.job_id!r} does not train {tokens} of {each.tokens.stored} tokens"
            text = f"{reason} (tokens {words.means}): {of_job}; {words.do}"
            expected = reason in _EXPECTED
            level: Level = "note" if expected else _level(report, tokens, _wanted(each), MANY)
            yield Finding(level=level, code=reason, text=text)
    yield from _flagged(report, known={reason for each in report.jobs for reason in each.tokens.excluded})


def _flagged(report: Report, known: set[str]) -> Iterator[Finding]:
    """What a step would exclude, seen before one has: where it did, its tokens say more."""
    trainable = [one for one in report.choices if not one.evaluated]
    total = sum(one.choices for one in trainable)
    for flag in ("greedy", "constrained", "penalised", "truncated_sampling"):
        name = flag.replace("_", " ")
        count = sum(one.choices for one in trainable if flag in one.flags)
        if count and count >= MANY * total and name not in known:
            text = f"{name}: {count} of {total} answers would not train; {words_of(name).do}"
            yield Finding(level="problem" if count >= MOST * total else "note", code=name, text=text)


def _waiting(report: Report) -> Iterator[Finding]:
    for each in report.jobs:
        waiting = each.waiting
        if waiting is not None and waiting.too_stale:
            words = words_of(reasons.TOO_STALE)
            text = (
                f"{waiting.too_stale} groups wait for job {each.job.job_id!r} and are too stale for it (sampled by "
                f"weights more than {waiting.max_staleness} updates behind the live ones); {words.do}"
            )
            yield Finding(level="problem", code="too stale", text=text)


def _prompts(report: Report) -> Iterator[Finding]:
    """Drift that stayed in the prompts, and forks of unknown cause. Training is exact with it, and costs more."""
    continued = sum(one.calls for one in report.drift)
    drifted = sum(one.calls for one in report.drift if one.drift is not None and not one.token_in)
    if drifted and drifted >= MANY * continued:
        causes = sorted({str(one.drift) for one in report.drift if one.drift is not None and not one.token_in})
        text = (
            f"{drifted} of {continued} prompts that go on from an earlier call do not begin with what was sampled "
            f"({', '.join(causes)}): the trainer computes such histories again; put the project under `token_in`"
        )
        yield Finding(level="note", code="drift", text=text)
    if not report.calls.calls:
        text = "no calls are recorded here: point the app at the proxy (`tracegrad run -- CMD`), or look at more"
        yield Finding(level="note", code="nothing", text=text)


def probe_verdict(publish: Publish) -> str | None:
    """Return what the probe of a publish said, or None where there was none."""
    seen = (publish.probe or {}).get("result")
    return None if not isinstance(seen, dict) else str(seen.get("verdict"))


def _wanted(each: JobReport) -> int:
    """The tokens that might train: all but those that are out as meant."""
    return each.tokens.stored - sum(each.tokens.excluded.get(reason, 0) for reason in _EXPECTED)


def _level(report: Report, count: int, total: int, share: float) -> Level:
    """A problem from a share on; of a single run, where any share is large, always."""
    return "problem" if report.run is not None or count >= share * total else "note"


def _such(example: str | None, kind: str = "call") -> str:
    return "" if not example else f" (such as {kind} {example})"
