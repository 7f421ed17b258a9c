"""A doctor's report as lines for people: what was counted, by theme, then the verdict. What is not there has no line.

Pure: the same report gives the same lines, which a golden test holds. Called by `doctor`.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from tracegrad.adapters.doctor_report import JobReport, Report
from tracegrad.adapters.doctor_verdict import Finding, probe_verdict
from tracegrad.tracestore.diagnosis_records import Tally
from tracegrad.tracestore.records import Publish

_FLAGS = ("greedy", "constrained", "penalised", "truncated_sampling", "stop_string", "hidden_tool_calls", "external")
_FIGURES = (
    ("reward", "reward", ".3g"),
    ("ratio_mean", "ratio", ".4g"),
    ("ratio_max", "max ratio", ".3g"),
    ("clip_fraction", "clipped", ".1%"),
    ("kl", "kl", ".2g"),
    ("logprob_abs_diff", "|d|", ".2g"),
    ("entropy", "entropy", ".3g"),
    ("grad_norm", "gradient", ".3g"),
    ("stale_tokens", "stale tokens", "d"),
    ("n_zero_variance", "groups without variance", "d"),
    ("explained_variance", "explained variance", ".2f"),
)
"""Of a step's metrics: key, what it is called, and its format."""


def lines(report: Report) -> Iterator[tuple[str, str]]:
    """Return (theme, text) of everything that was counted."""
    yield from _run(report)
    yield "calls", _calls(report)
    if report.quarantines:
        yield "quarantines", _tallies(report.quarantines)
    if report.drift:
        yield "prompts", _drift(report)
    if report.forks:
        yield "forks", _tallies(report.forks)
    if report.choices:
        yield "answers", _choices(report)
    yield from _spans(report)
    if report.conflicts:
        yield "conflicts", _tallies(report.conflicts)
    if report.duplicates.count:
        yield "repeated", f"{report.duplicates.count} calls like an earlier one, within a minute"
    for one in report.runs:
        lacks = _listed({"without a reward": one.unrewarded, "without a call": one.empty})
        yield "runs", f"{one.runs} {one.purpose}, {one.status}" + (f"; {lacks}" if lacks else "")
    if report.groups.groups:
        yield "groups", _groups(report)
    for each in report.jobs:
        yield from _job(each)
    for model, newest in report.publishes.items():
        if newest:
            yield "publishes", f"of {model}: " + "; ".join(map(_publish, newest))
    if report.payloads is not None:
        found = _tallies(report.payloads.flaws) or "all are as they should be"
        yield "payloads", f"{report.payloads.calls} calls with {report.payloads.choices} answers read: {found}"


