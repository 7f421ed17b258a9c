"""Tasks and groups: what is to be run, and how often.

Both are written once: the same content again is a no-op, other content under the same id is refused, because runs,
rewards and advantages already refer to it. A task of which only stubs are left has a row and no content (see
`removal`): whoever puts it again gives it content anew. Called by the rollout driver and the proxy, through `Store`.
"""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, Text, literal_column, not_, select, type_coerce, update

from tracegrad.tracestore.codec import decode_json, encode_json
from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import Group, Task
from tracegrad.tracestore.schema import groups, tasks

NOTHING = "null"
"""The JSON that stands for deleted content."""
_NOTHING: ColumnElement[str] = literal_column(f"'{NOTHING}'")


class Tasks(Noun):
    """The part of the store that knows tasks and groups."""

    def put_tasks(self, tasks: Sequence[Task]) -> None:
        """Write tasks, all or none.

        One whose content was deleted takes what it is given, whatever it was.

        Raises:
            Conflict: an id exists with another input, reference or project.
        """
        if not tasks:
            return
        with self._db.write() as connection:
            now = self._db.now()
            for task in sorted(tasks, key=lambda task: task.task_id):  # in one order: no ring of two writers
                _put_task(connection, task, now)

    def put_groups(self, groups: Sequence[Group]) -> None:
        """Write groups, all or none; their tasks exist already.

        Raises:
            Conflict: an id exists with another task, size or purpose.
            InvalidRecord: the task is unknown, or the planned size is below 1.
        """
        if not groups:
            return
        with self._db.write() as connection:
            now = self._db.now()
            for group in sorted(groups, key=lambda group: group.group_id):
                _put_group(connection, group, now)

    def get_task(self, task_id: str) -> Task:
        """Return one task. Raises NotFound, also where its content was deleted."""
        with self._db.read() as connection:
            row = connection.execute(select(tasks, is_filled()).where(tasks.c.task_id == task_id)).one_or_none()
        if row is None:
            raise NotFound(f"no task {task_id!r}: put it with put_tasks (POST /tracegrad/v1/tasks)")
        if not row.is_filled:
            raise NotFound(f"the content of task {task_id!r} was deleted with its runs: put it again with put_tasks")
        return Task(task_id=row.task_id, input=row.input, reference=row.reference, project=row.project)

    def project_of_task(self, task_id: str) -> str:
        """Return the project of a task, with content or without. Raises NotFound."""
        with self._db.read() as connection:
            project = connection.execute(select(tasks.c.project).where(tasks.c.task_id == task_id)).scalar()
        if project is None:
            raise NotFound(f"no task {task_id!r}: put it with put_tasks (POST /tracegrad/v1/tasks)")
        return str(project)

    def get_group(self, group_id: str) -> Group:
        """Return one group. Raises NotFound."""
        with self._db.read() as connection:
            group = find_group(connection, group_id)
        if group is None:
            raise NotFound(f"no group {group_id!r}: put it with put_groups (POST /tracegrad/v1/groups)")
        return group


def is_task(connection: Connection, task_id: str) -> bool:
    """Whether there is such a task, with content or without."""
    return connection.execute(select(tasks.c.task_id).where(tasks.c.task_id == task_id)).first() is not None


def is_filled() -> ColumnElement[bool]:
    """Whether the task of the row has its content. (Nobody can put a task whose input is JSON's null.)"""
    return (type_coerce(tasks.c.input, Text) != _NOTHING).label("is_filled")


def blank_tasks(connection: Connection, which: ColumnElement[bool]) -> int:
    """Take their content from the tasks that `which` selects; say how many had some."""
    statement = update(tasks).where(which, is_filled()).values(input=_NOTHING, reference=_NOTHING)
    return connection.execute(statement).rowcount


def find_group(connection: Connection, group_id: str) -> Group | None:
    """Return the stored group, or None."""
    row = connection.execute(select(groups).where(groups.c.group_id == group_id)).one_or_none()
    if row is None:
        return None
    return Group(group_id=row.group_id, task_id=row.task_id, planned_size=row.planned_size, purpose=row.purpose)


def _put_task(connection: Connection, task: Task, now: float) -> None:
    statement = insert(connection, tasks).values(
        task_id=task.task_id, project=task.project, input=task.input, reference=task.reference, created_at=now
    )
    if connection.execute(statement.on_conflict_do_nothing(index_elements=["task_id"])).rowcount == 1:
        return
    blank = (tasks.c.task_id == task.task_id, tasks.c.project == task.project, not_(is_filled()))
    anew = update(tasks).where(*blank).values(input=task.input, reference=task.reference, created_at=now)
    if connection.execute(anew).rowcount == 1:
        return
    columns = select(tasks.c.project, tasks.c.input, tasks.c.reference)
    stored = connection.execute(columns.where(tasks.c.task_id == task.task_id)).one_or_none()
    if stored is None or tuple(stored) != (task.project, _as_stored(task.input), _as_stored(task.reference)):
        raise Conflict(f"task {task.task_id!r} exists with other content: give the changed task an id of its own")


def _as_stored(value: object) -> object:
    return decode_json(encode_json(value))


def _put_group(connection: Connection, group: Group, now: float) -> None:
    if group.planned_size < 1:
        raise InvalidRecord(f"group {group.group_id!r} plans {group.planned_size} runs: plan at least 1")
    stored = find_group(connection, group.group_id)
    if stored is None:
        if not is_task(connection, group.task_id):
            raise InvalidRecord(
                f"group {group.group_id!r} names the unknown task {group.task_id!r}: put the task first"
            )
        statement = insert(connection, groups).values(
            group_id=group.group_id,
            task_id=group.task_id,
            planned_size=group.planned_size,
            purpose=group.purpose,
            created_at=now,
        )
        if connection.execute(statement.on_conflict_do_nothing(index_elements=["group_id"])).rowcount == 1:
            return
        stored = find_group(connection, group.group_id)
    if stored != group:
        raise Conflict(f"group {group.group_id!r} exists as {stored}: give the changed group an id of its own")
