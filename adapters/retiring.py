"""Deleting many runs, page by page, and giving their space back.

Each page is a transaction of its own, so that a proxy hardly waits and whoever starts again goes on where it stopped.
Memory does not grow with the store. Refuses nothing: what is open or held was not chosen. Called by `store_command`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tracegrad.tracestore.removal import RUNS_AT_ONCE, Deletion
from tracegrad.tracestore.retention import Place, Retired
from tracegrad.tracestore.store import Store

ALIVE_S = 30.0
"""A proxy with a younger heartbeat is at work."""
Told = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retirement:
    """What was deleted, or would be: runs (stubs among them), calls, bytes of content; and who was left alone.

    `beside` are the rows, by table, that a whole project had beside its runs and calls. `keys` are those in use that
    are bound to one of the runs: they stay.
    """

    runs: int = 0
    calls: int = 0
    weight_bytes: int = 0
    stubs: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    keys: tuple[str, ...] = ()


def retire(store: Store, which: Retired, *, told: Told, force: bool = False, dry_run: bool = False) -> Retirement:
    """Delete the runs that `which` names, oldest first, and the calls without a run of that age.

    Where that is a whole project, what it has beside them goes too, unless runs of it were left alone.
    """
    done = Retirement()
    after: Place | None = None
    while page := store.retired_runs(which, after=after):
        after = page[-1].place
        done = replace(
            done,
            runs=done.runs + len(page),
            calls=done.calls + sum(run.calls for run in page),
            weight_bytes=done.weight_bytes + sum(run.weight_bytes for run in page),
        )
        if not dry_run:
            gone = store.delete_runs([run.place.run_id for run in page], busy="force" if force else "skip")
            done = replace(_with(done, gone), runs=done.runs - len(gone.skipped))
        told(done.runs, 0, "runs")
    through = which.through.opened_at if which.through is not None else None
    everything = which.ended_before is None and which.through is None
    times = [time for time in (which.ended_before, through) if time is not None]
    before = store.now() if everything else max(times)
    last = 0
    while (some := store.weigh_unplaced(which.project, before, after_seq=last)).calls:
        last = some.last_seq
        going = some.calls if dry_run else 0
        done = replace(done, calls=done.calls + going, weight_bytes=done.weight_bytes + some.weight_bytes)
        told(done.runs, 0, "runs; calls without a run")
    if dry_run:
        return done
    while unplaced := store.delete_unplaced_calls(which.project, before):
        done = replace(done, calls=done.calls + unplaced)
        told(done.runs, 0, "runs; calls without a run")
    while everything and (rows := store.delete_beside_runs(which.project)):
        beside = {table: done.beside.get(table, 0) + rows.get(table, 0) for table in {**done.beside, **rows}}
        done = replace(done, beside=beside)
        told(done.runs, 0, "runs; tasks, groups, late facts")
    return done


def retire_named(
    store: Store, run_ids: Sequence[str], *, told: Told, force: bool = False, dry_run: bool = False
) -> Retirement:
    """Delete these runs. Raises NotFound or Conflict; the hundreds before it are gone then."""
    done = Retirement()
    wanted = list(dict.fromkeys(run_ids))
    for start in range(0, len(wanted), RUNS_AT_ONCE):
        some = wanted[start : start + RUNS_AT_ONCE]
        weighed = store.weigh_runs(some)
        done = replace(
            done,
            runs=done.runs + len(some),
            calls=done.calls + sum(run.calls for run in weighed),
            weight_bytes=done.weight_bytes + sum(run.weight_bytes for run in weighed),
        )
        if not dry_run:
            done = _with(done, store.delete_runs(some, busy="force" if force else "refuse"))
        told(done.runs, len(wanted), "runs")
    return done


def give_space_back(store: Store, *, force: bool = False, incremental: bool = False, always: bool = False) -> str:
    """Give free space back as far as nobody is disturbed; say what was done."""
    if store.gives_back() and not (always and incremental):
        while store.give_back():
            pass
        return "free space was given back to the disk, step by step"
    at_work = [proxy.proxy_id for proxy in store.list_proxies() if proxy.age_s < ALIVE_S]
    space = store.space()
    if space.free_bytes is None:
        store.vacuum()
        return "free space can be used again (PostgreSQL gives it back to the disk by VACUUM FULL alone)"
    if not always and space.free_bytes == 0:
        return "no space is free inside the file"
    if at_work and not force:
        return (
            f"{len(at_work)} proxies are at work, so the file keeps its size: {space.free_bytes:,} bytes inside are "
            "free and used again; `tracegrad store vacuum` gives them back once the proxies are stopped"
        )
    store.vacuum(incremental=incremental)
    return "the file was written anew without its free space"


def _with(done: Retirement, gone: Deletion) -> Retirement:
    return replace(
        done,
        stubs=done.stubs + len(gone.stubs),
        skipped={**done.skipped, **gone.skipped},
        keys=(*done.keys, *gone.keys),
    )
