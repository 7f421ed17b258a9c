"""`tracegrad store delete | delete-job | prune | vacuum | check | backup`: the care of a trace store.

Works on the store itself, so it needs no proxy, and beside proxies and trainers that are at work. Refuses to delete
what is open or leased unless it is forced, and to make a store that is not there. `retiring` does the deleting.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from tracegrad.adapters.amounts import in_bytes, moment, size
from tracegrad.adapters.opening import opened_store, progress, which_store
from tracegrad.adapters.retiring import Retirement, give_space_back, retire, retire_named
from tracegrad.tracestore.retention import Retired


@click.group()
def store() -> None:
    """Care for the trace store: delete, prune, vacuum, check, back up."""


@store.command()
@which_store
@click.argument("run_ids", metavar="[RUN]...", nargs=-1)
@click.option("--project", help="All runs of a project, and its calls without a run.")
@click.option("--before", type=moment, metavar="AGE|TIME", help="With --project: only what ended before.")
@click.option("--force", is_flag=True, help="Also open runs, and leased ones: their leases are released.")
@click.option("--dry-run", is_flag=True, help="Only count.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(
    *,
    path: Path | None,
    url: str | None,
    as_json: bool,
    run_ids: tuple[str, ...],
    project: str | None,
    before: float | None,
    force: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Delete runs with all that hangs on them, and look whether anything is left.

    Of a run that was trained a stub stays: ids, counts and versions, so that the ledger stays true; no content.
    With --project alone, its tasks, groups and late facts go too, unless runs of it stay. Keys stay.

    \b
    tracegrad store delete run_1 run_2
    tracegrad store delete --project demo --before 2026-01-31
    """
    if bool(run_ids) == (project is not None) or (before is not None and project is None):
        raise click.UsageError("which runs? name them, or give --project P (and with it --before 30d)")
    with opened_store(path, url) as opened:
        if project is None:
            with progress() as told:
                done = retire_named(opened, run_ids, force=force, dry_run=dry_run, told=told)
        else:
            opened.require_project(project)
            if not (yes or dry_run):
                click.confirm(f"Delete {_what(project, before)} from {opened.place}?", abort=True, err=True)
            which = Retired(project=project, ended_before=before, busy_too=force)
            with progress() as told:
                done = retire(opened, which, force=force, dry_run=dry_run, told=told)
    _say(done, dry_run=dry_run, as_json=as_json)


@store.command()
@which_store
@click.option("--project", required=True, help="Whose runs.")
@click.option("--older-than", "ended_before", type=moment, metavar="AGE|TIME", help="Runs that ended before: 30d.")
@click.option(
    "--larger-than",
    "largest",
    type=size,
    metavar="SIZE",
    help="The oldest runs of a project whose content is larger: 10GB.",
)
@click.option("--dry-run", is_flag=True, help="Only count.")
def prune(
    *,
    path: Path | None,
    url: str | None,
    as_json: bool,
    project: str,
    ended_before: float | None,
    largest: int | None,
    dry_run: bool,
) -> None:
    """Delete the oldest runs of a project, by age or by size, and give the space back.

    What is open or leased stays. Stop it at any time and start it again: each hundred runs are a transaction.

    \b
    tracegrad store prune --project demo --older-than 30d --larger-than 10GB --dry-run
    """
    if ended_before is None and largest is None:
        raise click.UsageError("how much may stay? give --older-than 30d, --larger-than 10GB, or both")
    with opened_store(path, url) as opened:
        opened.require_project(project)
        through = None if largest is None else opened.place_beyond(project, largest)
        done = Retirement()
        if ended_before is not None or through is not None:
            which = Retired(project=project, ended_before=ended_before, through=through)
            with progress() as told:
                done = retire(opened, which, dry_run=dry_run, told=told)
        space = None if dry_run else give_space_back(opened)
    _say(done, dry_run=dry_run, as_json=as_json, space=space)


