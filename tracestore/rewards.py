"""Rewards: append-only values on a run, a role in it, or a call. The newest per target and name counts, by a query.

A reward that comes after a job trained the run is kept; `late_for` names that job, and the next job uses it. Lateness
is a query too: the ledger remembers up to which reward the step had read. Refuses NaN and infinities (law 6).
Called by the proxy and the rollout driver, through `Store`; `current_rewards` by `traces`.
"""

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, select, true

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.readiness import rewards_that_count
from tracegrad.tracestore.records import LeaseRule, Reward
from tracegrad.tracestore.runs import lock_runs
from tracegrad.tracestore.schema import calls, ledger, rewards, runs


class Rewards(Noun):
    """The part of the store that takes rewards in."""

    def add_rewards(self, rewards: Sequence[Reward]) -> list[Reward]:
        """Append rewards, all or none; return them as stored, with `created_at` and `late_for` filled in.

        Raises:
            InvalidRecord: a value that is not finite, a call of another run, or both a role and a call.
            NotFound: no such run or call.
            Conflict: a reward id exists with other content.
        """
        for reward in rewards:
            _check(reward)
        if not rewards:
            return []
        with self._db.write() as connection:
            lock_runs(connection, [reward.run_id for reward in rewards])
            return [_add(connection, reward, self._db.now()) for reward in rewards]

    def get_reward(self, reward_id: str) -> Reward:
        """Return one reward as it was given, whether or not it is the current one. Raises NotFound."""
        with self._db.read() as connection:
            row = connection.execute(select(rewards).where(rewards.c.reward_id == reward_id)).one_or_none()
            if row is None:
                raise NotFound(f"no reward {reward_id!r}")
            return _reward(row, _read_by_jobs(connection, [row.run_id]).get(row.run_id, ()))

    def call_rewards(self, call_id: str) -> list[Reward]:
        """Return the current rewards on one call itself: none for a call that nobody knows."""
        with self._db.read() as connection:
            run_id = connection.execute(select(calls.c.run_id).where(calls.c.call_id == call_id)).scalar()
            found = [] if run_id is None else current_rewards(connection, [run_id])
        return [reward for reward in found if reward.call_id == call_id]


def current_rewards(
    connection: Connection, run_ids: Sequence[str], through: int | None = None, rule: LeaseRule | None = None
) -> list[Reward]:
    """Return the newest reward of each target and name of these runs, by arrival; `through` is the last to count.

    With a rule only what counts by it is looked at: a newer reward from elsewhere hides none of those.
    """
    within = and_(rewards.c.run_id.in_(run_ids), true() if through is None else rewards.c.seq <= through)
    if rule is not None:
        within = and_(within, rewards_that_count(rule))
    newest = (
        select(func.max(rewards.c.seq))
        .where(within)
        .group_by(rewards.c.run_id, rewards.c.role, rewards.c.call_id, rewards.c.name)
    )
    rows = connection.execute(select(rewards).where(rewards.c.seq.in_(newest)).order_by(rewards.c.seq)).all()
    read = _read_by_jobs(connection, run_ids)
    return [_reward(row, read.get(row.run_id, ())) for row in rows]


def _check(reward: Reward) -> None:
    if not math.isfinite(reward.value):
        raise InvalidRecord(
            f"reward {reward.reward_id!r} ({reward.name}) of run {reward.run_id!r} is {reward.value}: "
            "send a finite number, or none at all"
        )
    if reward.role is not None and reward.call_id is not None:
        raise InvalidRecord(f"reward {reward.reward_id!r} names a role and a call: name one target")


def _add(connection: Connection, reward: Reward, now: float) -> Reward:
    if connection.execute(select(runs.c.run_id).where(runs.c.run_id == reward.run_id)).first() is None:
        raise NotFound(f"reward {reward.reward_id!r} names the unknown run {reward.run_id!r}: open the run first")
    if reward.call_id is not None:
        _check_call(connection, reward, reward.call_id)
    row = {
        "reward_id": reward.reward_id,
        "run_id": reward.run_id,
        "role": reward.role,
        "call_id": reward.call_id,
        "name": reward.name,
        "value": float(reward.value),
        "source": reward.source,
    }
    connection.execute(
        insert(connection, rewards).on_conflict_do_nothing(index_elements=["reward_id"]),
        [{**row, "created_at": reward.created_at or now}],
    )
    stored = connection.execute(select(rewards).where(rewards.c.reward_id == reward.reward_id)).one()
    if any(stored._mapping[name] != value for name, value in row.items()):
        raise Conflict(f"reward {reward.reward_id!r} exists with other content: rewards are append-only, use a new id")
    return _reward(stored, _read_by_jobs(connection, [reward.run_id]).get(reward.run_id, ()))


def _check_call(connection: Connection, reward: Reward, call_id: str) -> None:
    found = connection.execute(select(calls.c.run_id).where(calls.c.call_id == call_id)).one_or_none()
    if found is None:
        raise NotFound(f"reward {reward.reward_id!r} names the unknown call {call_id!r}: check the id")
    if found.run_id != reward.run_id:
        raise InvalidRecord(
            f"reward {reward.reward_id!r} is for run {reward.run_id!r}, its call {call_id!r} is of run {found.run_id!r}"
        )


def _read_by_jobs(connection: Connection, run_ids: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """Return, per run, the jobs that trained it with the last reward each had read."""
    read: dict[str, list[tuple[str, int]]] = {}
    rows = connection.execute(
        select(ledger.c.run_id, ledger.c.job_id, func.min(ledger.c.rewards_through).label("through"))
        .where(ledger.c.run_id.in_(run_ids))
        .group_by(ledger.c.run_id, ledger.c.job_id)
        .order_by(ledger.c.job_id)
    )
    for row in rows:
        read.setdefault(row.run_id, []).append((row.job_id, row.through))
    return read


def _reward(row: Any, read: Sequence[tuple[str, int]]) -> Reward:
    return Reward(
        reward_id=row.reward_id,
        run_id=row.run_id,
        name=row.name,
        value=row.value,
        source=row.source,
        role=row.role,
        call_id=row.call_id,
        created_at=row.created_at,
        late_for=tuple(job_id for job_id, through in read if row.seq > through),
    )
