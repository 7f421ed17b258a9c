"""Which trainers are at work and what each does: rows with a heartbeat, one a job; a dead one expires.

Says what a trainer says of itself; what it has done stands in the ledger. Called by the trainer's heartbeat, and by
`tracegrad status` and `tracegrad up`, through `Store`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import delete, select

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.gate_schema import trainers
from tracegrad.tracestore.noun import Noun

TrainerPhase = Literal["starting", "loading", "waiting", "training", "publishing"]
PHASES: tuple[TrainerPhase, ...] = get_args(TrainerPhase)
NOT_YET: tuple[TrainerPhase, ...] = ("starting", "loading")
"""Before the first lease can be taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerAtWork:
    """What a trainer with a fresh heartbeat does, for how long, and since when it runs. `step`: the one at hand."""

    job_id: str
    phase: TrainerPhase
    step: int | None
    phase_age_s: float
    started_at: float


class Trainers(Noun):
    """The part of the store that knows who trains at this moment."""

    def beat_trainer(self, job_id: str, phase: TrainerPhase, step: int | None, *, since: float, started: float) -> None:
        """Say what the job's trainer does `since` then, and that it is alive; times in Unix seconds."""
        said = {
            "phase": phase,
            "step": step,
            "phase_at": since,
            "started_at": started,
            "beat_at": self._db.now(),
        }
        with self._db.write() as connection:
            statement = insert(connection, trainers).values(job_id=job_id, **said)
            connection.execute(statement.on_conflict_do_update(index_elements=["job_id"], set_=said))

    def remove_trainer(self, job_id: str) -> None:
        """Forget the trainer that stops; an unknown one is a no-op."""
        with self._db.write() as connection:
            connection.execute(delete(trainers).where(trainers.c.job_id == job_id))

    def trainer_at_work(self, job_id: str, expires_s: float) -> TrainerAtWork | None:
        """Return what the job's trainer does, by a heartbeat younger than `expires_s`; None where none is at work."""
        with self._db.read() as connection:
            now = self._db.now()
            chosen = select(trainers).where(trainers.c.job_id == job_id, trainers.c.beat_at >= now - expires_s)
            row = connection.execute(chosen).one_or_none()
        if row is None:
            return None
        return TrainerAtWork(
            job_id=row.job_id,
            phase=row.phase,
            step=row.step,
            phase_age_s=max(now - row.phase_at, 0.0),
            started_at=row.started_at,
        )
