"""`tracegrad rollout` and `tracegrad eval`: the command lines of the rollout and evaluation drivers.

Results go to standard output (JSON with --json), progress to standard error. Exit code 0: done; 1: it could not be
done (the message says why); 130: interrupted, in which case the runs in flight have been ended as failed.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tracegrad.adapters import eval_files
from tracegrad.adapters.app_session import AppSession, leave, open_session, run_loop
from tracegrad.adapters.evaluation import EvalRow, Evaluation, report
from tracegrad.adapters.execution import RunOutcome
from tracegrad.adapters.launch import proxy_root
from tracegrad.adapters.rollout import Rollout, RolloutPlan, RolloutSummary, Watcher
from tracegrad.adapters.rollout_progress import RolloutProgress, line_for, score_texts
from tracegrad.adapters.rollout_tables import print_report, print_summary
from tracegrad.adapters.serving import serving
from tracegrad.adapters.tasks import load_tasks
from tracegrad.tracestore.config import load_config
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.records import Purpose, Task

_FILE = click.Path(dir_okay=False, path_type=Path)


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that both commands have."""
    options = [
        click.option("--app", required=True, help="The compiled graph, as module:attribute (or file.py:attribute)."),
        click.option("--tasks", "tasks_path", required=True, type=_FILE, help="JSON Lines of id?, input, reference?."),
        click.option("--reward", required=True, help="fn(task, output) -> rewards, as module:function."),
        click.option("--proxy", help="The proxy's URL. Default: TRACEGRAD_PROXY, else what --config says."),
        click.option("--config", "config_path", type=_FILE, help="The YAML file that names the proxy's address."),
        click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True, help="Runs at a time."),
        click.option("--limit", type=click.IntRange(1), help="Only the first so many tasks of the file."),
        click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output."),
        click.option("--quiet", is_flag=True, help="No progress."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@_shared
@click.option("--name", help="A name to resume under; the same name does only what is missing. Default: a new one.")
@click.option("--group", type=click.IntRange(1), default=8, show_default=True, help="Runs per task and pass.")
@click.option("--groups", type=click.IntRange(1), help="Groups in all. Default: one pass over the tasks.")
@click.option("--rounds", type=click.IntRange(1), help="Groups in all, in rounds of --tasks-per-round.")
@click.option("--tasks-per-round", type=click.IntRange(1), help="Groups a round (default: all tasks); for the report.")
@click.option("--ahead", type=click.IntRange(1), help="At most so many groups sampled and not yet trained.")
@click.option("--seed", default=0, show_default=True, help="Of the order of the tasks.")
@click.option("--purpose", type=click.Choice(["train", "live"]), default="train", show_default=True)
@click.option(
    "--max-failures", type=click.IntRange(1), default=32, show_default=True, help="Stop after so many in a row."
)
def rollout(
    *,
    app: str,
    tasks_path: Path,
    reward: str,
    proxy: str | None,
    config_path: Path | None,
    concurrency: int,
    limit: int | None,
    as_json: bool,
    quiet: bool,
    name: str | None,
    group: int,
    groups: int | None,
    rounds: int | None,
    tasks_per_round: int | None,
    ahead: int | None,
    seed: int,
    purpose: Purpose,
    max_failures: int,
) -> None:
    """Drive a graph over a task file, in groups, for training.

    \b
    tracegrad rollout --app app:graph --tasks train.jsonl --reward reward:fn --config tracegrad.yaml --name first
    """
    tasks = load_tasks(tasks_path)[:limit]
    plan = RolloutPlan(
        name=name or new_id("rollout"),
        groups=_groups_in_all(len(tasks), groups, rounds, tasks_per_round),
        group_size=group,
        purpose=purpose,
        concurrency=concurrency,
        ahead=ahead,
        seed=seed,
        tasks_per_round=tasks_per_round,
        max_failures=max_failures,
    )
    _check_ahead(ahead, config_path)
    session = open_session(_root(proxy, config_path), app=app, reward=reward, purpose=purpose, source="rollout")
    watcher = Watcher() if quiet else RolloutProgress()
    summary = run_loop(lambda: _roll(plan, tasks, session, watcher), concurrency=concurrency)
    _print(summary, print_summary, as_json=as_json)
    if summary.interrupted:
        click.echo(f"interrupted; go on with --name {plan.name}", err=True)
        leave(130)


async def _roll(plan: RolloutPlan, tasks: list[Task], session: AppSession, watcher: Watcher) -> RolloutSummary:
    return await Rollout(plan, tasks, session.executor, session.control, watcher).run()


@click.command("eval")
@_shared
@click.option("--name", help="A name for the evaluation; it must be new. Default: a new one.")
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Serve this one.")
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Runs per task.")
@click.option("--out", type=_FILE, help="Write the report and a row per run to this JSON file.")
@click.option("--compare", type=_FILE, help="An earlier --out file: print the paired differences to it.")
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")
def evaluate(
    *,
    app: str,
    tasks_path: Path,
    reward: str,
    proxy: str | None,
    config_path: Path | None,
    concurrency: int,
    limit: int | None,
    as_json: bool,
    quiet: bool,
    name: str | None,
    checkpoint: Path | None,
    repeat: int,
    out: Path | None,
    compare: Path | None,
    seed: int,
) -> None:
    """Score a graph over a task file, as its users get it: no sampling override, never trained on.

    With --checkpoint, an engine and a proxy are started for it on free ports, with a store of their own, and stopped.
    """
    if checkpoint is not None and proxy is not None:
        raise click.UsageError("--checkpoint starts a proxy of its own: drop --proxy")
    tasks = load_tasks(tasks_path)[:limit]
    other = None if compare is None else eval_files.read_rows(compare)
    evaluation = name or new_id("eval")

    def measure(root: str) -> tuple[list[EvalRow], bool | None]:
        session = open_session(root, app=app, reward=reward, purpose="eval", source="eval")
        return run_loop(
            lambda: _evaluate(evaluation, tasks, session, repeat=repeat, concurrency=concurrency, quiet=quiet),
            concurrency=concurrency,
        )

    try:
        if checkpoint is None:
            rows, greedy = measure(_root(proxy, config_path))
        else:
            config = None if config_path is None else load_config(config_path)
            with serving(checkpoint, config, say=_silent if quiet else _say) as root:
                rows, greedy = measure(root)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        leave(130)
    found = report(evaluation, rows, greedy=greedy, other=other, seed=seed)
    if out is not None:
        eval_files.write(out, found, rows)
    _print(found, print_report, as_json=as_json)


async def _evaluate(
    name: str, tasks: list[Task], session: AppSession, *, repeat: int, concurrency: int, quiet: bool
) -> tuple[list[EvalRow], bool | None]:
    line = None if quiet else line_for("eval: runs", len(tasks) * repeat)
    ended: list[RunOutcome] = []

    def tell(outcome: RunOutcome) -> None:
        ended.append(outcome)
        if line is not None:
            line.update(len(ended), "  ".join(score_texts(ended)))

    evaluation = Evaluation(
        name, tasks, session.executor, session.control, repeat=repeat, concurrency=concurrency, tell=tell
    )
    try:
        rows = await evaluation.run()
    finally:
        if line is not None:
            line.close()
    return rows, await session.control.all_greedy([row.run_id for row in rows])


def _groups_in_all(n_tasks: int, groups: int | None, rounds: int | None, tasks_per_round: int | None) -> int:
    if groups is not None and rounds is not None:
        raise click.UsageError("--groups and --rounds both say how much to sample: give one")
    if rounds is not None:
        return rounds * (tasks_per_round or n_tasks)
    return groups or n_tasks


def _check_ahead(ahead: int | None, config_path: Path | None) -> None:
    """A trainer that leases more groups at once than may wait for it would never lease any."""
    if ahead is None or config_path is None:
        return
    leased = load_config(config_path).trainer.batch.groups
    if ahead < leased:
        raise click.UsageError(
            f"--ahead {ahead} is less than trainer.batch.groups ({leased}): the trainer would wait for ever"
        )


def _root(proxy: str | None, config_path: Path | None) -> str:
    return proxy_root(proxy, None if config_path is None else str(config_path), os.environ)


def _print(result: Any, as_table: Callable[[Any], None], *, as_json: bool) -> None:
    if as_json:
        json.dump(asdict(result), sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()
    else:
        as_table(result)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _silent(text: str) -> None:
    """--quiet."""
