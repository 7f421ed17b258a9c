"""`tracegrad up`: store, engine, proxy, publish gate and trainer as supervised processes; Ctrl-C stops all of them.

It only spawns: engine, proxy, gate and trainer are the commands a person could type. It brings the store's schema up to
date first, starts each child once the one before it answers, restarts what crashes, and gives up with a plain message
when something keeps crashing; without a trainer the rest serves on. The trainer is ready once it can take runs: it says
so in the store. No child outlives it, even if it is killed.
"""

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from tracegrad.adapters.rollout_errors import TaskFileError
from tracegrad.adapters.supervisor import ChildSpec, Event, RestartPolicy, Supervisor, supervise
from tracegrad.adapters.tasks import load_tasks
from tracegrad.tracestore.config import DEFAULT_FILE, Config, check_checkpoint, load_config
from tracegrad.tracestore.errors import ConfigError, TraceStoreError
from tracegrad.tracestore.publishes import UNFINISHED, UNSWAPPED
from tracegrad.tracestore.trainers import NOT_YET

if TYPE_CHECKING:
    from tracegrad.tracestore.store import Store

_COLOURS = {"engine": "magenta", "proxy": "cyan", "gate": "yellow", "train": "green"}
_ENDS = (0, 3, 4)
"""Of the trainer: all steps are done, its publish gate ended it, or it refused a step and would again. In each case the
live version serves on."""
_TRACEGRAD = (sys.executable, "-m", "tracegrad.adapters.cli")


def child_specs(
    config: Config, path: Path, *, train: bool, proxy_options: tuple[str, ...] = ()
) -> tuple[ChildSpec, ...]:
    """Return the commands of a configuration in the order they depend on one another.

    `proxy_options` go to the proxy's command. An engine that is somebody else's (`external`) is neither started nor
    waited for.
    """
    file = ("--config", str(path))
    engines = [
        each.engine for model in config.models.values() for each in model.each_engine() if not each.engine.external
    ]
    specs: list[ChildSpec] = []
    if engines:
        specs.append(
            ChildSpec(
                name="engine",
                command=(*_TRACEGRAD, "engine", *file),
                ready_urls=tuple(f"{engine.url.rstrip('/')}/health" for engine in engines),
                ready_timeout_s=max(engine.start_timeout_s for engine in engines),
            )
        )
    health = f"http://{_reachable(config.proxy.host)}:{config.proxy.port}/health"
    # The proxy is up when it answers; that it is unwell because somebody else's engine is away is not its failure.
    command = (*_TRACEGRAD, "proxy", *file, *proxy_options)
    specs.append(ChildSpec(name="proxy", command=command, ready_urls=(health,), any_answer=True))
    if train and config.trainer.publish.gate is not None:
        specs.append(ChildSpec(name="gate", command=(*_TRACEGRAD, "gate", *file)))
    if train:
        specs.append(
            ChildSpec(
                name="train",
                command=(*_TRACEGRAD, "train", *file),
                ready_when=partial(_trains, config),
                ready_timeout_s=float("inf"),  # it waits for engines of its own accord, and gives up of its own
                may_finish=True,
                final_codes=_ENDS,
                spares_others=partial(_serves_without_trainer, config),
            )
        )
    return tuple(specs)


def _trains(config: Config, started_at: float) -> bool:
    """Whether the trainer that was started then has loaded its weights and proven its engines."""

    def at_work(store: "Store") -> bool:
        found = store.trainer_at_work(config.trainer.job, config.proxy.heartbeat_expires_s)
        return found is not None and found.started_at >= started_at and found.phase not in NOT_YET

    return _said_by_store(config, at_work)


def _serves_without_trainer(config: Config) -> bool:
    """Whether no publish is left half swapped: proxies hold every call until a trainer ends it."""

    def none_half_done(store: "Store") -> bool:
        last = [store.last_publish(model) for model in config.trained_models()]
        return all(one is None or one.state not in UNFINISHED or one.state in UNSWAPPED for one in last)

    return _said_by_store(config, none_half_done)


def _said_by_store(config: Config, asked: "Callable[[Store], bool]") -> bool:
    """Whether it is so; no where the store cannot be read, which whoever needs it will say itself."""
    from tracegrad.tracestore.store import open_store

    try:
        with closing(open_store(config.store, create=False)) as store:
            return asked(store)
    except TraceStoreError:
        return False


