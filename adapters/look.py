"""`tracegrad runs` and `tracegrad show RUN | CALL | VERSION`: what is in the store, for people or as JSON (--json).

Reads the store itself, so it needs no proxy. Refuses to create a store that is not there. Prompts and answers are
shortened in tables and whole in JSON.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tracegrad.adapters.fingerprint import fingerprint_of
from tracegrad.adapters.opening import open_existing, which_store
from tracegrad.adapters.run_picture import mermaid, tree_of
from tracegrad.adapters.show_version import (
    begins_with,
    call_lines,
    call_provenance,
    print_version,
    use_lines,
    version_as_json,
    versions_named,
)
from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.errors import Conflict, NotFound
from tracegrad.tracestore.records import (
    Attribution,
    AttributionConflict,
    Call,
    Choice,
    Continues,
    Drift,
    Purpose,
    Reward,
    RunStatus,
    RunSummary,
    RunTrace,
)
from tracegrad.tracestore.run_list import UnplacedCall
from tracegrad.tracestore.schema import CONTENT_DELETED
from tracegrad.tracestore.store import Store

_SHORT = 160
_COLOURS = {"open": "yellow", "closed": "green", "failed": "red"}


@click.command()
@which_store
@click.option("--purpose", type=click.Choice(["train", "eval", "live"]), help="Only runs made for this.")
@click.option("--status", type=click.Choice(["open", "closed", "failed"]), help="Only runs in this state.")
@click.option("--unplaced", is_flag=True, help="The calls that belong to no run, in place of runs.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@click.option("--before", help="Only runs older than this run (with --unplaced: call): the next page.")
def runs(
    *,
    path: Path | None,
    url: str | None,
    purpose: Purpose | None,
    status: RunStatus | None,
    unplaced: bool,
    limit: int,
    before: str | None,
    as_json: bool,
) -> None:
    """List the newest runs."""
    if unplaced and (purpose is not None or status is not None):
        raise click.UsageError("a call without a run has neither purpose nor status: leave --purpose and --status out")
    store = open_existing(path, url)
    try:
        if unplaced:
            _list_unplaced(store.list_unplaced_calls(limit=limit, before=before), as_json=as_json)
            return
        found = store.list_runs(purpose=purpose, status=status, limit=limit, before=before)
    except NotFound as error:
        raise click.ClickException(str(error)) from error
    finally:
        store.close()
    if as_json:
        _print_json([asdict(summary) for summary in found])
        return
    if not found:
        click.echo("no such runs")
        return
    console = Console(soft_wrap=True, highlight=False)
    for summary in found:
        console.print(run_lines(summary))


@click.command()
@click.argument("named", metavar="RUN|CALL|VERSION")
@which_store
@click.option("--full", is_flag=True, help="Do not shorten texts.")
@click.option("--mermaid", "as_mermaid", is_flag=True, help="The graph of the run, for a Mermaid renderer.")
@click.option("--calls", is_flag=True, help="Of a version: the calls that its step trained, and how much of each.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Calls on a page of --calls.")
@click.option("--after", metavar="CALL", help="With --calls: those after this call, the next page.")
def show(
    *,
    named: str,
    path: Path | None,
    url: str | None,
    full: bool,
    as_mermaid: bool,
    calls: bool,
    limit: int,
    after: str | None,
    as_json: bool,
) -> None:
    """Show one run, call or version: what ran inside what, tokens, rewards, which calls made which weights.

    \b
    tracegrad show RUN
    tracegrad show CALL               by its id or the completion's; which weights answered it, what was made from it
    tracegrad show version:12         or just 12: which calls made these weights (--calls lists them)
    tracegrad show checkpoint:1a2b    the same, by the beginning of the checkpoint's hash
    tracegrad show step:JOB/3         the same, by a job's step
    """
    longest = None if full else _SHORT
    store = open_existing(path, url)
    try:
        if not _is_run(store, named):
            if as_mermaid:
                raise click.ClickException(f"{named} is no run, and only a run has a graph")
            if not _show_version(store, named, calls=calls, limit=limit, after=after, as_json=as_json):
                _show_call(store, store.find_call(named)[0], as_json=as_json, longest=longest)
            return
        trace = store.trace(named)
        conflicts = store.attribution_conflicts(trace.run.run_id)
    except NotFound as error:
        told = f"no run, call or completion has the id {named!r}; `tracegrad runs` lists the runs"
        raise click.ClickException(told) from error
    except Conflict as error:
        raise click.ClickException(str(error)) from error
    finally:
        store.close()
    if as_json:
        more = {
            "edges": [asdict(edge) for edge in edges(trace.spans)],
            "conflicts": [asdict(one) for one in conflicts],
            "fingerprints": {call.call_id: fingerprint_of(call.request) for call in trace.calls},
        }
        _print_json({**asdict(trace), **more})
    elif as_mermaid:
        click.echo(mermaid(trace), nl=False)
    else:
        print_trace(Console(), trace, conflicts, longest=longest)


def _show_version(store: Store, named: str, *, calls: bool, limit: int, after: str | None, as_json: bool) -> bool:
    """Show the versions that `named` names, a JSON object each; say whether it names any."""
    try:
        found = versions_named(store, named)
        for version_id in found:
            if as_json:
                _print_json(version_as_json(store, version_id, limit=limit, after=after))
            else:
                print_version(Console(), store, version_id, calls=calls, limit=limit, after=after)
    except NotFound as error:
        raise click.ClickException(str(error)) from error
    return bool(found)


def _show_call(store: Store, call_id: str, *, as_json: bool, longest: int | None) -> None:
    try:
        call, rewards = store.get_call(call_id), store.call_rewards(call_id)
    except NotFound as error:  # it was found a moment ago: a stub
        raise click.ClickException(f"{error}: {'; '.join(use_lines(store.call_uses(call_id)))}") from error
    conflicts = store.attribution_conflicts(call_id=call_id)
    origin, uses = call_provenance(store, call)
    parent = store.parent_call(call_id)
    if as_json:
        more = {
            "rewards": [asdict(reward) for reward in rewards],
            "conflicts": [asdict(one) for one in conflicts],
            "fingerprint": fingerprint_of(call.request),
            "answered_by": None if origin is None else asdict(origin),
            "taken_by": [asdict(use) for use in uses],
            "begins_with": None if parent is None else asdict(parent),
        }
        _print_json({**asdict(call), **more})
        return
    console, run_id = Console(), call.attribution.run_id
    of_run = "of no run: nothing trains on it" if run_id is None else f"of run {run_id}"
    console.print(escape(f"call {call_id}, {of_run}"))
    _print_conflicts(console, conflicts)
    _print_call(console, {}, call, longest)
    for line in [*call_lines(origin, uses), begins_with(parent)]:
        console.print(escape(line), highlight=False, soft_wrap=True)
    if rewards:
        console.print(_rewards_table(rewards))


def _list_unplaced(found: Sequence[UnplacedCall], *, as_json: bool) -> None:
    """Print calls that belong to no run, a line for each."""
    if as_json:
        _print_json([asdict(call) for call in found])
    elif not found:
        click.echo("every call belongs to a run")
    console = Console(soft_wrap=True, highlight=False)
    for call in () if as_json else found:
        version = "" if call.version is None else f" of version {call.version}"
        flaw = "" if call.quarantine is None else f"; quarantined: {call.quarantine}"
        console.print(
            f"[bold]{escape(call.call_id)}[/]  {_time(call.received_at)}  {call.status}\n    "
            + escape(f"{call.n_sampled_tokens} tokens{version}; {call.role or 'no role'} → {call.model}{flaw}")
        )


def run_lines(summary: RunSummary) -> str:
    """Return a run in two lines that fit a narrow terminal: which run and how it ended, then what is in it."""
    run = summary.run
    of_version = f" of version {_versions(summary.versions)}" if summary.versions else ""
    inside = [f"{summary.n_calls} calls, {summary.n_sampled_tokens} tokens{of_version}", ", ".join(summary.roles)]
    rewards = ", ".join(f"{name} {value:.3g}" for name, value in summary.rewards.items())
    inside.append(f"rewards: {rewards}" if rewards else "no reward")
    status = f"[{_COLOURS[run.status]}]{run.status}[/]"
    if run.error == CONTENT_DELETED:
        status += f", {CONTENT_DELETED}"
    return (
        f"[bold]{escape(run.run_id)}[/]  {_time(run.opened_at)}  {run.purpose}  {status}\n"
        f"    {escape('; '.join(filter(None, inside)))}"
    )


def print_trace(
    console: Console, trace: RunTrace, conflicts: Sequence[AttributionConflict] = (), *, longest: int | None
) -> None:
    """Print a run: what it is, what ran inside what, its calls with prompts and answers, its rewards.

    `longest` shortens texts.
    """
    run = trace.run
    facts = Table(show_header=False, title=f"run {escape(run.run_id)}", title_justify="left")
    ended = "" if run.ended_at is None else f" by {run.ended_by} after {run.ended_at - run.opened_at:.2f} s"
    facts.add_row("status", f"[{_COLOURS[run.status]}]{run.status}[/]{ended}")
    facts.add_row("purpose", run.purpose)
    facts.add_row("opened", _time(run.opened_at))
    if run.task_id is not None:
        facts.add_row("task", escape(run.task_id))
    if run.group_id is not None:
        facts.add_row("group", f"{escape(run.group_id)}, member {run.member}")
    if run.error is not None:
        facts.add_row("error", f"[red]{escape(_shorten(run.error, longest))}[/]")
    console.print(facts)
    if trace.spans:
        console.print(tree_of(trace, shorten=lambda text: _shorten(text, longest)))
    _print_conflicts(console, conflicts)
    numbers = {call.call_id: number for number, call in enumerate(trace.calls, start=1)}
    for call in trace.calls:
        _print_call(console, numbers, call, longest)
    if trace.rewards:
        console.print(_rewards_table(trace.rewards))


def _print_conflicts(console: Console, conflicts: Sequence[AttributionConflict]) -> None:
    for conflict in conflicts:
        kept, said = f"{conflict.kept} ({conflict.kept_source})", f"{conflict.said} ({conflict.said_source})"
        console.print(
            escape(f"conflict: the {conflict.field} of {conflict.call_id} is {kept}, not {said}"), style="red"
        )


def _print_call(console: Console, numbers: Mapping[str, int], call: Call, longest: int | None) -> None:
    who = call.attribution
    title = f"call {numbers.get(call.call_id, '')}  {who.role or '(no role)'} → {call.model}  [{call.status}]"
    table = Table(show_header=False, title=escape(title), title_justify="left")
    table.add_row("id", escape(call.call_id))
    sampled = " + ".join(str(len(choice.token_ids)) for choice in call.choices) or "0"
    prompt = "?" if call.prompt_ids is None else str(len(call.prompt_ids))
    seconds = call.timing.completed_at - call.timing.received_at
    table.add_row("tokens", f"{prompt} prompt, {sampled} sampled, {seconds:.2f} s")
    table.add_row("version", _passage(call))
    table.add_row("sampling", escape(_sampling(call)))
    table.add_row("said by", escape(_sources(who)))
    if call.continues is not None:
        table.add_row("goes on from", escape(_origin(call.continues, numbers)))
    if who.span is not None:
        step = "" if who.span.superstep is None else f", superstep {who.span.superstep}"
        table.add_row("span", escape(f"{who.span.name}{step}"))
    if call.quarantine is not None:
        table.add_row("quarantined", f"[red]{escape(call.quarantine)}[/]")
    if call.error is not None:
        table.add_row("error", f"[red]{escape(_shorten(call.error, longest))}[/]")
    for message in call.request.get("messages", ()):
        table.add_row(escape(str(message.get("role"))), escape(_shorten(message_text(message), longest)))
    for choice in call.choices:
        notes = [str(choice.finish_reason), *choice.flags, *_left(choice), *_exchanges(choice)]
        ending = f" [dim]({escape(', '.join(notes))})[/]"
        answer = escape(_shorten(message_text(choice.message), longest))
        table.add_row(f"[bold]answer {choice.index}[/]", f"[bold]{answer}[/]{ending}")
    console.print(table)


def message_text(message: Any) -> str:
    """Return a chat message as text: its content (parts joined), then its tool calls."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", f"<{part.get('type')}>") for part in content)
    called = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    return " ".join(filter(None, [content, *(f"{c.get('name')}({c.get('arguments')})" for c in called)]))


