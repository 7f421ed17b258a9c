"""Deleting runs with all that hangs on them, and the proof that nothing is left.

A run that no job trained goes entirely. Of one that a ledger names a stub stays: the rows of the run, of its trained
calls and choices, of ledger and consumption, with no content in them. So what was trained stays true (laws 5, 7, 8):
the same job never trains it again, stored = trained + excluded still adds up, and a checkpoint still knows which
calls made it, with which versions. A stub is never trained again by anybody. A member of a group of which others
remain leaves its bare run row, or the others would wait for it for ever. A task that only stubs name keeps its row and
loses its content; it takes content anew from whoever puts it again. Keys stay: they say who may call, not what was
said.

Refuses a run that is open or that a lease holds, unless forced: then the whole lease is released and its trainer is
fenced off (law 9). Called by `retention` and by whoever cares for a store, through `Store`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, exists, func, not_, null, or_, select, update

from tracegrad.tracestore.calls import CHUNK
from tracegrad.tracestore.errors import Conflict, InvalidRecord, NotFound, TraceStoreError
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.payload_schema import blocks, call_payloads, choice_payloads
from tracegrad.tracestore.reasons import DELETED
from tracegrad.tracestore.records import RoleSource
from tracegrad.tracestore.runs import has_content, lock_runs
from tracegrad.tracestore.schema import (
    CONTENT_DELETED,
    api_keys,
    attributions,
    calls,
    choices,
    consumption,
    groups,
    holds,
    langsmith_runs,
    leases,
    ledger,
    refusals,
    rewards,
    runs,
    spans,
    tasks,
)
from tracegrad.tracestore.sweeping import heads_of, sweep, unnamed
from tracegrad.tracestore.tasks import blank_tasks, is_filled

RUNS_AT_ONCE = 100
"""Runs that one transaction deletes."""
Busy = Literal["refuse", "skip", "force"]
"""What to do about runs that are open or held."""
_STUB = frozenset({"runs", "calls", "choices", "ledger", "consumption"})
_SOURCES = get_args(RoleSource)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    """What one transaction deleted: `rows` by table. `left` is what a query found of these runs afterwards, by table.

    `stubs` are the runs of which a stub stayed; `skipped` those that were left alone, with the reason. `keys` are those
    still in use that are bound to one of the runs: a call with such a key opens the run anew.
    """

    deleted: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    keys: tuple[str, ...] = ()


class Removal(Noun):
    """The part of the store that forgets."""

    def delete_runs(self, run_ids: Sequence[str], *, busy: Busy = "refuse") -> Deletion:
        """Delete runs with their calls, spans, rewards and facts, all or none; then look for what is left of them.

        Tasks and groups go with the last run that names them; of a task that stubs still name the content goes. A
        forced deletion of a held run releases its lease.

        Raises:
            NotFound: one of them is not stored.
            Conflict: one is open or held by a lease, and `busy` is "refuse".
            InvalidRecord: more than RUNS_AT_ONCE.
        """
        wanted = sorted(set(run_ids))
        if len(wanted) > RUNS_AT_ONCE:
            raise InvalidRecord(f"{len(wanted)} runs are too many for one transaction: delete {RUNS_AT_ONCE} at once")
        with self._db.write() as connection:
            some, skipped = _choose(connection, wanted, busy)
            if not some:
                return Deletion(skipped=skipped)
            named = _call_names(connection, calls.c.run_id.in_(some))
            heads = heads_of(connection, call_payloads.c.seq.in_(select(calls.c.seq).where(calls.c.run_id.in_(some))))
            task_ids = _lock_tasks(connection, some)
            stubs, rows = _delete(connection, some, self._db.now())
            blank_tasks(connection, and_(tasks.c.task_id.in_(task_ids), _is_unused()))
            keys = select(api_keys.c.key_id).where(api_keys.c.run_id.in_(some), api_keys.c.revoked_at.is_(None))
            bound = tuple(connection.execute(keys.order_by(api_keys.c.key_id)).scalars())
            if swept := sweep(connection, heads):
                rows[blocks.name] = swept
        self._blocks.forget()
        return Deletion(
            deleted=tuple(run_id for run_id in some if run_id not in stubs),
            stubs=tuple(sorted(stubs)),
            skipped=skipped,
            rows=rows,
            left=self._left(some, stubs, named, heads, task_ids),
            keys=bound,
        )

    def delete_unplaced_calls(self, project: str, before: float, limit: int = 1_000) -> int:
        """Delete the oldest calls of a project that have no run and arrived before a time; say how many."""
        oldest = (
            select(calls.c.call_id)
            .where(calls.c.run_id.is_(None), calls.c.project == project, calls.c.received_at < before)
            .order_by(calls.c.seq)
            .limit(limit)
            .with_for_update()  # one that is being placed in a run is waited for, and stays
        )
        heads: set[int] = set()
        with self._db.write() as connection:
            named = list(connection.execute(oldest).scalars())
            for start in range(0, len(named), CHUNK):
                mine = named[start : start + CHUNK]
                about = _call_names(connection, calls.c.call_id.in_(mine))
                asked = call_payloads.c.seq.in_([one.seq for one in about])
                heads |= heads_of(connection, asked)
                for table in (call_payloads, choice_payloads, choices):
                    connection.execute(delete(table).where(table.c.seq.in_([one.seq for one in about])))
                _delete_facts_of(connection, about)
                connection.execute(update(calls).where(calls.c.retry_of.in_(mine)).values(retry_of=null()))
                connection.execute(delete(calls).where(calls.c.call_id.in_(mine)))
            sweep(connection, heads)
        self._blocks.forget()
        return len(named)

    def delete_beside_runs(self, project: str, limit: int = 1_000) -> dict[str, int]:
        """Delete what a project has beside its runs and their calls, some of it; return how many rows, by table.

        Groups and tasks that no run names, late facts, parts of LangSmith trees; a task that stubs name loses its
        content. Call it again until it returns nothing. It returns nothing either while a run of the project has
        content, whose groups may be on their way. Keys stay.
        """
        task_ids = select(tasks.c.task_id).where(tasks.c.project == project)
        planned = select(groups.c.group_id).where(groups.c.task_id.in_(task_ids), not_(_has_runs()))
        wanted = {
            attributions: (attributions.c.seq, attributions.c.project == project),
            langsmith_runs: (langsmith_runs.c.langsmith_id, langsmith_runs.c.project == project),
            groups: (groups.c.group_id, groups.c.group_id.in_(planned)),
            tasks: (tasks.c.task_id, and_(tasks.c.project == project, not_(_is_named()))),
        }
        done: dict[str, int] = {}
        there = select(runs.c.run_id).where(runs.c.project == project).limit(1)
        with self._db.read() as connection:  # where only stubs are left it looks at them all
            if connection.execute(there.where(is_more_than_a_stub())).first():
                return {}
        with self._db.write() as connection:
            if connection.execute(there.where(has_content())).first():
                return {}
            for table, (key, which) in wanted.items():
                some = list(connection.execute(select(key).where(which).limit(limit)).scalars())
                done[table.name] = connection.execute(delete(table).where(which, key.in_(some))).rowcount
            emptied = select(tasks.c.task_id).where(tasks.c.project == project, _is_unused(), is_filled())
            some = list(connection.execute(emptied.limit(limit)).scalars())
            done[tasks.name] += blank_tasks(connection, tasks.c.task_id.in_(some))
        return {table: count for table, count in done.items() if count}

    def _left(
        self,
        run_ids: Sequence[str],
        stubs: set[str],
        named: "Sequence[_Named]",
        heads: set[int],
        task_ids: Sequence[str],
    ) -> dict[str, int]:
        """Count what is left, in a transaction of its own. Raises TraceStoreError where it is more than the stubs."""
        with self._db.read() as connection:
            whole = [run_id for run_id in run_ids if run_id not in stubs]
            wrong = _remains(connection, whole, [one for one in named if one.run_id not in stubs])
            left = _remains(connection, sorted(stubs), [one for one in named if one.run_id in stubs])
            if prompts := unnamed(connection, heads):
                wrong[blocks.name] = prompts
            told = and_(tasks.c.task_id.in_(task_ids), _is_unused(), is_filled())
            if found := connection.execute(select(func.count()).select_from(tasks).where(told)).scalar_one():
                wrong[tasks.name] = int(found)
        wrong |= {table: count for table, count in left.items() if table not in _STUB}
        if wrong:
            raise TraceStoreError(
                f"of the deleted runs {run_ids[0]!r}, … something is left, or was written since: {wrong}; delete again"
            )
        return left


def is_more_than_a_stub() -> ColumnElement[bool]:
    """Whether the run of the row is more than a stub: it was never deleted, or something was said in it since."""
    asked = select(calls.c.seq).join_from(calls, call_payloads).where(calls.c.run_id == runs.c.run_id).exists()
    said = [exists().where(table.c.run_id == runs.c.run_id) for table in (spans, rewards)]
    return or_(has_content(), asked, *said)


@dataclass(frozen=True, slots=True)
class _Named:
    """The names of a call: late facts may be about any of them."""

    seq: int
    call_id: str
    run_id: str | None
    completion_id: str | None
    project: str


def _call_names(connection: Connection, which: ColumnElement[bool]) -> list[_Named]:
    columns = (calls.c.seq, calls.c.call_id, calls.c.run_id, calls.c.completion_id, calls.c.project)
    return [_Named(*row) for row in connection.execute(select(*columns).where(which))]


def _choose(connection: Connection, run_ids: Sequence[str], busy: Busy) -> tuple[list[str], dict[str, str]]:
    """Lock the runs; return those to delete, and those to leave with the reason."""
    lock_runs(connection, run_ids)
    rows = connection.execute(select(runs.c.run_id, runs.c.status).where(runs.c.run_id.in_(run_ids))).all()
    status = {row.run_id: row.status for row in rows}
    missing = [run_id for run_id in run_ids if run_id not in status]
    if missing and busy != "skip":
        raise NotFound(f"no run {missing[0]!r}: `tracegrad runs` lists what there is")
    held = {
        row.run_id: f"is held by lease {row.lease_id} of job {row.job_id!r}"
        for row in connection.execute(
            select(holds.c.run_id, holds.c.lease_id, holds.c.job_id).where(holds.c.run_id.in_(run_ids))
        )
    }
    refused = {run_id: "is open" for run_id, now in status.items() if now == "open"} | held
    if busy == "refuse" and refused:
        run_id, why = next(iter(sorted(refused.items())))
        raise Conflict(f"run {run_id!r} {why}: wait until it is not, or delete it by force (a lease is released then)")
    if busy == "force":
        _release(connection, list(held))
        refused = {}
    return [run_id for run_id in run_ids if run_id in status and run_id not in refused], refused


def _lock_tasks(connection: Connection, run_ids: Sequence[str]) -> list[str]:
    """Return the tasks of the runs, locked in order: of two that delete the last runs of one, the second sees it."""
    named = select(runs.c.task_id).where(runs.c.run_id.in_(run_ids), runs.c.task_id.is_not(None))
    task_ids = sorted(set(connection.execute(named).scalars()))
    rows = select(tasks.c.task_id).where(tasks.c.task_id.in_(task_ids)).order_by(tasks.c.task_id)
    return list(connection.execute(rows.with_for_update(key_share=True)).scalars())


def _release(connection: Connection, run_ids: Sequence[str]) -> None:
    """Release the leases that hold these runs: whoever trains them is fenced off."""
    for start in range(0, len(run_ids), CHUNK):
        held = select(holds.c.lease_id).where(holds.c.run_id.in_(run_ids[start : start + CHUNK]))
        lease_ids = list(connection.execute(held.distinct()).scalars())
        theirs = and_(leases.c.lease_id.in_(lease_ids), leases.c.state == "held")  # one may commit while we wait for it
        connection.execute(update(leases).where(theirs).values(state="released"))
        connection.execute(delete(holds).where(holds.c.lease_id.in_(lease_ids)))


def _delete(connection: Connection, some: Sequence[str], now: float) -> tuple[set[str], dict[str, int]]:
    """Delete what hangs on the runs, children first; return of which runs a stub stays, and the rows by table."""
    trained = set(connection.execute(select(ledger.c.run_id).where(ledger.c.run_id.in_(some)).distinct()).scalars())
    rows: dict[str, int] = {}

    def gone(table: Table, which: ColumnElement[bool]) -> None:
        done = connection.execute(delete(table).where(which)).rowcount
        if done:
            rows[table.name] = rows.get(table.name, 0) + done

    mine = select(calls.c.call_id).where(calls.c.run_id.in_(some))
    numbers = select(calls.c.seq).where(calls.c.run_id.in_(some))
    for table in (call_payloads, choice_payloads):
        gone(table, table.c.seq.in_(numbers))
    for table in (rewards, refusals):
        gone(table, table.c.run_id.in_(some))
    rows["attributions"] = _delete_facts_of(connection, _call_names(connection, calls.c.run_id.in_(some)))
    gone(attributions, attributions.c.run_id.in_(some))
    gone(langsmith_runs, langsmith_runs.c.run_id.in_(some))
    connection.execute(update(calls).where(calls.c.retry_of.in_(mine)).values(retry_of=null()))
    consumed = exists().where(consumption.c.seq == choices.c.seq, consumption.c.choice_index == choices.c.choice_index)
    gone(choices, and_(choices.c.seq.in_(numbers), not_(consumed)))
    answered = exists().where(choices.c.seq == calls.c.seq)
    gone(calls, and_(calls.c.run_id.in_(some), not_(answered)))
    _empty(connection, trained)
    gone(spans, spans.c.run_id.in_(some))
    _forget_plans(connection, set(some) - trained)
    stubs = trained | _awaited(connection, [run_id for run_id in some if run_id not in trained])
    _mark(connection, stubs, now)
    _delete_bare(connection, [run_id for run_id in some if run_id not in stubs], gone)
    return stubs, {table: count for table, count in rows.items() if count}


def _delete_facts_of(connection: Connection, named: Iterable[_Named]) -> int:
    """Delete what was said late of these calls. Asked in the words of the two unique indexes."""
    by_project: dict[str, list[_Named]] = {}
    for one in named:
        by_project.setdefault(one.project, []).append(one)
    done = 0
    for project, all_ in by_project.items():
        for start in range(0, len(all_), CHUNK):
            for which in _facts_of(project, all_[start : start + CHUNK]):
                done += connection.execute(delete(attributions).where(which)).rowcount
    return done


def _facts_of(project: str, some: Sequence[_Named]) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    here = and_(attributions.c.project == project, attributions.c.source.in_(_SOURCES))
    completions = [one.completion_id for one in some if one.completion_id is not None]
    return (
        and_(here, attributions.c.call_id.in_([one.call_id for one in some])),
        and_(here, attributions.c.completion_id.in_(completions)),
    )


def _empty(connection: Connection, trained: set[str]) -> None:
    """Take from the calls that stay what says more than model, role, versions, status and times."""
    emptied = {"completion_id": null(), "span_id": null(), "error": null(), "request_hash": null()}
    connection.execute(
        update(calls)
        .where(calls.c.run_id.in_(trained))
        .values(quarantine=func.coalesce(calls.c.quarantine, DELETED), **emptied)
    )


def _forget_plans(connection: Connection, run_ids: set[str]) -> None:
    """Take the runs out of the plans of released leases: nobody reclaims those."""
    for row in connection.execute(select(leases.c.lease_id, leases.c.run_ids).where(leases.c.state == "released")):
        if not run_ids.isdisjoint(row.run_ids):
            kept = [run_id for run_id in row.run_ids if run_id not in run_ids]
            connection.execute(update(leases).where(leases.c.lease_id == row.lease_id).values(run_ids=kept))


def _awaited(connection: Connection, run_ids: Sequence[str]) -> set[str]:
    """Those of the untrained runs whose group has other members that are not deleted."""
    other = runs.alias("other")
    alive = exists().where(
        other.c.group_id == runs.c.group_id,
        other.c.run_id.not_in(run_ids),
        other.c.error.is_distinct_from(CONTENT_DELETED),
    )
    return set(connection.execute(select(runs.c.run_id).where(runs.c.run_id.in_(run_ids), alive)).scalars())


def _mark(connection: Connection, stubs: set[str], now: float) -> None:
    these = runs.c.run_id.in_(stubs)
    ended = {"status": "failed", "ended_by": "explicit", "ended_at": now}
    connection.execute(update(runs).where(these, runs.c.status == "open").values(**ended))
    connection.execute(update(runs).where(these).values(error=CONTENT_DELETED))


def _delete_bare(connection: Connection, run_ids: Sequence[str], gone: Any) -> None:
    """Delete run rows, then what nobody names any more: bare members of their groups, the groups, the tasks."""
    chosen = select(runs.c.group_id, runs.c.task_id).where(runs.c.run_id.in_(run_ids))
    rows = connection.execute(chosen).all()
    group_ids = sorted({row.group_id for row in rows if row.group_id is not None})
    task_ids = sorted({row.task_id for row in rows if row.task_id is not None})
    gone(runs, runs.c.run_id.in_(run_ids))
    bare = and_(
        runs.c.group_id.in_(group_ids),
        runs.c.error == CONTENT_DELETED,
        *(
            not_(exists().where(table.c.run_id == runs.c.run_id))
            for table in (ledger, calls, rewards, spans, attributions, langsmith_runs)
        ),
    )
    whole = select(runs.c.group_id).where(runs.c.group_id.in_(group_ids), has_content())
    gone(runs, and_(bare, runs.c.group_id.not_in(list(connection.execute(whole).scalars()))))
    gone(groups, and_(groups.c.group_id.in_(group_ids), not_(exists().where(runs.c.group_id == groups.c.group_id))))
    gone(tasks, and_(tasks.c.task_id.in_(task_ids), not_(_is_named())))


def _has_runs() -> ColumnElement[bool]:
    """Whether the group of the row has runs, or stubs."""
    return exists().where(runs.c.group_id == groups.c.group_id)


def _is_named() -> ColumnElement[bool]:
    """Whether a run or a group names the task of the row."""
    of_a_run = exists().where(runs.c.task_id == tasks.c.task_id)
    return or_(of_a_run, exists().where(groups.c.task_id == tasks.c.task_id))


def _is_unused() -> ColumnElement[bool]:
    """Whether nobody needs the content of the task of the row: only stubs name it, and groups that have nothing else.

    A group that has no run yet was planned and not begun: its runs are to come.
    """
    whole = exists().where(runs.c.task_id == tasks.c.task_id, has_content())
    ahead = exists().where(groups.c.task_id == tasks.c.task_id, not_(_has_runs()))
    return and_(not_(whole), not_(ahead))


def _remains(connection: Connection, run_ids: Sequence[str], named: Sequence[_Named]) -> dict[str, int]:
    """Count the rows that still name these runs or calls, by table; tables without one are left out."""
    left: dict[str, int] = {}

    def count(table: Table, which: ColumnElement[bool]) -> None:
        found = connection.execute(select(func.count()).select_from(table).where(which)).scalar_one()
        if found:
            left[table.name] = left.get(table.name, 0) + int(found)

    for table in (runs, spans, calls, rewards, attributions, langsmith_runs, holds, ledger, refusals):
        count(table, table.c.run_id.in_(run_ids))
    for start in range(0, len(named), CHUNK):
        some = named[start : start + CHUNK]
        for table in (call_payloads, choices, choice_payloads, consumption):
            count(table, table.c.seq.in_([one.seq for one in some]))
        for project in {one.project for one in some}:
            for which in _facts_of(project, [one for one in some if one.project == project]):
                count(attributions, which)
    return left
