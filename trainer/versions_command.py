"""`tracegrad versions` and `tracegrad rollback`: which weights were published, and going back to older ones.

`versions` only reads the store. `rollback` publishes an older committed version again, through the same state machine
as the trainer (a new publish of the same version: ids are never reused), and marks the newer versions abandoned; what
they sampled stays valid off-policy data. Versions of jobs that publish nothing (`tracegrad train --offline`) are left
alone. Where serving is pinned the pin moves along. It refuses while another publish is unfinished. No torch, hence no
probe: the engine must have tracegrad's worker extension where the head is tied.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console

from tracegrad.tracestore.config import Config, load_config
from tracegrad.tracestore.errors import Conflict, NotFound, TraceStoreError
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.errors import TrainerError
from tracegrad.trainer.pin_command import CONFIG, moved_pin, publisher
from tracegrad.trainer.versions_table import describe, reasons, table


@click.command()
@CONFIG
@click.option("--model", help="Only the versions of this model.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on standard output, with everything that is known.")
def versions(config_path: Path, model: str | None, as_json: bool) -> None:
    """List the policy versions with their publishes: state, times, probe, and what the gate decided."""
    try:
        store = open_store(load_config(config_path).store, create=False)
        try:
            known = {version.model for version in store.list_versions()}
            if model is not None and model not in known:
                raise NotFound(f"no versions of a model {model!r}; the store has those of: {', '.join(sorted(known))}")
            rows = describe(store, model)
        finally:
            store.close()
    except TraceStoreError as error:
        _fail(error)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    console = Console()
    console.print(table(rows))
    for line in reasons(rows):
        console.print(line, markup=False, highlight=False)


@click.command()
@click.argument("version", type=int)
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def rollback(version: int, config_path: Path, as_json: bool) -> None:
    """Publish the older VERSION again and abandon the newer ones."""
    try:
        config = load_config(config_path)
        store = open_store(config.store, create=False)
        try:
            abandoned = roll_back(store, config, version)
        finally:
            store.close()
    except (TraceStoreError, TrainerError) as error:
        _fail(error)
    if as_json:
        click.echo(json.dumps({"live": version, "abandoned": abandoned}))
        return
    newer = ", ".join(str(v) for v in abandoned) or "none"
    click.echo(f"version {version} is live again; abandoned: {newer}")


def roll_back(store: Store, config: Config, version_id: int) -> list[int]:
    """Make an older version live again; return the ids of the newer versions of its model, now abandoned.

    Raises:
        NotFound: no such version, or the configuration has no model of that name.
        Conflict: it never was live, is abandoned, is live already, or another publish is unfinished.
        PublishFailed: it did not reach the engine; nothing is abandoned then, and a pin stays where it was.
    """
    version = store.get_version(version_id)
    if version.model not in config.models:
        raise NotFound(f"version {version_id} is of model {version.model!r}, which the configuration does not have")
    if all(p.state != "live" for p in store.list_publishes(version.model) if p.version_id == version_id):
        raise Conflict(f"version {version_id} never was live: `tracegrad versions` lists those that were")
    live = store.live_version(version.model)
    if live is not None and live.version_id == version_id:
        raise Conflict(f"version {version_id} is live already")
    before = {each.version_id for each in store.list_versions(version.model) if each.abandoned}
    pinned = store.pinned(version.model) is not None
    with moved_pin(store, version_id, "tracegrad rollback") if pinned else nullcontext():
        publisher(store, config, version.model).publish(version_id, goes_back=True)
    newer = [each for each in store.list_versions(version.model) if each.version_id > version_id]
    return [each.version_id for each in newer if each.abandoned and each.version_id not in before]


def _fail(error: Exception) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(1)
