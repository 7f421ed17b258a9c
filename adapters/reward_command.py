"""`tracegrad reward --with module:function`: score stored runs anew.

Reads and writes the store itself, so it needs no proxy, no app and no engine. Refuses to create a store that is not
there, and a project that is not in it. Results go to standard output, progress to standard error.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from tracegrad.adapters.amounts import moment
from tracegrad.adapters.entrypoint import load_entrypoint
from tracegrad.adapters.opening import read_config, which_store
from tracegrad.adapters.rescore import BATCH, Rescored, Rescoring, closed_runs, run_pass
from tracegrad.adapters.rollout_errors import EntryPointError
from tracegrad.tracestore.records import Purpose
from tracegrad.tracestore.store import open_store


@click.command()
@click.argument("run_ids", metavar="[RUN]...", nargs=-1)
@click.option("--with", "function_name", required=True, help="fn(trace, task) -> rewards, as module:function.")
@which_store
@click.option("--project", help="Only runs of this project. Default: the configuration's.")
@click.option("--purpose", type=click.Choice(["train", "eval", "live"]), help="Only runs made for this.")
@click.option("--since", type=moment, metavar="AGE|TIME", help="Only runs opened since: 30m, 2h, 7d, or an ISO time.")
@click.option("--source", help="What the rewards say they come from. Default: the function's name.")
@click.option("--dry-run", is_flag=True, help="Score, and write nothing.")
def reward(
    *,
    run_ids: tuple[str, ...],
    function_name: str,
    path: Path | None,
    url: str | None,
    project: str | None,
    purpose: Purpose | None,
    since: float | None,
    source: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Give stored runs new rewards: the closed ones, or each RUN.

    \b
    The function takes a run's trace (its calls, answers, spans and rewards) and its task (or None), and returns a
    number, a mapping of names to numbers, a list of RewardSpec (with `role` or `call_id`), or None for no reward:

    \b
        def brevity(trace, task):
            last = [call for call in trace.calls if call.attribution.role == "writer"][-1]
            text = last.choices[0].message["content"]
            return {"brevity": 1.0 / len(text.split())}

    Rewards are appended; the newest of a name counts. Jobs that train from now on see them, those that have trained
    a run already do so in their next epoch.
    """
    config = read_config(path, url)
    if url is None:
        project = project or config.project
    function = load_entrypoint(function_name, option="--with")
    if not callable(function):
        raise EntryPointError(f"--with {function_name!r} is a {type(function).__name__}, not a function")
    store = open_store(config.store, create=False)
    began = time.monotonic()
    last = [began]

    def progress(done: Rescored) -> None:
        if not as_json and time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            click.echo(f"{done.runs} runs scored, {done.appended} rewards, {last[0] - began:.0f} s", err=True)

    try:
        batches: Iterator[Sequence[str]]
        if run_ids:
            batches = (run_ids[start : start + BATCH] for start in range(0, len(run_ids), BATCH))
        else:
            if project is not None:
                store.require_project(project)
            batches = closed_runs(store, project=project, purpose=purpose, since=since)
        pass_ = Rescoring(store, function, source=source or function_name, dry_run=dry_run)
        done = run_pass(pass_, batches, each=progress)
    finally:
        store.close()
    _tell(done, dry_run=dry_run, as_json=as_json)
    sys.exit(1 if done.failed else 0)


def _tell(done: Rescored, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    if not done.runs:
        click.echo("no closed run: `tracegrad runs` lists what there is")
        return
    would = "would be " if dry_run else ""
    click.echo(
        f"{done.runs} runs: {done.rewarded} {would}rewarded anew ({done.appended} rewards), "
        f"{done.unchanged} unchanged, {done.without} without a reward, {done.failed} failed"
    )
    for job_id, count in sorted(done.late.items()):
        click.echo(f"job {job_id} had trained {count} of them already: it uses the new rewards in its next epoch")
    for failure in done.failures:
        click.echo(f"failed: {failure}", err=True)
