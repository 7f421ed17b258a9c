"""`tracegrad pin`: hold serving at a version while training goes on.

The pin is a row in the store, which refuses every other publish from then on; a trainer at work writes down what it
therefore skips. A version that is not live is published first, as by `tracegrad rollback`. `--off` lets the newest
version be published again: by the trainer where one is at work, else here, through the gate where there is one.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from tracegrad.tracestore.config import DEFAULT_FILE, Config, load_config
from tracegrad.tracestore.errors import Conflict, NotFound, TraceStoreError
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.adapter_client import engine_clients
from tracegrad.trainer.errors import JobBusy, TrainerError
from tracegrad.trainer.gate import version_to_serve
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.publish import Publisher

CONFIG = click.option(
    "--config", "config_path", default=DEFAULT_FILE, show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)


@click.command()
@click.argument("version", type=int, required=False)
@click.option("--off", is_flag=True, help="Take the pin off, and publish the newest version.")
@click.option("--model", help="Whose pin to take off. Default: the trained model that is pinned.")
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def pin(version: int | None, off: bool, model: str | None, config_path: Path, as_json: bool) -> None:
    """Hold serving at VERSION, whatever is trained meanwhile; --off publishes the newest again.

    The trainer goes on training and committing; what it does not publish is listed as skipped by `tracegrad versions`.
    """
    if (version is None) != off:
        raise click.UsageError("name a VERSION to hold serving at (`tracegrad versions` lists them), or give --off")
    try:
        config = load_config(config_path)
        store = open_store(config.store, create=False)
        try:
            done = unpin(store, config, model) if version is None else hold_at(store, config, version)
        finally:
            store.close()
    except (TraceStoreError, TrainerError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(json.dumps(done) if as_json else done["said"])


def hold_at(store: Store, config: Config, version_id: int) -> dict[str, Any]:
    """Pin the model of a version at it, and make it live if it is not.

    Raises:
        NotFound: no such version, or the configuration has no model of that name.
        Conflict: it is abandoned, or another publish is unfinished.
        PublishFailed, PublishRejected: it did not reach the engine; the pin is as it was.
    """
    model = store.get_version(version_id).model
    if model not in config.models:
        raise NotFound(f"version {version_id} is of model {model!r}, which the configuration does not have")
    with moved_pin(store, version_id, "tracegrad pin"):
        live = store.live_version(model)
        if live is None or live.version_id != version_id:
            publisher(store, config, model).publish(version_id)
    said = f"serving of {model!r} is held at version {version_id}; `tracegrad pin --off` ends that"
    return {"model": model, "pinned": version_id, "published": None, "said": said}


def unpin(store: Store, config: Config, model: str | None) -> dict[str, Any]:
    """Take the pin off; publish the newest version here where no trainer is at work that will.

    Raises:
        Conflict: there is no pin, or nobody said whose of several models.
        PublishFailed, PublishRejected: the newest version did not go live. The pin is off all the same.
    """
    trained = config.trained_models()
    pinned = [name for name in trained if store.pinned(name) is not None] or list(trained)
    if model is None and len(pinned) > 1:
        raise Conflict(f"say whose pin: --model {' or '.join(pinned)}")
    model = model or pinned[0]
    was = store.unpin(model, "tracegrad pin --off")
    if was is None:
        raise Conflict(f"model {model!r} is not pinned")
    done: dict[str, Any] = {"model": model, "pinned": None, "published": None}
    kept = [v for v in versions_to_serve(store, model) if not v.abandoned and v.kind != "canary"]
    newest, live = version_to_serve(store, kept[-1]), store.live_version(model)
    if live is not None and newest.version_id == live.version_id:
        return done | {"said": f"the pin is off; version {live.version_id} is the newest to serve, and live already"}
    try:
        with JobFolder(config.trainer).held():
            publisher(store, config, model).publish(newest.version_id)
    except JobBusy:
        return done | {"said": f"the pin is off; the trainer publishes version {newest.version_id} or a newer one"}
    return done | {
        "published": newest.version_id,
        "said": f"the pin is off, and version {newest.version_id} is live",
    }


def versions_to_serve(store: Store, model: str) -> list[PolicyVersion]:
    """Return the versions of a model, oldest first, without those of jobs that publish nothing.

    What `tracegrad train --offline --job other` made is newer than what serves, and was never meant to serve.
    """
    kept = store.list_versions(model)
    publishing = {each.version_id for each in store.list_publishes(model)}
    jobs = {version.job_id for version in kept if version.version_id in publishing}
    return [version for version in kept if version.job_id in jobs]


@contextmanager
def moved_pin(store: Store, version_id: int, reason: str) -> Iterator[None]:
    """Pin the version for what follows and from then on; where that fails, the pin is what it was before."""
    model = store.get_version(version_id).model
    before = store.pinned(model)
    store.pin_version(version_id, reason)
    done = False
    try:
        yield
        done = True
    finally:
        if not done and before is None:
            store.unpin(model, f"{reason} failed")
        elif not done and before is not None:
            with suppress(Conflict):  # its publish is unfinished: whoever recovers it makes the version live after all
                store.pin_version(before, f"{reason} failed")


def publisher(store: Store, config: Config, model: str) -> Publisher:
    """Return what publishes to the engines of a model."""
    return Publisher(
        store,
        model,
        engine_clients(config, model),
        config.trainer.publish,
        heartbeat_expires_s=config.proxy.heartbeat_expires_s,
        judged=config.trained_models(),
    )