@store.command("delete-job")
@which_store
@click.argument("job_id", metavar="JOB")
def delete_job(*, path: Path | None, url: str | None, as_json: bool, job_id: str) -> None:
    """Remove a training job that never trained anything, such as a mistyped name, from `queue` and `doctor`.

    A job that has committed a step stays for good. Versions that it made stay too, of no job and abandoned. Its folder
    of checkpoints is yours to delete.
    """
    with opened_store(path, url) as opened:
        versions = opened.remove_job(job_id)
    if as_json:
        click.echo(json.dumps({"job_id": job_id, "abandoned": versions}))
    else:
        made = f"; abandoned: {', '.join(map(str, versions))}" if versions else ""
        click.echo(f"job {job_id} is gone{made}")


@store.command()
@which_store
@click.option("--incremental", is_flag=True, help="SQLite: from now on `prune` gives space back beside proxies.")
@click.option("--force", is_flag=True, help="Although a proxy is at work: its commits wait for the end.")
def vacuum(*, path: Path | None, url: str | None, as_json: bool, incremental: bool, force: bool) -> None:
    """Give the space of what was deleted back to the disk.

    A SQLite file is written anew: writers wait, and as much room again is needed meanwhile.
    """
    with opened_store(path, url) as opened:
        before = opened.space()
        said = give_space_back(opened, force=force, incremental=incremental, always=True)
        after = opened.space()
    if as_json:
        click.echo(json.dumps({"before_bytes": before.size_bytes, "after_bytes": after.size_bytes, "said": said}))
    else:
        click.echo(f"{in_bytes(before.size_bytes)} -> {in_bytes(after.size_bytes)}; {said}")


@store.command()
@which_store
def check(*, path: Path | None, url: str | None, as_json: bool) -> None:
    """Look whether the store is whole: pages, keys, lengths, rows without their kin. Exit status 1 where it is not."""
    with opened_store(path, url) as opened, progress() as told:
        faults = opened.check(lambda what: told(0, 0, what))
    if as_json:
        click.echo(json.dumps([asdict(fault) for fault in faults]))
    else:
        for fault in faults:
            click.echo(f"{fault.what}: {fault.count}, such as {', '.join(fault.examples)}")
        click.echo("the store is whole" if not faults else "restore a backup, or delete the runs that are named here")
    if faults:
        sys.exit(1)


@store.command()
@which_store
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path))
def backup(*, path: Path | None, url: str | None, as_json: bool, target: Path) -> None:
    """Copy a SQLite store to a new FILE while proxies write to it. (PostgreSQL: pg_dump.)

    FILE is a store like any other: `--store sqlite:///FILE` opens it, and moving it back restores it.
    """
    with opened_store(path, url) as opened, progress() as told:
        copied = opened.backup(target, lambda done, total: told(done, total, "pages"))
    click.echo(json.dumps({"file": str(target), "bytes": copied}) if as_json else f"{target}: {in_bytes(copied)}")


def _say(done: Retirement, *, dry_run: bool, as_json: bool, space: str | None = None) -> None:
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, **asdict(done), "space": space}))
        return
    for run_id, why in done.skipped.items():
        click.echo(f"{run_id} {why}: left alone", err=True)
    verb = "would go" if dry_run else "are gone"
    click.echo(f"{done.runs} runs and {done.calls} calls {verb}, {in_bytes(done.weight_bytes)} of content")
    if done.stubs:
        click.echo(f"of {done.stubs} of them a stub stays, without content: a ledger or a group names it")
    if done.beside:
        click.echo("beside them went " + ", ".join(f"{count} of {table}" for table, count in done.beside.items()))
    if not dry_run and done.runs:
        click.echo("checked afterwards: nothing else of them is left")
    for key_id in done.keys:
        click.echo(
            f"key {key_id} is bound to one of them and opens it anew: `tracegrad keys revoke {key_id}`", err=True
        )
    if space:
        click.echo(space)


def _what(project: str, before: float | None) -> str:
    return f"every run of project {project!r}" + ("" if before is None else " that ended before then")
