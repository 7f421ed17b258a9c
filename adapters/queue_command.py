"""`tracegrad queue`: what a training job has before it, behind it, and will never train.

Reads the store itself, so it needs no proxy and no trainer, and writes nothing. A job is judged by the rule that it
last leased by. Refuses an unknown job or run (exit status 2). The lines are `queue_text`'s.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from tracegrad.adapters.opening import open_existing, which_store
from tracegrad.adapters.queue_text import dead_lines, queue_lines, run_lines
from tracegrad.tracestore.errors import NotFound, TraceStoreError
from tracegrad.tracestore.queue_records import DeadRun, Queue, RunStanding
from tracegrad.tracestore.reasons import words_of
from tracegrad.tracestore.store import Store


@click.command()
@which_store
@click.option("--job", "job_id", help="This training job. Default: every job.")
@click.option("--epoch", type=click.IntRange(min=0), help="This pass over the runs. Default: the job's current one.")
@click.option("--dead", is_flag=True, help="The runs that are not trained although something of them should, and why.")
@click.option("--run", "run_id", metavar="RUN", help="One run: where each of its answers stands, what it waits for.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Runs on a page of --dead.")
@click.option("--before", metavar="RUN", help="With --dead: only runs older than this one, the next page.")
def queue(
    *,
    path: Path | None,
    url: str | None,
    as_json: bool,
    job_id: str | None,
    epoch: int | None,
    dead: bool,
    run_id: str | None,
    limit: int,
    before: str | None,
) -> None:
    """Say what is ready to be trained, what waits and for what, and what never will be, with the reasons.

    \b
    tracegrad queue                   per job: ready, held, waiting, trained, dead letters
    tracegrad queue --dead            dead letters run by run, newest first
    tracegrad queue --run RUN         one run
    """
    if dead and run_id is not None:
        raise click.UsageError("give --dead or --run, not both: --run says of everything in the run where it stands")
    store = open_existing(path, url)
    try:
        jobs = [job_id] if job_id is not None else [job.job_id for job in store.list_jobs()]
        if run_id is not None:
            standings = [(job, store.run_standing(job, run_id, epoch=epoch)) for job in jobs]
            found, lines = _run(store, standings)
        elif dead:
            pages = [(job, store.dead_runs(job, epoch=epoch, limit=limit, before=before)) for job in jobs]
            found, lines = _dead(pages, limit)
        else:
            found, lines = _whole([store.queue(job, epoch=epoch) for job in jobs])
    except NotFound as error:
        raise click.UsageError(str(error)) from error
    except TraceStoreError as error:
        raise click.ClickException(str(error)) from error
    finally:
        store.close()
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    _print(lines if jobs else [("", "no training job yet: `tracegrad train` makes one")])


def _whole(queues: list[Queue]) -> tuple[Any, Iterator[tuple[str, str]]]:
    told = [
        {
            **asdict(one),
            "conserved": one.conserved,
            "words": {r.reason: asdict(words_of(r.reason)) for r in one.reasons},
        }
        for one in queues
    ]
    return told, (line for one in queues for line in queue_lines(one))


def _dead(pages: list[tuple[str, list[DeadRun]]], limit: int) -> tuple[Any, Iterator[tuple[str, str]]]:
    told = [{"job_id": job, "runs": [asdict(one) for one in found]} for job, found in pages]
    return told, (line for job, found in pages for line in dead_lines(job, found, limit))


def _run(store: Store, standings: list[tuple[str, RunStanding]]) -> tuple[Any, Iterator[tuple[str, str]]]:
    told = [
        {
            "job_id": job,
            **asdict(one),
            "trained": [asdict(each) for each in store.trained_by(one.run.run_id) if each.job_id == job],
        }
        for job, one in standings
    ]
    return told, (line for job, one in standings for line in run_lines(job, one))


def _print(lines: Iterable[tuple[str, str]]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for theme, text in lines:
        console.print(f"[bold]{escape(theme):<11}[/] {escape(text)}".rstrip())
