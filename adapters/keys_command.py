"""`tracegrad keys create | list | revoke`: who may talk to the proxy.

Writes to the store itself, so it needs no proxy; a running proxy sees a new key at once and a revoked one within
seconds. The text of a key is printed once, by `create`. Refuses a role that the configuration does not know.
"""

import difflib
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from tracegrad.adapters.opening import read_config, which_store
from tracegrad.adapters.scope import ENV_API_KEY
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import KEY_SCOPES, ApiKey, KeyScope
from tracegrad.tracestore.store import Store, open_store


@click.group()
def keys() -> None:
    """Make, list and revoke API keys of the proxy.

    \b
    call    model calls; runs and spans of the app that makes them
    reward  rewards
    read    runs, groups, the trainer's backlog, metrics
    train   tasks and groups: what a rollout plans (it needs call, reward and read too)
    admin   all of these
    """


@keys.command()
@which_store
@click.option("--scope", "scopes", type=click.Choice(KEY_SCOPES), multiple=True, required=True, help="May be repeated.")
@click.option("--name", default="", help="For people: who has it, and what for.")
@click.option("--project", help="Where its calls belong. Default: the configuration's project.")
@click.option("--run", "run_id", help="The run of calls that name none.")
@click.option("--role", help="The role of calls that name none.")
def create(
    *,
    path: Path | None,
    url: str | None,
    as_json: bool,
    scopes: tuple[KeyScope, ...],
    name: str,
    project: str | None,
    run_id: str | None,
    role: str | None,
) -> None:
    """Make a key and print it, this once.

    \b
    tracegrad keys create --scope call --role planner
    """
    config = read_config(path, url)
    _check_role(config, role)
    store = open_store(config.store)
    try:
        text, key = store.create_key(
            scopes=scopes, project=project or config.project, name=name, run_id=run_id, role=role
        )
    finally:
        store.close()
    if as_json:
        click.echo(json.dumps({"key": text, **asdict(key)}))
        return
    click.echo(text)
    click.echo(f"{key.key_id}: {_bounds(key)}.", err=True)
    click.echo(f"Only its hash is stored: keep it now. Apps read it from {ENV_API_KEY} or OPENAI_API_KEY.", err=True)


@keys.command("list")
@which_store
def list_(*, path: Path | None, url: str | None, as_json: bool) -> None:
    """List the keys: what each may do, never its text."""
    store = _existing(path, url)
    try:
        found = store.list_keys()
    finally:
        store.close()
    if as_json:
        click.echo(json.dumps([asdict(key) for key in found]))
        return
    if not found:
        click.echo("no keys; make one with `tracegrad keys create --scope call`")
        return
    for key in found:
        click.echo(_line(key))


@keys.command()
@which_store
@click.argument("key_id")
def revoke(*, path: Path | None, url: str | None, as_json: bool, key_id: str) -> None:
    """Revoke a key for good; running proxies refuse it within seconds."""
    store = _existing(path, url)
    try:
        key = store.revoke_key(key_id)
    finally:
        store.close()
    click.echo(json.dumps(asdict(key)) if as_json else f"{key.key_id} is revoked since {_time(key.revoked_at)}")


def _line(key: ApiKey) -> str:
    """A key on a line, however wide the terminal."""
    words = [f"{key.key_id}  {_bounds(key)}", f"made {_time(key.created_at)}"]
    if key.name:
        words.insert(1, repr(key.name))
    if key.revoked_at is not None:
        words.append(f"revoked {_time(key.revoked_at)}")
    return "; ".join(words)


def _bounds(key: ApiKey) -> str:
    words = [", ".join(key.scopes), f"project {key.project}"]
    words += [f"{what} {value}" for what, value in (("run", key.run_id), ("role", key.role)) if value is not None]
    return "; ".join(words)


def _check_role(config: Config, role: str | None) -> None:
    if role is None or not config.roles or role in config.roles or "*" in config.roles:
        return
    close = difflib.get_close_matches(role, list(config.roles), n=3) or list(config.roles)
    raise click.UsageError(f"the configuration has no role {role!r}; did you mean {', '.join(close)}?")


def _existing(path: Path | None, url: str | None) -> Store:
    return open_store(read_config(path, url).store, create=False)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
