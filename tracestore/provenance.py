"""Where weights come from: which calls made a checkpoint, and which checkpoint answered a call.

A version made by a step has the step's checkpoint; the ledger names the runs of the step, and consumption says which
tokens of which call it trained: where the step trained several models, a call made the version of its own. Everything
before it is in the parents of the version. So both questions are queries; nothing is stored for them. Read only, from
metadata; a page holds as many calls as were asked for. Calls whose content was deleted are still told. Called by
`tracegrad show`, through `Store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CTE, Connection, Select, and_, func, or_, select

from tracegrad.tracestore.errors import Conflict, NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.schema import calls, consumption, ledger, policy_versions, step_versions
from tracegrad.tracestore.versions import existing


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeFrom:
    """What steps trained: their number, the runs they took, answers and tokens, and the tokens they left out."""

    steps: int
    runs: int
    choices: int
    trained_tokens: int
    excluded_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionOrigin:
    """A version with what made it. `epoch` is that of its step, None where no step made it.

    `own` is of that step alone, `all_steps` of the step and those of all its ancestors; `answered_calls` is how many
    calls it was dispatched for.
    """

    version: PolicyVersion
    epoch: int | None
    own: MadeFrom
    all_steps: MadeFrom
    answered_calls: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedCall:
    """A call in the step that made a version: `version_id` is of the weights that sampled it. Tokens are of all its
    answers; `reasons` are those for which some were left out."""

    call_id: str
    run_id: str
    role: str | None
    model: str
    version_id: int | None
    choices: int
    trained_tokens: int
    excluded_tokens: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CallUse:
    """What a step did with a call, and the version that it made of the call's model (None: it made none of it)."""

    job_id: str
    epoch: int
    step: int
    version_id: int | None
    trained_tokens: int
    excluded_tokens: int
    reasons: tuple[str, ...] = ()


class Provenance(Noun):
    """The part of the store that traces weights to calls, and calls to weights."""

    def find_versions(
        self, *, checkpoint: str | None = None, job_id: str | None = None, step: int | None = None
    ) -> dict[str, int]:
        """Return, by model, the versions of a checkpoint (the beginning of its hash is enough), or of a job's step.

        Raises:
            NotFound: there is none.
            Conflict: several hashes begin so.
        """
        if checkpoint is not None:
            what = f"checkpoint that begins with {checkpoint!r}"
            named = policy_versions.c.checkpoint_hash.startswith(checkpoint, autoescape=True)
            columns = (policy_versions.c.version_id, policy_versions.c.model, policy_versions.c.checkpoint_hash)
            chosen = select(*columns).where(named)
        else:
            what = f"step {step} of job {job_id!r}"
            named = and_(step_versions.c.job_id == job_id, step_versions.c.step == step)
            chosen = select(step_versions.c.version_id, step_versions.c.model, step_versions.c.step).where(named)
        with self._db.read() as connection:
            rows = connection.execute(chosen.order_by(chosen.selected_columns.version_id.desc())).all()
        if not rows:
            raise NotFound(f"no {what}: `tracegrad versions` lists what there is")
        if len({row[2] for row in rows}) > 1:
            raise Conflict(f"more than one {what}: give more of its hash")
        return {row.model: int(row.version_id) for row in rows}

    def version_origin(self, version_id: int) -> VersionOrigin:
        """Return what a version was made from. Raises NotFound."""
        with self._db.read() as connection:
            version = existing(connection, version_id)
            epoch = connection.execute(
                select(ledger.c.epoch)
                .join(step_versions, _of_step())
                .where(step_versions.c.version_id == version_id)
                .limit(1)
            ).scalar()
            answered = select(func.count()).where(calls.c.version_dispatched == version_id)
            alone = select(policy_versions.c.version_id).where(policy_versions.c.version_id == version_id)
            return VersionOrigin(
                version=version,
                epoch=epoch,
                own=_made_from(connection, alone),
                all_steps=_made_from(connection, select(_ancestry(version_id).c.version_id)),
                answered_calls=int(connection.execute(answered).scalar_one()),
            )

    def version_calls(self, version_id: int, *, limit: int = 50, after: str | None = None) -> list[TrainedCall]:
        """Return up to `limit` calls of the step that made a version, run by run; `after` is the last of a page.

        Raises:
            NotFound: no such version, or `after` names no call of a run.
        """
        with self._db.read() as connection:
            existing(connection, version_id)
            page = (
                select(calls.c.call_id, calls.c.run_id, calls.c.role, calls.c.model, calls.c.version_dispatched)
                .join(ledger, ledger.c.run_id == calls.c.run_id)
                .join(step_versions, _of_step())
                .where(step_versions.c.version_id == version_id)
            )
            if after is not None:
                last = connection.execute(select(calls.c.run_id, calls.c.seq).where(calls.c.call_id == after)).first()
                if last is None or last.run_id is None:
                    raise NotFound(f"no call {after!r} in a run to list after: start again without `after`")
                later = and_(calls.c.run_id == last.run_id, calls.c.seq > last.seq)
                page = page.where(or_(calls.c.run_id > last.run_id, later))
            page = page.where(_is_consumed())
            rows = connection.execute(page.order_by(calls.c.run_id, calls.c.seq).limit(limit)).all()
            used = dict(_uses(connection, [row.call_id for row in rows], version_id))
        return [
            TrainedCall(
                call_id=row.call_id,
                run_id=row.run_id,
                role=row.role,
                model=row.model,
                version_id=row.version_dispatched,
                choices=used[row.call_id][0],
                trained_tokens=used[row.call_id][1].trained_tokens,
                excluded_tokens=used[row.call_id][1].excluded_tokens,
                reasons=used[row.call_id][1].reasons,
            )
            for row in rows
        ]

    def call_uses(self, call_id: str) -> list[CallUse]:
        """Return the steps that took a call, of every job, by job and epoch: none where nobody did."""
        with self._db.read() as connection:
            return [use for _, (_, use) in _uses(connection, [call_id])]