def verdict_lines(findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """Return (level, text) of the verdict; of nothing wrong too."""
    for finding in findings:
        yield finding.level, finding.text
    if all(finding.level != "problem" for finding in findings):
        yield "well", "nothing here wants action"


def _run(report: Report) -> Iterator[tuple[str, str]]:
    if report.run is None:
        return
    run = report.run
    group = "" if run.group_id is None else f", member {run.member} of group {run.group_id}"
    error = "" if run.error is None else f": {run.error.splitlines()[0] if run.error else ''}"
    yield "run", f"{run.run_id}, {run.purpose}, {run.status}{error}{group}"
    for training in report.trainings:
        yield (
            "trained",
            f"by job {training.job_id} in step {training.step} (epoch {training.epoch}), which made version "
            f"{' and '.join(map(str, training.versions.values()))}",
        )


def _calls(report: Report) -> str:
    counts = report.calls
    named = {
        "embeddings": counts.embeddings,
        "failed": counts.failed,
        "aborted": counts.aborted,
        "quarantined": counts.quarantined,
        "sent again": counts.retries,
        "without a run": counts.no_run,
        "without a role": counts.no_role,
    }
    return _headed(counts.calls, _listed(named))


def _drift(report: Report) -> str:
    by: dict[str, int] = {}
    for one in report.drift:
        by[one.drift or "as sampled"] = by.get(one.drift or "as sampled", 0) + one.calls
    built = sum(one.calls for one in report.drift if one.token_in)
    total = sum(by.values())
    return f"{total} go on from an earlier call: {_listed(by)}" + (f"; {built} built from sampled ids" if built else "")


def _choices(report: Report) -> str:
    named = {flag.replace("_", " "): report.choices_with(flag) for flag in _FLAGS}
    named["cut off by length"] = report.choices_ending("length")
    named["aborted"] = report.choices_ending(None, "abort", "error")
    total, tokens = (sum(getattr(one, name) for one in report.choices) for name in ("choices", "tokens"))
    return _headed(f"{total} of {tokens} tokens", _listed(named))


def _spans(report: Report) -> Iterator[tuple[str, str]]:
    spans = report.spans
    if spans.calls or spans.flaws:
        found = _tallies(spans.flaws) or "every token's version is known"
        yield "in flight", f"{spans.calls} calls went on while weights were exchanged: {found}"


def _groups(report: Report) -> str:
    groups, flat = report.groups, report.flat_groups
    named = {
        "short of runs": groups.missing,
        "running": groups.running,
        "with failed members": groups.failed,
        "with unrewarded members": groups.unrewarded,
    }
    same = "" if flat is None or not flat.compared else f"; in {flat.flat} of {flat.compared} all rewards are equal"
    return _headed(groups.groups, _listed(named)) + same


def _job(each: JobReport) -> Iterator[tuple[str, str]]:
    job, tokens = each.job, each.tokens
    sign = "=" if tokens.conserved else "≠"
    excluded = sum(tokens.excluded.values())
    yield (
        f"job {job.job_id}",
        f"{_models(job.models)}: {tokens.stored} sampled tokens {sign} {tokens.trained} trained + {excluded} excluded",
    )
    by_size = dict(sorted(tokens.excluded.items(), key=lambda one: (-one[1], one[0])))
    if excluded:
        yield "", f"excluded: {_listed(by_size)}"
    if each.trained_lags:
        yield "", f"trained tokens by age in updates: {_lags(each.trained_lags)}"
    if each.waiting is not None and each.waiting.by_lag:
        bound = each.waiting.max_staleness
        allowed = f"at most {bound}" if bound < 1_000_000 else "any"
        yield "", f"waiting groups by age in updates ({allowed}): {_lags(each.waiting.by_lag)}"
    if (flat := each.flat_groups) is not None and flat.compared:
        yield "", f"groups that it compares: in {flat.flat} of {flat.compared} all members have the same reward"
    for lease in each.leases:
        left = f"expired {lease.expired_s:.0f} s ago" if lease.expired_s > 0 else f"{-lease.expired_s:.0f} s left"
        yield "", f"lease {lease.lease_id} for step {lease.step}: {lease.runs} runs, {left}"
    for step in each.steps:
        when = datetime.fromtimestamp(step.created_at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        yield "", f"step {step.step}, {when}: {_figures(step.metrics)}"


def _models(names: Sequence[str]) -> str:
    return f"model{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _figures(metrics: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {format(value, form)}"
        for key, name, form in _FIGURES
        if isinstance(value := metrics.get(key), int | float) and not isinstance(value, bool)
    ]
    return ", ".join(shown) or "no metrics"


def _publish(publish: Publish) -> str:
    seen = (publish.probe or {}).get("result")
    probed = ""
    if isinstance(seen, dict):
        away, bound = seen.get("mean_abs_new"), seen.get("bound")
        figures = "" if away is None or bound is None else f", {away:.2g} of {bound:g} nats"
        probed = f" (probe {probe_verdict(publish)}{figures})"
    return f"{publish.publish_id} of version {publish.version_id} {publish.state}{probed}"


def _lags(by_lag: Mapping[int, int]) -> str:
    return ", ".join(f"{lag}: {count}" for lag, count in sorted(by_lag.items()))


def _tallies(found: Sequence[Tally]) -> str:
    return _listed({one.what: one.count for one in found})


def _listed(named: Mapping[str, int]) -> str:
    """The counts that are not 0, as "12 greedy, 3 aborted"."""
    return ", ".join(f"{count} {name}" for name, count in named.items() if count)


def _headed(head: int | str, rest: str) -> str:
    return f"{head}: {rest}" if rest else str(head)
