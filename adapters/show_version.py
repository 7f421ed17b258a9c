"""`tracegrad show version:N`: which calls made these weights; and of a call, which weights answered it.

A version is named by its number, by the beginning of its checkpoint's hash, or by a job's step. Numbers are those of
the store's `provenance`. Refuses names of other forms (they are runs or calls). Called by `look`.
"""

import re
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.parents import ChainParent
from tracegrad.tracestore.provenance import CallUse, MadeFrom, TrainedCall, VersionOrigin
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store

_NAMED = re.compile(r"(?:version:)?(?P<version>\d+)|checkpoint:(?P<hash>\w+)|step:(?P<job>.+)/(?P<step>\d+)")
_KINDS = ("version:", "checkpoint:", "step:")


def versions_named(store: Store, named: str) -> list[int]:
    """Return the versions that `N`, `version:N`, `checkpoint:HASH` or `step:JOB/N` means; else none.

    A checkpoint and a step have a version for each model that was trained.

    Raises:
        NotFound: there is no such checkpoint or step, or the name is not whole (`step:JOB`).
        Conflict: several checkpoints begin so.
    """
    found = _NAMED.fullmatch(named)
    if found is None:
        if named.startswith(_KINDS):
            raise NotFound(f"{named!r} names no version: write version:12, checkpoint:1a2b3c or step:JOB/3")
        return []
    if found["version"] is not None:
        return [int(found["version"])]
    if found["hash"] is not None:
        return sorted(store.find_versions(checkpoint=found["hash"]).values())
    return sorted(store.find_versions(job_id=found["job"], step=int(found["step"])).values())


def version_as_json(store: Store, version_id: int, *, limit: int, after: str | None) -> dict[str, Any]:
    """Return a version, what it was made from, and a page of the calls of its step. Raises NotFound."""
    origin, calls = store.version_origin(version_id), store.version_calls(version_id, limit=limit, after=after)
    return {**asdict(origin), "calls": [asdict(call) for call in calls]}


def print_version(
    console: Console, store: Store, version_id: int, *, calls: bool, limit: int, after: str | None
) -> None:
    """Print a version and what it was made from; with `calls` a page of the calls of its step. Raises NotFound."""
    origin = store.version_origin(version_id)
    version = origin.version
    facts = Table(show_header=False, title=f"version {version_id} of {escape(version.model)}", title_justify="left")
    facts.add_row("kind", version.kind + (", abandoned" if version.abandoned else ""))
    facts.add_row("checkpoint", f"{version.checkpoint_hash[:16]}…")
    facts.add_row("folder", escape(version.checkpoint_path))
    if version.job_id is not None:
        epoch = "" if origin.epoch is None else f", epoch {origin.epoch}"
        facts.add_row("made by", escape(f"job {version.job_id}, step {version.step}{epoch}"))
    if version.parent_id is not None:
        facts.add_row("from", f"version {version.parent_id}")
    facts.add_row("its step", _made_from(origin.own) if origin.own.steps else "none: nothing was trained for it")
    if origin.all_steps.steps > origin.own.steps:
        facts.add_row("all steps", f"{origin.all_steps.steps} steps: {_made_from(origin.all_steps)}")
    facts.add_row("answered", f"{origin.answered_calls} calls")
    console.print(facts)
    if calls:
        _print_calls(console, version_id, store.version_calls(version_id, limit=limit, after=after), limit)
    elif origin.own.runs:
        console.print(f"the calls of its step: tracegrad show version:{version_id} --calls", highlight=False)


def call_provenance(store: Store, call: Call) -> tuple[VersionOrigin | None, list[CallUse]]:
    """Return what answered a call (None: no version of ours, or none that is known), and the steps that took it."""
    try:
        origin = None if call.version_dispatched is None else store.version_origin(call.version_dispatched)
    except NotFound:
        origin = None
    return origin, store.call_uses(call.call_id)


def call_lines(origin: VersionOrigin | None, uses: list[CallUse]) -> list[str]:
    """Return which weights answered a call, and which were made from it, a sentence each."""
    lines = ["answered by no known version"]
    if origin is not None:
        version = origin.version
        by = "" if version.job_id is None else f", step {version.step} of job {version.job_id}"
        made = f"; made from {_made_from(origin.all_steps)}" if origin.all_steps.steps else ", before any step"
        lines = [f"answered by version {version.version_id}{by} (checkpoint {version.checkpoint_hash[:12]}){made}"]
    return [*lines, *use_lines(uses)]


def begins_with(parent: ChainParent | None) -> str:
    """Return whose prompt a prompt begins with, in a sentence."""
    if parent is None:
        return "its prompt begins as no earlier one"
    what = "token ids" if parent.by == "ids" else "messages and other large values"
    return f"its prompt begins with that of call {parent.call_id}: {parent.shared} {what}"


def use_lines(uses: list[CallUse]) -> list[str]:
    """Return what the steps did with a call, a sentence each."""
    lines = []
    for use in uses:
        left_out = f", {use.excluded_tokens} left out ({', '.join(use.reasons)})" if use.excluded_tokens else ""
        made = "no version of its model" if use.version_id is None else f"version {use.version_id}"
        lines.append(
            f"taken by step {use.step} of job {use.job_id} (epoch {use.epoch}), which made {made}: "
            f"{use.trained_tokens} tokens trained{left_out}"
        )
    return lines or ["trained by no step"]


def _print_calls(console: Console, version_id: int, found: list[TrainedCall], limit: int) -> None:
    title = f"calls that made version {version_id}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run, its calls", no_wrap=True)  # an id that is cut off is of no use to anybody
    for heading in ("role", "version", "trained", "left out", "why"):
        right = heading in ("version", "trained", "left out")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    run_id = None
    for call in found:
        if call.run_id != run_id:
            run_id = call.run_id
            table.add_row(escape(run_id), style="bold")
        sampled_by = "" if call.version_id is None else str(call.version_id)
        tokens = (str(call.trained_tokens), str(call.excluded_tokens))
        cells = (f" {call.call_id}", call.role or "", sampled_by, *tokens, ", ".join(call.reasons))
        table.add_row(*map(escape, cells))
    console.print(table)
    if len(found) == limit:
        console.print(escape(f"the next page: --calls --after {found[-1].call_id}"), highlight=False)


def _made_from(made: MadeFrom) -> str:
    left_out = f", {made.excluded_tokens} left out" if made.excluded_tokens else ""
    return f"{made.trained_tokens} trained tokens of {made.choices} answers in {made.runs} runs{left_out}"