def _refuse(config: Config) -> None:
    """Say now what a child would refuse again and again, half a minute of an engine's start later.

    Raises:
        ConfigError: a checkpoint is not there, the key of an outside API is not set, the proxy would be open to all,
            or a port is taken.
        TaskFileError: the gate's tasks cannot be read.
    """
    from tracegrad.adapters.proxy.access import check_address
    from tracegrad.adapters.proxy.outside import outside_apis

    for name, model in config.models.items():
        if model.api is None and model.adapter is None and not model.engine.external:
            check_checkpoint(name, model)
    outside_apis(config, os.environ)
    check_address(config.proxy)
    if config.trainer.publish.gate is not None:
        load_tasks(config.trainer.publish.gate.tasks)
    _refuse_taken_ports(config)


def _refuse_taken_ports(config: Config) -> None:
    """A second `tracegrad up` would load an engine's weights before it found the first one's there."""
    from tracegrad.adapters.proxy.workers import listen

    wanted = [(config.proxy.host, config.proxy.port, "the proxy", "proxy.port")]
    for name, model in config.models.items():
        for each in model.each_engine():
            at = urlsplit(each.engine.url)
            if model.api is None and not each.engine.external and at.port is not None:
                setting = f"models.{name}.engine.url or replicas"
                wanted.append((each.engine.bind or at.hostname or "", at.port, f"an engine of {name}", setting))
    for host, port, who, setting in wanted:
        try:
            listen(host, port).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"{host}:{port} is taken, and {who} is to listen there: is `tracegrad up` running already "
                    f"(`tracegrad status` says)? Stop what listens there, or set another {setting}"
                ) from error


def _reachable(host: str) -> str:
    """Return where a listener on `host` is found from this machine, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def event_printer(*, as_json: bool) -> Callable[[Event], None]:
    """Return what shows events: JSON lines on standard output, or prefixed lines on standard error."""
    return _print_json if as_json else _print_line


def _print_json(event: Event) -> None:
    shown = {key: value for key, value in asdict(event).items() if value is not None}
    if event.kind == "log" and event.detail.startswith("{"):
        try:
            shown["line"] = json.loads(event.detail)
            del shown["detail"]
        except ValueError:
            pass  # it only looks like JSON: the detail stays
    click.echo(json.dumps(shown))


def _print_line(event: Event) -> None:
    prefix = click.style(f"{event.child:>7} |", fg=_COLOURS.get(event.child, "white"))
    if event.kind == "log":
        click.echo(f"{prefix} {event.detail}", err=True)
        return
    colour = "red" if event.kind in ("crashed", "gave up") else "white"
    detail = f": {event.detail}" if event.detail else ""
    click.echo(f"{prefix} {click.style(event.kind + detail, fg=colour, bold=True)}", err=True)


@click.command()
@click.option(
    "--config", "path", default=DEFAULT_FILE, show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)
@click.option("--no-train", is_flag=True, help="Serve and record only.")
@click.option("--exit-with-train", is_flag=True, help="Stop everything when the trainer has ended, with its exit code.")
@click.option("--max-restarts", default=5, show_default=True, help="Crashes of one child in a row before giving up.")
@click.option(
    "--stop-timeout", default=30.0, show_default=True, help="Seconds a child gets to stop before it is killed."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), help="The proxy's log. Default: proxy.log.")
@click.option("--verbose", is_flag=True, help="A log line of the proxy for each call.")
@click.option("--json", "as_json", is_flag=True, help="Events as JSON lines on standard output.")
def up(
    *,
    path: Path,
    no_train: bool,
    exit_with_train: bool,
    max_restarts: int,
    stop_timeout: float,
    log_format: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run store, engine, proxy and trainer together, supervised, until Ctrl-C.

    Logs go to <trainer.output>/logs/. A crashed child is restarted; exit code 1 says that one kept crashing (its last
    line says why: mend that and start `tracegrad up` again). Where it is the trainer, or where it refuses a step, the
    live version is served on until Ctrl-C. `tracegrad status` says how things stand.
    """
    from tracegrad.tracestore.store import open_store

    if no_train and exit_with_train:
        raise click.UsageError("--exit-with-train needs a trainer: drop --no-train")
    try:
        config = load_config(path)
        if not no_train and config.models and not any(model.trained for model in config.models.values()):
            raise click.UsageError("no model of the configuration is trained: add --no-train")
        _refuse(config)
        open_store(config.store).close()
    except (TraceStoreError, TaskFileError) as error:
        raise click.ClickException(str(error)) from error
    options = (*(() if log_format is None else ("--log-format", log_format)), *(("--verbose",) if verbose else ()))
    supervisor = Supervisor(
        child_specs(config, path.resolve(), train=not no_train, proxy_options=options),
        log_dir=Path(config.trainer.output) / "logs",
        policy=RestartPolicy(max_restarts=max_restarts, stop_timeout_s=stop_timeout),
        emit=event_printer(as_json=as_json),
    )
    sys.exit(supervise(supervisor, exit_with="train" if exit_with_train else None))
