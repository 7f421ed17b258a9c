"""What the doctor looked at: all counts of a part of the store, gathered one after another. No judgement.

Made by `doctor` out of the store's diagnoses; judged by `doctor_verdict`, drawn by `doctor_text`. Payloads are read
only where `deep` asks for it. Each count is a snapshot of its own: in a store in use they may differ by what just came.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tracegrad.tracestore.algorithm import UNGROUPED
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
from tracegrad.tracestore.records import LeaseRule, ModelCalls, Publish, Run
from tracegrad.tracestore.rules import ANY_STALENESS
from tracegrad.tracestore.store import Store

Progress = Callable[[int, int, str], None]
"""Hears (how much is done, of how much, what is looked at); 0 of 0 where nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReport:
    """One training job: what became of its tokens, how old they were, what waits, what it measured.

    `flat_groups`: by its own rewards and weights; None where it compares no runs.
    """

    job: JobFacts
    tokens: ConservationReport
    trained_lags: Mapping[int, int] = field(default_factory=dict)
    waiting: WaitingGroups | None = None
    flat_groups: FlatGroups | None = None
    leases: Sequence[HeldLease] = ()
    steps: Sequence[StepFacts] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that was counted. `run` and `trainings` are of the run that was asked about, if one was.

    `flat_groups`: by every reward, while no job says which of them count; None where there are jobs.
    """

    extent: Extent
    run: Run | None = None
    trainings: Sequence[Training] = ()
    calls: CallCounts
    quarantines: Sequence[Tally] = ()
    drift: Sequence[DriftCount] = ()
    forks: Sequence[Tally] = ()
    choices: Sequence[ChoiceCount] = ()
    unfinished: Tally
    conflicts: Sequence[Tally] = ()
    duplicates: Tally
    runs: Sequence[RunCount] = ()
    groups: GroupCounts
    flat_groups: FlatGroups | None
    jobs: Sequence[JobReport] = ()
    publishes: Mapping[str, Sequence[Publish]] = field(default_factory=dict)
    spans: SpanReport = field(default_factory=SpanReport)
    payloads: PayloadReport | None = None

    def choices_with(self, flag: str) -> int:
        """How many choices have a flag."""
        return sum(one.choices for one in self.choices if flag in one.flags)

    def choices_ending(self, *reasons: str | None) -> int:
        """How many choices ended for one of these reasons; None: without one."""
        return sum(one.choices for one in self.choices if one.finish_reason in reasons)


def gather(
    store: Store, extent: Extent, jobs: Sequence[JobFacts], *, deep: bool = False, progress: Progress | None = None
) -> Report:
    """Count everything. Raises NotFound for an unknown run."""
    say = progress or (lambda _done, _total, _what: None)

    def asked(what: str) -> Extent:
        say(0, 0, what)
        return extent

    run = None if extent.run_id is None else store.get_run(extent.run_id)
    return Report(
        extent=extent,
        run=run,
        trainings=() if run is None else store.trained_by(run.run_id),
        calls=store.count_calls(asked("calls")),
        quarantines=store.count_quarantines(asked("quarantines")),
        drift=store.count_drift(asked("drift")),
        forks=store.count_forks(asked("forks")),
        choices=store.count_choices(asked("choices")),
        unfinished=store.count_unfinished(asked("unfinished answers")),
        spans=store.check_version_spans(asked("versions of tokens")),
        conflicts=store.count_conflicts(asked("conflicts")),
        duplicates=store.count_duplicates(asked("duplicates")),
        runs=store.count_runs(asked("runs")),
        groups=store.count_groups(asked("groups")),
        flat_groups=None if jobs else store.count_flat_groups(asked("rewards of groups")),
        jobs=[_job(store, job, asked(f"job {job.job_id}")) for job in jobs],
        publishes={name: store.last_publishes(name) for name in sorted({name for job in jobs for name in job.models})},
        payloads=store.check_payloads(extent, lambda done, total: say(done, total, "payloads")) if deep else None,
    )


def values_of(report: Report) -> dict[str, Any]:
    """Return the counts as JSON values; every reason for which tokens are excluded stands under `jobs`."""
    told = asdict(report)
    for job in told["jobs"]:
        job["tokens"]["conserved"] = job["tokens"]["stored"] == job["tokens"]["trained"] + sum(
            job["tokens"]["excluded"].values()
        )
        del job["job"]["config"]
    return told


def _job(store: Store, job: JobFacts, extent: Extent) -> JobReport:
    return JobReport(
        job=job,
        tokens=store.consumption(job.job_id, extent=extent),
        trained_lags=store.trained_staleness(job.job_id, extent),
        waiting=store.waiting_groups(job.job_id, extent),
        flat_groups=_flat_groups(store, job, extent),
        leases=store.held_leases(job.job_id),
        steps=store.last_steps(job.job_id),
    )


def _flat_groups(store: Store, job: JobFacts, extent: Extent) -> FlatGroups | None:
    """Compare members as the credit of the job does. Before its first lease all calls to its models count for it."""
    algorithm = job.config.get("algorithm") or {}
    credit = algorithm.get("credit") or algorithm  # jobs registered by earlier versions have no section of that name
    if credit.get("advantage", "gae") in UNGROUPED:
        return None
    weights, scope = credit.get("reward_weights") or {}, credit.get("scope", "call")
    rule = job.rule or LeaseRule(
        trained=tuple(ModelCalls(model=model) for model in job.models),
        max_staleness=ANY_STALENESS,
        min_group=1,
        reward_names=tuple(sorted(weights)),
    )
    return store.count_flat_groups(extent, rule, weights=weights, scope=scope)
