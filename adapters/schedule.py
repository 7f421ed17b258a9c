"""Which task is sampled when, and under which ids. Pure: no I/O, no state.

A rollout has a name; (name, task, pass) names a group and (name, task, pass, member) a run. The same name after a
crash therefore asks for the same ids, which is all that resuming needs. Each pass over the tasks is shuffled by
its own seeded generator. Called by the rollout and evaluation drivers.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tracegrad.tracestore.records import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedGroup:
    """One group to sample: the `index`-th of the rollout, in pass `pass_index` over the tasks."""

    index: int
    pass_index: int
    task: Task
    group_id: str


def planned_groups(name: str, tasks: Sequence[Task], *, seed: int, groups: int) -> Iterator[PlannedGroup]:
    """Yield `groups` groups: every task once a pass, passes in seeded orders of their own, cycling.

    The order depends on (seed, pass) and the tasks only; ids depend on neither seed nor order.
    """
    for index in range(groups):
        pass_index, place = divmod(index, len(tasks))
        if place == 0:
            order = shuffled(len(tasks), seed, pass_index)
        task = tasks[order[place]]
        group_id = stable_id("group", name, task.task_id, pass_index)
        yield PlannedGroup(index=index, pass_index=pass_index, task=task, group_id=group_id)


def shuffled(n: int, seed: int, pass_index: int) -> list[int]:
    """Return the order of `n` tasks in one pass, the same for the same (n, seed, pass)."""
    order = list(range(n))
    random.Random(f"{seed}/{pass_index}").shuffle(order)
    return order


def run_id(name: str, task_id: str, pass_index: int, member: int) -> str:
    """Return the id of a group's member: the same in every start of the rollout called `name`."""
    return stable_id("run", name, task_id, pass_index, member)


def stable_id(prefix: str, *parts: str | int) -> str:
    """Return ``prefix_`` + 32 hex digits that depend on all parts and on their boundaries."""
    text = json.dumps([prefix, *parts], ensure_ascii=False)
    return f"{prefix}_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
