"""Evaluations of policy versions, append-only, and the evaluators that make them.

An evaluation is of one version, or of one of each of several models that are judged as one: it is refused where a call
of its runs was sampled by another version of one of them (law 8). Evaluators are rows with a heartbeat that say which
tasks they evaluate on; a dead one expires. Called by `tracegrad gate`, the publisher and `tracegrad versions`, through
`Store`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, func, or_, select

from tracegrad.tracestore.bootstrap import bootstrap_mean
from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import InvalidRecord
from tracegrad.tracestore.gate_schema import evaluations, evaluators
from tracegrad.tracestore.gating import StoredEvaluation
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.schema import calls, runs
from tracegrad.tracestore.versions import existing

_AT_ONCE = 500
_FORGOTTEN_AFTER_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What an evaluator found: `values` task id -> mean score, of so many runs; `error` where it could not be made.

    `versions`: model -> version of all that it is of, where that is more than `version_id`.
    """

    version_id: int
    publish_id: int | None
    name: str
    tasks_hash: str
    score: str
    started_at: float
    run_ids: Sequence[str] = ()
    n_failed: int = 0
    values: dict[str, float] | None = None
    error: str | None = None
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """An evaluator with a fresh heartbeat, and what it evaluates on. `model`: see `gating.evaluator_of`."""

    evaluator_id: str
    model: str
    tasks_hash: str
    score: str


class Evaluations(Noun):
    """The part of the store that knows how good versions were found to be."""

    def add_evaluation(self, measured: Measured) -> StoredEvaluation:
        """Store an evaluation under its new name and return it with its id.

        Raises:
            NotFound: no such version.
            InvalidRecord: a complete call of its runs was sampled by another version, or by none that is known.
            Conflict: the name is taken.
        """
        values = measured.values or {}
        mean = bootstrap_mean(list(values.values())) if values and measured.error is None else None
        with self._db.write() as connection:
            version = existing(connection, measured.version_id)
            versions = {version.model: version.version_id, **measured.versions}
            for model, version_id in versions.items():
                if existing(connection, version_id).model != model:
                    raise InvalidRecord(f"evaluation {measured.name!r}: version {version_id} is not of {model!r}")
                _refuse_strange(connection, measured, model, version_id)
            statement = (
                insert(connection, evaluations)
                .values(
                    model=version.model,
                    version_id=version.version_id,
                    publish_id=measured.publish_id,
                    name=measured.name,
                    tasks_hash=measured.tasks_hash,
                    score=measured.score,
                    n_runs=len(measured.run_ids),
                    n_failed=measured.n_failed,
                    values=values,
                    mean=None if mean is None else mean.mean,
                    low=None if mean is None else mean.low,
                    high=None if mean is None else mean.high,
                    error=measured.error,
                    started_at=measured.started_at,
                    created_at=self._db.now(),
                    versions=dict(sorted(versions.items())) if len(versions) > 1 else None,
                )
                .returning(evaluations)
            )
            return _evaluation(connection.execute(statement).one())

    def list_evaluations(
        self, model: str | None = None, *, version_id: int | None = None, publish_id: int | None = None
    ) -> list[StoredEvaluation]:
        """Return the evaluations of a model, a version, a publish, or all: oldest first."""
        chosen = select(evaluations).order_by(evaluations.c.evaluation_id)
        wanted = {"model": model, "version_id": version_id, "publish_id": publish_id}
        for column, value in wanted.items():
            if value is not None:
                chosen = chosen.where(evaluations.c[column] == value)
        with self._db.read() as connection:
            return [_evaluation(row) for row in connection.execute(chosen)]

    def evaluations_of(self, versions: Mapping[str, int]) -> list[StoredEvaluation]:
        """Return the evaluations of exactly these versions as one (model -> version), oldest first."""
        chosen = select(evaluations).where(evaluations.c.version_id.in_(versions.values()))
        with self._db.read() as connection:
            found = map(_evaluation, connection.execute(chosen.order_by(evaluations.c.evaluation_id)))
            return [each for each in found if each.versions == versions]

    def find_baseline(self, versions: Mapping[str, int], tasks_hash: str, score: str) -> StoredEvaluation | None:
        """Return the newest evaluation of these versions on these tasks that found something, or None."""
        found = [
            each
            for each in self.evaluations_of(versions)
            if (each.tasks_hash, each.score) == (tasks_hash, score) and each.mean is not None
        ]
        return found[-1] if found else None

    def beat_evaluator(self, evaluator: Evaluator) -> None:
        """Announce an evaluator, or say that it is still there; forgets those that were silent for a day."""
        now = self._db.now()
        with self._db.write() as connection:
            connection.execute(delete(evaluators).where(evaluators.c.beat_at < now - _FORGOTTEN_AFTER_S))
            said = {"model": evaluator.model, "tasks_hash": evaluator.tasks_hash, "score": evaluator.score}
            statement = insert(connection, evaluators).values(
                evaluator_id=evaluator.evaluator_id, registered_at=now, beat_at=now, **said
            )
            connection.execute(
                statement.on_conflict_do_update(index_elements=["evaluator_id"], set_={**said, "beat_at": now})
            )

    def remove_evaluator(self, evaluator_id: str) -> None:
        """Forget an evaluator that stops; unknown ones are a no-op."""
        with self._db.write() as connection:
            connection.execute(delete(evaluators).where(evaluators.c.evaluator_id == evaluator_id))

    def living_evaluators(self, model: str, expires_s: float) -> list[Evaluator]:
        """Return the evaluators of a model with a heartbeat younger than `expires_s`, the newest first."""
        alive = evaluators.c.beat_at >= self._db.now() - expires_s
        chosen = (
            select(evaluators).where(evaluators.c.model == model, alive).order_by(evaluators.c.registered_at.desc())
        )
        with self._db.read() as connection:
            return [
                Evaluator(evaluator_id=r.evaluator_id, model=r.model, tasks_hash=r.tasks_hash, score=r.score)
                for r in connection.execute(chosen)
            ]

    def open_gate_runs(self) -> list[str]:
        """Return the open runs of gates' evaluations: what an evaluator that was killed left behind."""
        chosen = select(runs.c.run_id).where(
            runs.c.status == "open", runs.c.purpose == "eval", runs.c.run_id.like("gate%")
        )
        with self._db.read() as connection:
            return list(connection.execute(chosen).scalars())


def _refuse_strange(connection: Connection, measured: Measured, model: str, version_id: int) -> None:
    """Raise InvalidRecord where a complete call to `model` was answered by another version, or by none known."""
    for start in range(0, len(measured.run_ids), _AT_ONCE):
        part = measured.run_ids[start : start + _AT_ONCE]
        began_by = calls.c.version_dispatched.is_distinct_from(version_id)
        other = or_(began_by, calls.c.version_completed != version_id)
        strange = select(func.count()).where(
            calls.c.run_id.in_(part), calls.c.model == model, calls.c.status == "complete", other
        )
        if count := connection.execute(strange).scalar_one():
            raise InvalidRecord(
                f"evaluation {measured.name!r} is of version {version_id}, and {count} calls of its "
                "runs were answered by another one: it has to be made again"
            )


def _evaluation(row: Any) -> StoredEvaluation:
    found = {name: getattr(row, name) for name in StoredEvaluation.__slots__}
    return StoredEvaluation(**{**found, "versions": row.versions or {row.model: row.version_id}})
