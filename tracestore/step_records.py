"""A finished step of a training job: what is committed of it, and what is read back. Frozen.

Made by the trainer and by `ledger`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tracegrad.tracestore.records import Consumption, Json


@dataclass(frozen=True, kw_only=True, slots=True)
class NewVersion:
    """What a step made of one model: `path` is what its engines load, `parent_id` the version it was trained from."""

    model: str
    path: str
    parent_id: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCommit:
    """Everything a finished step writes in one transaction: checkpoint, versions, ledger rows, consumption.

    The checkpoint holds every model of the job; `versions` are of those that the step trained. They have the hash of
    the whole checkpoint: it is loaded and verified whole. `unchanged` are the versions that other models stay at.
    """

    checkpoint_path: str
    checkpoint_hash: str
    versions: Sequence[NewVersion]
    consumption: Sequence[Consumption]
    metrics: Json
    unchanged: Sequence[int] = ()

    def built_on(self) -> list[int]:
        """Return the versions whose weights the step began with."""
        return [*(new.parent_id for new in self.versions if new.parent_id is not None), *self.unchanged]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRow:
    """A committed step: the folder named here happened; one that is not named never did (law 7)."""

    job_id: str
    step: int
    path: str
    hash: str
    versions: Mapping[str, int]
    """Model -> the version that the step made of it."""
    metrics: Json
    created_at: float