def _rewards_table(rewards: Sequence[Reward]) -> Table:
    table = Table(title="rewards", title_justify="left")
    for heading in ("name", "value", "on", "source", "late for"):
        table.add_column(heading)
    for reward in rewards:
        target = f"call {reward.call_id}" if reward.call_id else f"role {reward.role}" if reward.role else "run"
        cells = (reward.name, f"{reward.value:.6g}", target, reward.source, ", ".join(reward.late_for))
        table.add_row(*map(escape, cells))
    return table


def _sources(who: Attribution) -> str:
    """Who says which run and which role the call is of."""
    said = (("run", who.run_source), ("role", who.role_source))
    return ", ".join(f"{what}: {source}" for what, source in said if source is not None) or "nobody"


_DRIFTS: Mapping[Drift, str] = {
    "template": "the template writes what was sampled in another way",
    "retokenised": "the same text has other ids",
    "edited": "the app changed the history",
    "unexplained": "other ids than were sampled; the engine could not say why",
}


def _origin(continues: Continues, numbers: Mapping[str, int]) -> str:
    """The earlier call, and whether the prompt begins with what was sampled there."""
    number = numbers.get(continues.call_id)
    earlier = continues.call_id if number is None else f"call {number}"
    if continues.drift is None:
        return f"{earlier}, exactly as sampled"
    used = ", but the prompt was built from the sampled ids (token-in)" if continues.token_in else ""
    return f"{earlier}; {continues.drift}: {_DRIFTS[continues.drift]}{used}"


