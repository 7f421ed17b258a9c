"""What the queue of a training job looks like: counts by reason, dead letters run by run, one run in detail.

Frozen. Stages and reasons are words of `reasons`. Made by `queue`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tracegrad.tracestore.diagnosis_records import HeldLease
from tracegrad.tracestore.reasons import Stage
from tracegrad.tracestore.records import LeaseRule, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasonCount:
    """What stands for one reason: in how many runs, how many answers of how many tokens; and one of the runs."""

    reason: str
    stage: Stage
    runs: int
    choices: int
    tokens: int
    example: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """Where everything in the store stands for a job. `groups`: reason -> groups, of those that concern the job."""

    job_id: str
    models: tuple[str, ...]
    epoch: int
    rule: LeaseRule | None
    stored: int
    reasons: Sequence[ReasonCount]
    groups: Mapping[str, int] = field(default_factory=dict)
    leases: Sequence[HeldLease] = ()

    def tokens(self, stage: Stage) -> int:
        """Return how many tokens stand at a stage."""
        return sum(one.tokens for one in self.reasons if one.stage == stage)

    @property
    def conserved(self) -> bool:
        """Whether the tokens of all reasons are those that are stored."""
        return self.stored == sum(one.tokens for one in self.reasons)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadRun:
    """A run with dead letters: reason -> tokens, and how many tokens of it were trained. `refused` is what the trainer
    found in its batch, where it refused that."""

    run: Run
    reasons: Mapping[str, int]
    trained: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceStanding:
    """One sampled answer: its tokens (of it, where a step trained a part) and where they stand."""

    call_id: str
    choice_index: int
    role: str | None
    model: str
    tokens: int
    reason: str
    stage: Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStanding:
    """The members of a run's group: planned, settled (nothing of them is awaited), trainable, and eligible now."""

    planned: int
    settled: int
    trainable: int
    eligible: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStanding:
    """One run before a job. `wants` are the rewards that it lacks ("any" where no name is asked for), `grace_until` the
    end of its grace time where that is to come, `lease` the one that holds it."""

    run: Run
    choices: Sequence[ChoiceStanding]
    wants: Sequence[str] = ()
    grace_until: float | None = None
    group: GroupStanding | None = None
    lease: HeldLease | None = None
    refused: Mapping[str, int] = field(default_factory=dict)
