"""`tracegrad status`: is everything up, and if not, what is to be done. Exit status 1 where something is wrong.

Needs no proxy. Refuses to create a store that is not there (that is one of the things it reports).
"""

import json
import sys
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from tracegrad.adapters.status_report import Report, as_json, examine
from tracegrad.tracestore.config import load_config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.publishes import UNFINISHED
from tracegrad.tracestore.records import Publish
from tracegrad.tracestore.trainers import NOT_YET, TrainerAtWork, TrainerPhase

_PHASES: dict[TrainerPhase, str] = {
    "starting": "starting its workers",
    "loading": "loading weights and proving its engines",
    "waiting": "waiting for the runs of step {step}",
    "training": "training step {step}",
    "publishing": "publishing step {step}",
}


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default="tracegrad.yaml",
    show_default=True,
)
@click.option("--timeout", default=3.0, show_default=True, help="Seconds an engine or a proxy gets to answer.")
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object.")
def status(*, config_path: Path, timeout: float, json_wanted: bool) -> None:
    """Say what is up, what is live, what waits, and what is wrong (then with exit status 1)."""
    try:
        config = load_config(config_path)
    except TraceStoreError as error:
        raise click.ClickException(str(error)) from error
    report = examine(config, timeout_s=timeout)
    if json_wanted:
        click.echo(json.dumps(as_json(report), ensure_ascii=False, default=str))
    else:
        _print(Console(soft_wrap=True), report)
    sys.exit(1 if report.problems else 0)


def _print(console: Console, report: Report) -> None:
    for name, text in _rows(report):
        console.print(f"[bold]{name:<8}[/] {escape(text)}")
    if not report.problems:
        console.print(f"[green]{_all_is_well(report)}[/]")
    for problem in report.problems:
        console.print(f"[red]problem:[/] {escape(problem)}")


def _rows(report: Report) -> list[tuple[str, str]]:
    schema = "not readable" if report.revision is None else f"schema {report.revision}"
    rows = [("store", f"{report.store}, {schema}")]
    for proxy in report.proxies:
        rows.append(("proxy", f"{proxy.proxy_id} at {proxy.url}, heartbeat {proxy.age_s:.1f} s ago"))
    if report.dead_proxies:
        rows.append(
            ("proxies", f"{report.dead_proxies} more are registered and have no heartbeat: no one waits for them")
        )
    for engine in report.engines:
        version = "" if engine.version is None else f", serves version {engine.version}"
        rows.append(("engine", f"{engine.model} at {engine.url}: {engine.health}{version}"))
    for state in report.models:
        live = "no version is live" if state.live_version is None else f"version {state.live_version} is live"
        step = "" if state.live_step is None else f" (step {state.live_step})"
        publish = state.publish
        going_on = (
            f"; publish {publish.publish_id} of version {publish.version_id} is {publish.state} "
            f"since {state.publish_age_s:.0f} s{_silent(state.silent_s)}"
            if publish is not None and publish.state in UNFINISHED
            else _refused(publish)
        )
        held = "" if state.pinned is None else f", pinned at version {state.pinned}"
        how = "paused" if publish is not None and publish.in_flight else "held"
        paused = "" if state.paused_share is None else f", {how} for publishes {state.paused_share:.1%} of the time"
        rows.append(("model", f"{state.model}: {live}{step}{held}{paused}{going_on}"))
    if report.open_runs is not None:
        rows.append(("runs", f"{report.open_runs.count} open"))
    if report.drift:
        rows.append(("prompts", _drift(report)))
    if report.trainer is not None:
        trainer = report.trainer
        step = (
            "no step yet"
            if trainer.step is None
            else f"step {trainer.step} of {trainer.steps}, {_ago(trainer.step_age_s or 0.0)} ago"
        )
        waiting = trainer.backlog
        trained = f" of {', '.join(trainer.models)}" if len(trainer.models) > 1 else ""
        groups = f"{waiting.ready_groups} groups ready, {waiting.leased_groups} leased"
        waits = "" if trainer.wait_share is None else f"; {trainer.wait_share:.0%} of the time it waited for fresh runs"
        rows.append(("trainer", f"job {trainer.job}{trained}: {_doing(trainer.now)}; {step}; {groups}{waits}"))
    return rows


def _silent(seconds: float | None) -> str:
    return "" if seconds is None else f", its publisher silent since {seconds:.0f} s"


def _doing(now: TrainerAtWork | None) -> str:
    if now is None:
        return "no trainer is at work"
    return f"{_PHASES[now.phase].format(step=now.step)} since {_ago(now.phase_age_s)}"


def _all_is_well(report: Report) -> str:
    now = report.trainer.now if report.trainer is not None else None
    if now is not None and now.phase in NOT_YET:
        return f"the trainer is {_PHASES[now.phase]}; everything else is up"
    return "everything is up"


def _refused(publish: Publish | None) -> str:
    """Say why the newest version does not serve, where it was not an engine that failed."""
    if publish is None or publish.state not in ("rejected", "skipped"):
        return ""
    why = publish.error if publish.decision is None else publish.decision["why"]
    return f"; version {publish.version_id} was {publish.state}: {why}"


def _drift(report: Report) -> str:
    """Of the calls that go on from an earlier one: how many prompts were as sampled, and why the others were not."""
    causes: Counter[str] = Counter()
    for one in report.drift:
        causes[one.drift or "as sampled"] += one.calls
    built = sum(one.calls for one in report.drift if one.token_in)
    told = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    return f"{causes.total()} calls go on from an earlier one: {told}; {built} built from sampled ids (token-in)"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