def _of_step() -> Any:
    return and_(ledger.c.job_id == step_versions.c.job_id, ledger.c.step == step_versions.c.step)


def _is_own() -> Any:
    """Whether the consumption of the row is of the model of the version of the row; `calls` is there."""
    return step_versions.c.model == func.coalesce(consumption.c.model, calls.c.model)


def _is_consumed() -> Any:
    """Whether the step of the row accounted for the call of the row as one of its model: it may have come later."""
    return (
        select(consumption.c.seq)
        .where(
            consumption.c.job_id == ledger.c.job_id,
            consumption.c.epoch == ledger.c.epoch,
            consumption.c.seq == calls.c.seq,
            _is_own(),
        )
        .exists()
    )


def _ancestry(version_id: int) -> CTE:
    """The version and its ancestors."""
    first = select(policy_versions.c.version_id, policy_versions.c.parent_id).where(
        policy_versions.c.version_id == version_id
    )
    line = first.cte("ancestry", recursive=True)
    return line.union(
        select(policy_versions.c.version_id, policy_versions.c.parent_id).where(
            policy_versions.c.version_id == line.c.parent_id
        )
    )


def _made_from(connection: Connection, versions: Select[Any]) -> MadeFrom:
    """Add up what the steps of some versions did."""
    of_these = step_versions.c.version_id.in_(versions)
    steps, runs = connection.execute(
        select(func.count(func.distinct(step_versions.c.version_id)), func.count(ledger.c.run_id))
        .join_from(step_versions, ledger, _of_step())
        .where(of_these)
    ).one()
    trained, excluded, taken = connection.execute(
        select(
            func.coalesce(func.sum(consumption.c.trained_tokens), 0),
            func.coalesce(func.sum(consumption.c.excluded_tokens), 0),
            func.count(consumption.c.seq),
        )
        .join_from(step_versions, ledger, _of_step())
        .join(calls, calls.c.run_id == ledger.c.run_id)
        .join(
            consumption,
            and_(
                consumption.c.job_id == ledger.c.job_id,
                consumption.c.epoch == ledger.c.epoch,
                consumption.c.seq == calls.c.seq,
                _is_own(),
            ),
        )
        .where(of_these)
    ).one()
    return MadeFrom(
        steps=int(steps),
        runs=int(runs),
        choices=int(taken),
        trained_tokens=int(trained),
        excluded_tokens=int(excluded),
    )


def _uses(
    connection: Connection, call_ids: Sequence[str], version_id: int | None = None
) -> list[tuple[str, tuple[int, CallUse]]]:
    """Return (call, (number of its answers, what a step did with it)); of one version's step, or of all."""
    chosen = (
        select(consumption, calls.c.call_id, ledger.c.step, step_versions.c.version_id)
        .join(calls, calls.c.seq == consumption.c.seq)
        .join(
            ledger,
            and_(
                ledger.c.job_id == consumption.c.job_id,
                ledger.c.run_id == consumption.c.run_id,
                ledger.c.epoch == consumption.c.epoch,
            ),
        )
        .outerjoin(step_versions, and_(_of_step(), _is_own()))
        .where(calls.c.call_id.in_(call_ids))
        .order_by(consumption.c.job_id, consumption.c.epoch, calls.c.call_id, consumption.c.choice_index)
    )
    if version_id is not None:
        chosen = chosen.where(step_versions.c.version_id == version_id)
    by_step: dict[tuple[str, str, int], list[Any]] = {}
    for row in connection.execute(chosen):
        by_step.setdefault((row.call_id, row.job_id, row.step), []).append(row)
    return [(call_id, (len(rows), _use(rows))) for (call_id, _, _), rows in by_step.items()]


def _use(rows: Sequence[Any]) -> CallUse:
    first = rows[0]
    return CallUse(
        job_id=first.job_id,
        epoch=first.epoch,
        step=first.step,
        version_id=first.version_id,
        trained_tokens=sum(row.trained_tokens for row in rows),
        excluded_tokens=sum(row.excluded_tokens for row in rows),
        reasons=tuple(sorted({row.reason for row in rows if row.reason is not None})),
    )
