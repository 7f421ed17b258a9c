"""What a diagnosis of the store finds, as numbers: what was asked about (`Extent`), counts, and an id to look at.

Frozen, and without a judgement: whether a count is bad is for whoever reads it (`tracegrad doctor`). An example is the
id of one call, run or group that is counted, None where nothing is. Made by the `diagnosis*` modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tracegrad.tracestore.records import Json, LeaseRule, Purpose, RunStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """The part of the store that is looked at; what is None does not narrow it.

    `since` (Unix seconds) is about when a call arrived, a run or a group was opened. `models` leaves runs and groups
    without a call to one of them out.
    """

    run_id: str | None = None
    project: str | None = None
    models: tuple[str, ...] | None = None
    since: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it is the whole store."""
        return self == Extent()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """How many there are of something, and one of them."""

    what: str
    count: int
    example: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CallCounts:
    """Calls by how they ended, and by what is unknown of them. Embeddings count in `calls` and `embeddings` only."""

    calls: int = 0
    embeddings: int = 0
    failed: int = 0
    aborted: int = 0
    quarantined: int = 0
    retries: int = 0
    no_run: int = 0
    no_run_example: str | None = None
    no_role: int = 0
    no_role_example: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceCount:
    """Choices with these flags and this end; `evaluated`: of eval runs, never trained whatever their flags."""

    flags: tuple[str, ...]
    finish_reason: str | None
    choices: int
    tokens: int
    evaluated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCount:
    """Runs of one purpose and state. `unrewarded` have no reward at all; `empty` have no call."""

    purpose: Purpose
    status: RunStatus
    runs: int
    unrewarded: int
    empty: int
    unrewarded_example: str | None = None
    empty_example: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCounts:
    """Groups that may train (not `eval`), each counted once, by the first of these that it lacks: members never opened,
    members still open, failed members, closed members without a reward. The rest are whole."""

    groups: int = 0
    missing: int = 0
    missing_example: str | None = None
    running: int = 0
    failed: int = 0
    failed_example: str | None = None
    unrewarded: int = 0
    unrewarded_example: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatGroups:
    """Of the groups (not `eval`) with two or more members to compare, those in which all of them earned the same."""

    compared: int = 0
    flat: int = 0
    example: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFacts:
    """A training job: `config` is its section of the configuration, `rule` what it last leased by (None: never)."""

    job_id: str
    models: tuple[str, ...]
    config: Json
    rule: LeaseRule | None

    @property
    def sampled_by(self) -> tuple[str, ...]:
        """The models whose calls it trains, by name: its own, and those that recorded for it under another role map."""
        return tuple(sorted({*self.models, *(() if self.rule is None else self.rule.recorded_models)}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Where a run was trained."""

    job_id: str
    epoch: int
    step: int
    checkpoint_hash: str
    versions: Mapping[str, int]
    """Model -> the version that the step made of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldLease:
    """A lease that has not ended; `expired_s` is how long its time has been up, 0 or less while it runs."""

    lease_id: int
    job_id: str
    step: int
    runs: int
    expired_s: float
    expires_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingGroups:
    """What a job could lease but for age, by its last rule. `by_lag`: see `branches`; 0 at least."""

    max_staleness: int
    by_lag: Mapping[int, int] = field(default_factory=dict)

    @property
    def too_stale(self) -> int:
        """Groups that are too old to be leased."""
        return sum(groups for lag, groups in self.by_lag.items() if lag > self.max_staleness)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """A committed step: the version that it made of each model, its metrics as the trainer stored them."""

    step: int
    versions: Mapping[str, int]
    created_at: float
    metrics: Json


@dataclass(frozen=True, kw_only=True, slots=True)
class PayloadReport:
    """What reading every payload found: flaws of complete calls that nobody quarantined, by the trainer's reason."""

    calls: int = 0
    choices: int = 0
    flaws: tuple[Tally, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanReport:
    """Calls that went on while weights were exchanged, as far as they ended well; their flaws, by the trainer's reason.

    Such a call has version spans; one that only waited in the engine was sampled by the newer version alone.
    """

    calls: int = 0
    flaws: tuple[Tally, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ConservationReport:
    """Sampled tokens of the whole store as one job and epoch sees them (law 5)."""

    stored: int
    trained: int
    excluded: Mapping[str, int]
    """Reason -> tokens. The reasons exclude each other and leave nothing over."""

    @property
    def conserved(self) -> bool:
        """Whether stored = trained + excluded."""
        return self.stored == self.trained + sum(self.excluded.values())
