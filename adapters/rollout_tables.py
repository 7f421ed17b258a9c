"""The results of rollouts and evaluations as tables for people. Writes to standard output; decides nothing."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from tracegrad.adapters.evaluation import EvalReport
from tracegrad.adapters.rollout import RolloutSummary
from tracegrad.tracestore.bootstrap import Interval

_GREEDY = {True: "every call was greedy", False: "not every call was greedy", None: "greedy or not: unknown"}


def print_summary(summary: RolloutSummary) -> None:
    """Print what a start of a rollout did."""
    console = Console()
    table = Table(title=f"rollout {summary.name} ({summary.purpose})", title_justify="left", show_header=False)
    before = f" ({summary.groups_before} complete before)" if summary.groups_before else ""
    table.add_row("groups", f"{summary.groups_done} of {summary.groups_planned} sampled{before}")
    table.add_row("runs closed", str(summary.runs_closed))
    table.add_row("runs failed", _alarming(summary.runs_failed))
    table.add_row("without reward", _alarming(summary.runs_without_reward))
    for name, mean in summary.scores.items():
        table.add_row(f"mean {name}", f"{mean:.4f}")
    waited = f" ({summary.seconds_waiting:.0f} s waiting for the trainer)" if summary.seconds_waiting else ""
    table.add_row("seconds", f"{summary.seconds:.1f}{waited}")
    console.print(table)
    if summary.reward_errors:
        console.print(
            f"[bold red]The reward function raised in {summary.reward_errors} runs: they have no reward "
            "and will not be trained on.[/]"
        )
    _print_errors(console, summary.errors)


def print_report(report: EvalReport) -> None:
    """Print what an evaluation found."""
    console = Console()
    table = Table(title=f"evaluation {report.name}: {report.n_tasks} tasks", title_justify="left")
    for heading in ("score", "mean", "95% interval", "tasks"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name, interval in report.scores.items():
        table.add_row(name, f"{interval.mean:.4f}", _range(interval), str(interval.n))
    for name, comparison in (report.comparison or {}).items():
        difference = comparison.difference
        note = f" ({comparison.unpaired} unpaired)" if comparison.unpaired else ""
        table.add_row(f"{name} difference", f"{difference.mean:+.4f}", _range(difference), f"{difference.n}{note}")
    console.print(table)
    console.print(f"{report.n_runs} runs, {report.n_failed} failed, {report.n_unscored} without a score; ", end="")
    console.print(f"{_GREEDY[report.greedy]}. Failed runs count in no mean.")
    _print_errors(console, report.errors)


def _print_errors(console: Console, errors: Mapping[str, int]) -> None:
    for error, count in errors.items():
        console.print(f"{count} x {error.splitlines()[0][:300]}", style="red", markup=False)


def _range(interval: Interval) -> str:
    return f"{interval.low:.4f} … {interval.high:.4f}"


def _alarming(count: int) -> str:
    return f"[red]{count}[/]" if count else "0"
