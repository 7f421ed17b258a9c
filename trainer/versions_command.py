"""`tracegrad versions` and `tracegrad rollback`: which weights were published, and going back to older ones.

`versions` only reads the store. `rollback` publishes an older committed version again, through the same state machine
as the trainer (a new publish of the same version: ids are never reused), and marks the newer versions abandoned; what
they sampled stays valid off-policy data. It refuses while another publish is unfinished. No torch, hence no probe: the
engine must have tracegrad's worker extension where the head is tied.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from tracegrad.tracestore.config import Config, load_config
from tracegrad.tracestore.errors import Conflict, NotFound, TraceStoreError
from tracegrad.tracestore.records import PolicyVersion, Publish
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.engine_client import engine_clients
from tracegrad.trainer.errors import TrainerError
from tracegrad.trainer.publish import Publisher

_CONFIG = click.option(
    "--config", "config_path", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The YAML file."
)


@click.command()
@_CONFIG
@click.option("--model", help="Only the versions of this model.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on standard output.")
def versions(config_path: Path, model: str | None, as_json: bool) -> None:
    """List the policy versions with their publishes: state, times, what the probe saw."""
    try:
        store = open_store(load_config(config_path).store, create=False)
        try:
            rows = describe(store, model)
        finally:
            store.close()
    except TraceStoreError as error:
        _fail(error)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        Console().print(_table(rows))


@click.command()
@click.argument("version", type=int)
@_CONFIG
def rollback(version: int, config_path: Path) -> None:
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
    newer = ", ".join(str(v) for v in abandoned) or "none"
    click.echo(f"version {version} is live again; abandoned: {newer}")


def describe(store: Store, model: str | None = None) -> list[dict[str, Any]]:
    """Return every version, oldest first, as a JSON object with its publishes under ``publishes``."""
    publishes = store.list_publishes(model)
    live = {name: store.live_version(name) for name in {p.model for p in publishes}}
    return [_row(version, publishes, live.get(version.model)) for version in store.list_versions(model)]


def roll_back(store: Store, config: Config, version_id: int) -> list[int]:
    """Make an older version live again; return the ids of the newer versions of its model, now abandoned.

    Raises:
        NotFound: no such version, or the configuration has no model of that name.
        Conflict: it never was live, is abandoned, is live already, or another publish is unfinished.
        PublishFailed: it did not reach the engine; nothing is abandoned then.
    """
    version = store.get_version(version_id)
    if version.model not in config.models:
        raise NotFound(f"version {version_id} is of model {version.model!r}, which the configuration does not have")
    if all(p.state != "live" for p in store.list_publishes(version.model) if p.version_id == version_id):
        raise Conflict(f"version {version_id} never was live: `tracegrad versions` lists those that were")
    live = store.live_version(version.model)
    if live is not None and live.version_id == version_id:
        raise Conflict(f"version {version_id} is live already")
    publisher = Publisher(
        store,
        version.model,
        engine_clients(config, version.model),
        config.trainer.publish,
        heartbeat_expires_s=config.proxy.heartbeat_expires_s,
    )
    publisher.publish(version_id)
    newer = [v for v in store.list_versions(version.model) if v.version_id > version_id and not v.abandoned]
    for each in newer:
        store.abandon_version(each.version_id)
    return [each.version_id for each in newer]


def _row(version: PolicyVersion, publishes: Sequence[Publish], live: PolicyVersion | None) -> dict[str, Any]:
    mine = [asdict(p) for p in publishes if p.version_id == version.version_id]
    return {**asdict(version), "live": live is not None and live.version_id == version.version_id, "publishes": mine}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="policy versions")
    for name in ("version", "model", "kind", "step", "parent", "state", "published", "total s", "probe", "mean |d|"):
        table.add_column(
            name, justify="right" if name in ("version", "step", "parent", "total s", "mean |d|") else "left"
        )
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    last = row["publishes"][-1] if row["publishes"] else None
    state = "abandoned" if row["abandoned"] else "LIVE" if row["live"] else last["state"] if last else "never published"
    report = (last and last["probe"]) or {}
    seen = report.get("result") or {}
    at = max(last["entered"].values()) if last else None
    return [
        str(row["version_id"]),
        row["model"],
        row["kind"],
        str(row["step"]),
        "" if row["parent_id"] is None else str(row["parent_id"]),
        state,
        "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)),
        f"{report['total_s']:.2f}" if "total_s" in report else "",
        seen.get("verdict") or ("not probed" if last and last["state"] == "live" else ""),
        f"{seen['mean_abs_new']:.2g}" if seen.get("mean_abs_new") is not None else "",
    ]


def _fail(error: Exception) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(1)