def _passage(call: Call) -> str:
    if call.version_dispatched is None:
        return "unknown"
    changed = call.version_completed not in (None, call.version_dispatched)
    return f"{call.version_dispatched} → {call.version_completed}" if changed else str(call.version_dispatched)


def _left(choice: Choice) -> list[str]:
    """How much top-p, top-k or min-p left, where that is known."""
    sizes = [len(kept) for kept in choice.kept_ids or ()]
    return [f"sampled from {sum(sizes) / len(sizes):.1f} tokens at a time"] if sizes else []


def _exchanges(choice: Choice) -> list[str]:
    """Which version sampled which tokens, where it was not the version at dispatch that sampled all of them."""
    return [f"version {version} from token {first}" for first, version in choice.version_spans]


def _sampling(call: Call) -> str:
    """The effective parameters; where they are not the client's own, what the client asked for."""
    shown = []
    for name in sorted({*call.requested, *call.effective}):
        asked, used = call.requested.get(name), call.effective.get(name)
        shown.append(f"{name} {used}" if asked == used else f"{name} {used} (asked: {asked})")
    return ", ".join(shown) or "engine's defaults"


def _is_run(store: Store, named: str) -> bool:
    try:
        store.get_run(named)
    except NotFound:
        return False
    return True


def _versions(versions: tuple[int, ...]) -> str:
    if not versions:
        return ""
    return str(versions[0]) if len(versions) == 1 else f"{min(versions)}–{max(versions)}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _shorten(text: str, longest: int | None) -> str:
    text = " ".join(text.split()) if longest is not None else text
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
