"""What is live, and how far from it a version is: the measure of staleness (law 8).

Along one line of versions that is the difference of their steps. A version that was abandoned (rolled back, rejected)
lies on another branch: weights of step 12 that left the line at step 5 are as far from step 5 as those of step -2 would
be, and so they are counted; by their own number they would pass for fresher than what is live. What was trained long
ago is measured along the descent of the two versions instead: it is the same measure, and no later rollback changes it.
Read only. Called by `leases`, `jobs`, `standing` and `diagnosis_jobs`; by the trainer through `Store`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Connection, case, func, select

from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.schema import policy_versions, publishes


@dataclass(frozen=True, slots=True)
class Live:
    """`steps`: model -> step of its live version, without those of which nothing is live.

    `abandoned`: abandoned version -> the step it counts as; every other counts as its own.
    """

    steps: Mapping[str, int]
    abandoned: Mapping[int, int] = field(default_factory=dict)

    def counted_step(self) -> ColumnElement[int]:
        """The step that the version of a row of `policy_versions` counts as."""
        step = policy_versions.c.step
        return case(dict(self.abandoned), value=policy_versions.c.version_id, else_=step) if self.abandoned else step


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
        select(publishes.c.model, policy_versions.c.step)
        .join(policy_versions, policy_versions.c.version_id == publishes.c.version_id)
        .where(publishes.c.publish_id.in_(newest))
    )
    steps = {str(model): int(step) for model, step in connection.execute(chosen)}
    return Live(steps, _abandoned_steps(connection, models))


def _abandoned_steps(connection: Connection, models: Sequence[str]) -> dict[int, int]:
    """Return abandoned version -> as many steps below its newest kept ancestor as it is above; without one, its own."""
    mine, parent = policy_versions, policy_versions.alias("parent")
    rows = connection.execute(
        select(mine.c.version_id, mine.c.step, mine.c.parent_id, parent.c.step, parent.c.abandoned)
        .join_from(mine, parent, parent.c.version_id == mine.c.parent_id)
        .where(mine.c.model.in_(models), mine.c.abandoned)
        .order_by(mine.c.version_id)  # parents first
    )
    left: dict[int, int] = {}
    """Abandoned version -> the step at which its branch left the line."""
    counted: dict[int, int] = {}
    for version_id, step, parent_id, parent_step, parent_abandoned in rows:
        if parent_abandoned and parent_id not in left:
            continue  # the branch has no kept ancestor
        left[version_id] = left[parent_id] if parent_abandoned else parent_step
        counted[version_id] = 2 * left[version_id] - step
    return counted


@dataclass(frozen=True, slots=True)
class Descent:
    """Which version each was made of. `parents`: version -> parent (None: the first); `steps`: version -> its step."""

    parents: Mapping[int, int | None]
    steps: Mapping[int, int]

    def apart(self, one: int, other: int) -> int:
        """Return the steps back to where their lines part, and on: 0 for a version and itself, never below.

        Of weights that descend from nothing common only the numbers are known: then the difference of their steps.
        """
        left: int | None = one
        right: int | None = other
        while left is not None and right is not None and left != right:  # parents have the smaller id
            if left > right:
                left = self.parents[left]
            else:
                right = self.parents[right]
        if left is None or right is None:
            return abs(self.steps[one] - self.steps[other])
        return self.steps[one] + self.steps[other] - 2 * self.steps[left]


def descent(connection: Connection) -> Descent:
    """Return how all versions of the store descend from one another."""
    chosen = select(policy_versions.c.version_id, policy_versions.c.parent_id, policy_versions.c.step)
    rows = connection.execute(chosen).all()
    return Descent({row.version_id: row.parent_id for row in rows}, {row.version_id: row.step for row in rows})
