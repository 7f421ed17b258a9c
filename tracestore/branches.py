"""What is live, and how far from it a version is: the measure of staleness (law 8).

Along one line of versions that is the difference of their updates: how often the model was trained. The job's steps are
not it: a step may train one model of several, and the next that trains the other is then steps on, but one update. A
version that was abandoned (rolled back, rejected) lies on another branch: weights of 12 updates that left the line at 5
are as far from 5 as those of -2 would be, and so they are counted; by their own number they would pass for fresher than
what is live. So it is with another line, of another job or store: what both began with is taken to be the same, so 12
updates there count as -12. What was trained long ago is measured along the descent of the two versions instead: it is
the same measure, and no later rollback changes it.
Read only. Called by `leases`, `jobs`, `standing` and `diagnosis_jobs`; by the trainer through `Store`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Connection, and_, case, false, func, literal, or_, select

from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.schema import policy_versions, publishes


@dataclass(frozen=True, slots=True)
class Live:
    """`updates`: model -> the updates of its live version, without those of which nothing is live; `lines`: its line.

    `abandoned`: abandoned version -> the updates it counts as; every other of its line counts as its own.
    """

    updates: Mapping[str, int]
    lines: Mapping[str, int] = field(default_factory=dict)
    abandoned: Mapping[int, int] = field(default_factory=dict)

    def counted(self, version: PolicyVersion) -> int:
        """Return the updates that a version counts as."""
        if self.lines.get(version.model, version.line) != version.line:
            return -version.updates
        return self.abandoned.get(version.version_id, version.updates)

    def counted_updates(self) -> ColumnElement[int]:
        """The same of a row of `policy_versions`."""
        own, version_id = policy_versions.c.updates, policy_versions.c.version_id
        elsewhere = [and_(policy_versions.c.model == model, line_of() != line) for model, line in self.lines.items()]
        abandoned = [(version_id == one, literal(updates)) for one, updates in self.abandoned.items()]
        return case((or_(false(), *elsewhere), -own), *abandoned, else_=own)


def line_of() -> ColumnElement[int]:
    """The line of a row of `policy_versions`."""
    return func.coalesce(policy_versions.c.line, policy_versions.c.version_id)


class Branches(Noun):
    """The part of the store that tells how old what a version sampled is."""

    def live(self, models: Sequence[str]) -> Live:
        """Return what is live of these models, and what their abandoned versions count as, of one moment."""
        with self._db.read() as connection:
            return live_of(connection, models)


def live_of(connection: Connection, models: Sequence[str]) -> Live:
    """Return what is live of these models; without those of which nothing is."""
    newest = (
        select(func.max(publishes.c.publish_id))
        .where(publishes.c.model.in_(models), publishes.c.state == "live")
        .group_by(publishes.c.model)
    )
    chosen = (
        select(publishes.c.model, policy_versions.c.updates, line_of())
        .join(policy_versions, policy_versions.c.version_id == publishes.c.version_id)
        .where(publishes.c.publish_id.in_(newest))
    )
    rows = connection.execute(chosen).all()
    updates = {str(model): int(count) for model, count, _ in rows}
    return Live(updates, {str(model): int(line) for model, _, line in rows}, _abandoned_updates(connection, models))


def _abandoned_updates(connection: Connection, models: Sequence[str]) -> dict[int, int]:
    """Return abandoned version -> as many below its newest kept ancestor as it is above; without one, its own."""
    mine, parent = policy_versions, policy_versions.alias("parent")
    rows = connection.execute(
        select(mine.c.version_id, mine.c.updates, mine.c.parent_id, parent.c.updates, parent.c.abandoned)
        .join_from(mine, parent, parent.c.version_id == mine.c.parent_id)
        .where(mine.c.model.in_(models), mine.c.abandoned)
        .order_by(mine.c.version_id)  # parents first
    )
    left: dict[int, int] = {}
    """Abandoned version -> the updates at which its branch left the line."""
    counted: dict[int, int] = {}
    for version_id, updates, parent_id, parent_updates, parent_abandoned in rows:
        if parent_abandoned and parent_id not in left:
            continue  # the branch has no kept ancestor
        left[version_id] = left[parent_id] if parent_abandoned else parent_updates
        counted[version_id] = 2 * left[version_id] - updates
    return counted


@dataclass(frozen=True, slots=True)
class Descent:
    """Which version each was made of. `parents`: version -> parent (None: the first); `updates`: version -> its own."""

    parents: Mapping[int, int | None]
    updates: Mapping[int, int]

    def apart(self, one: int, other: int) -> int:
        """Return the updates back to where their lines part, and on: 0 for a version and itself, never below.

        Of two lines the sum of both: what they began with is taken to be the same.
        """
        left: int | None = one
        right: int | None = other
        while left is not None and right is not None and left != right:  # parents have the smaller id
            if left > right:
                left = self.parents[left]
            else:
                right = self.parents[right]
        if left is None or right is None:
            return self.updates[one] + self.updates[other]
        return self.updates[one] + self.updates[other] - 2 * self.updates[left]


def descent(connection: Connection) -> Descent:
    """Return how all versions of the store descend from one another."""
    chosen = select(policy_versions.c.version_id, policy_versions.c.parent_id, policy_versions.c.updates)
    rows = connection.execute(chosen).all()
    return Descent({row.version_id: row.parent_id for row in rows}, {row.version_id: row.updates for row in rows})
