"""`tracegrad doctor [RUN]`: why tokens are or are not trained, and what to do about it.

Reads the store itself, so it needs no proxy, and writes nothing. Exit status 0 where all is well, 1 where something
wants action (or the store cannot be read), 2 for a command that cannot be understood: an unknown run, job or project
is one. Only `--deep` reads payloads; everything else is counted from metadata.
"""

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from tracegrad.adapters.amounts import moment
from tracegrad.adapters.doctor_report import Report, gather, values_of
from tracegrad.adapters.doctor_text import lines, verdict_lines
from tracegrad.adapters.doctor_verdict import Finding, is_well, judge
from tracegrad.adapters.opening import open_existing, progress, which_store
from tracegrad.tracestore.diagnosis_records import Extent, JobFacts
from tracegrad.tracestore.errors import NotFound, TraceStoreError
from tracegrad.tracestore.section import near_misses
from tracegrad.tracestore.store import Store

_COLOURS = {"problem": "red", "note": "yellow", "well": "green"}


@click.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option("--since", type=moment, metavar="AGE|TIME", help="What came since: 30m, 2h, 7d, or an ISO time.")
@click.option("--job", "job_id", help="This training job, and the calls that it trains. Default: every job.")
@click.option("--project", help="Only this project. Default: every project.")
@which_store
@click.option("--deep", is_flag=True, help="Read every payload too: lengths, NaN, what is missing.")
def doctor(
    *,
    run_id: str | None,
    since: float | None,
    job_id: str | None,
    project: str | None,
    path: Path | None,
    url: str | None,
    deep: bool,
    as_json: bool,
) -> None:
    """Say what is wrong with what was recorded and trained, the worst first (then with exit status 1).

    \b
    tracegrad doctor                  the whole store
    tracegrad doctor RUN              one run: was it trained, and if not, why
    tracegrad doctor --since 2h       what came in the last two hours
    """
    if run_id is not None and since is not None:
        raise click.UsageError("a run is looked at whole: give RUN or --since, not both")
    store = open_existing(path, url)
    try:
        with progress() as say:
            jobs = _jobs(store, job_id)
            if project is not None:
                store.require_project(project)
            models = jobs[0].sampled_by if job_id is not None else None
            extent = Extent(run_id=run_id, project=project, models=models, since=since)
            report = gather(store, extent, jobs, deep=deep, progress=say)
    except NotFound as error:
        raise click.UsageError(str(error)) from error
    except TraceStoreError as error:
        raise click.ClickException(str(error)) from error
    finally:
        store.close()
    findings = judge(report)
    if as_json:
        click.echo(json.dumps(told(report, findings), ensure_ascii=False))
    else:
        _print(Console(soft_wrap=True), report, findings)
    sys.exit(0 if is_well(findings) else 1)


def told(report: Report, findings: list[Finding]) -> dict[str, object]:
    """Return the whole answer as JSON values."""
    verdict = [{"level": one.level, "code": one.code, "text": one.text} for one in findings]
    return {"ok": is_well(findings), "verdict": verdict, **values_of(report)}


def _jobs(store: Store, job_id: str | None) -> list[JobFacts]:
    """Return the jobs that are looked at. Raises click.UsageError for an unknown one."""
    known = store.list_jobs()
    if job_id is None:
        return known
    found = [job for job in known if job.job_id == job_id]
    if not found:
        raise click.UsageError(f"no training job {job_id!r}{near_misses(job_id, [job.job_id for job in known])}")
    return found


def _print(console: Console, report: Report, findings: list[Finding]) -> None:
    for theme, text in lines(report):
        console.print(f"[bold]{escape(theme):<11}[/] {escape(text)}", highlight=False)
    for level, text in verdict_lines(findings):
        console.print(f"[{_COLOURS[level]}]{level}:[/] {escape(text)}", highlight=False)
