"""`tracegrad export FOLDER` and `tracegrad import FOLDER`: traces as Parquet, for study and for other stores.

Works on the store itself, so it needs no proxy. Refuses a folder that is not
empty, and a project that the store does not know. Needs `tracegrad[parquet]`.
"""

import json
from pathlib import Path

import click

from tracegrad.adapters.amounts import moment
from tracegrad.adapters.opening import opened_store, progress, which_store
from tracegrad.tracestore.interchange import Chosen
from tracegrad.tracestore.parquet import export_to, import_from

_FOLDER = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@click.command()
@which_store
@_FOLDER
@click.option("--project", help="Only runs of this project.")
@click.option("--since", type=moment, metavar="AGE|TIME", help="Only runs opened since: 30m, 2h, 7d, or an ISO time.")
@click.option("--run", "run_ids", multiple=True, help="Only this run. May be repeated.")
def export(
    *,
    path: Path | None,
    url: str | None,
    as_json: bool,
    folder: Path,
    project: str | None,
    since: float | None,
    run_ids: tuple[str, ...],
) -> None:
    """Write runs to a folder of Parquet files that HF datasets loads in one line.

    \b
    tracegrad export traces --project demo
    >>> datasets.load_dataset("traces")              # the calls
    >>> datasets.load_dataset("traces", "rewards")   # runs, spans, tasks, groups, policy_versions
    """
    with opened_store(path, url) as opened, progress() as told:
        if project is not None:
            opened.require_project(project)
        chosen = Chosen(project=project, since=since, run_ids=run_ids)
        rows = export_to(opened, folder, chosen, lambda table, count: told(count, 0, table))
    _say(rows, f"in {folder}", as_json=as_json)


@click.command("import")
@which_store
@_FOLDER
def import_(*, path: Path | None, url: str | None, as_json: bool, folder: Path) -> None:
    """Put an exported folder into a store, byte for byte.

    Makes the store where there is none. May be repeated: what is there already must say the same. Jobs, ledger and late
    facts are not in it: for a whole copy of a store take `tracegrad store backup`.
    """
    with opened_store(path, url, create=True) as opened, progress() as told:
        rows = import_from(opened, folder, lambda table, count: told(count, 0, table))
    _say(rows, "new", as_json=as_json)


def _say(rows: dict[str, int], where: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows))
    else:
        counted = ", ".join(f"{count} {table}" for table, count in rows.items())
        click.echo(f"{counted} {where}")
