"""`tracegrad engine`: start the configured engines, check them, watch them until told to stop.

Exit codes: 0 stopped by Ctrl-C or SIGTERM (or, with `--preflight`, everything is in order); 1 an engine cannot be
started, or died too often; 2 the command line or the configuration is wrong; 3 the preflight found something missing.
No torch: the engine is a process of its own.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import msgspec

from tracegrad.tracestore.config import DEFAULT_FILE, Config, ModelConfig, check_checkpoint, load_config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer import engine_launch
from tracegrad.trainer.adapter_client import engine_clients
from tracegrad.trainer.engine import EngineProcess
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineNotReady
from tracegrad.trainer.errors import EngineError
from tracegrad.trainer.preflight import check

START_FAILED, USAGE, NOT_READY = 1, 2, 3


@click.command()
@click.option(
    "--config", "config_path", default=DEFAULT_FILE, show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)
@click.option("--model", "model_name", help="Only the engine of this model. Default: every model's.")
@click.option("--preflight", "only_check", is_flag=True, help="Start nothing: check the engines that run.")
def engine(config_path: Path, model_name: str | None, only_check: bool) -> None:
    """Start the engines (vLLM) of the configuration and keep them up, on the newest live weights."""
    try:
        config = load_config(config_path)
        models = _chosen(config, model_name, startable=not only_check)
        if only_check:
            for name, model in models.items():
                adapters = [other for other in config.models if config.held_by(other) == name != other]
                for client in (each for trained in (adapters or [name]) for each in engine_clients(config, trained)):
                    in_flight = config.publishes_in_flight and model.trained
                    check(client, model, in_flight=in_flight, slots=config.adapter_slots(config.held_by(name)))
                    click.echo(f"engine {name} at {client.url} is ready for training" + _of(client, name))
            return
        _serve(config, models)
    except EngineNotReady as error:
        _fail(error, NOT_READY)
    except EngineError as error:
        _fail(error, START_FAILED)
    except TraceStoreError as error:
        _fail(error, USAGE)


def _of(client: EngineClient, name: str) -> str:
    return "" if client.name == name else f" of the adapter {client.name}"


def _chosen(config: Config, name: str | None, *, startable: bool) -> Mapping[str, ModelConfig]:
    """Return the models meant; with `startable`, without those whose engine is somebody else's."""
    if not config.models:
        raise click.UsageError("the configuration has no models: add `models: {main: {checkpoint: FOLDER}}`")
    if name is not None and name not in config.models:
        raise click.UsageError(f"the configuration has no model {name!r} (it has {', '.join(config.models)})")
    named = {key: model for key, model in config.models.items() if name in (None, key)}
    served = {key: model for key, model in named.items() if model.api is None and model.adapter is None}
    if not served and (on := [model.adapter.of for model in named.values() if model.adapter is not None]):
        raise click.UsageError(f"{', '.join(named)} is an adapter: the engine of {on[0]} serves it")
    if not served:
        raise click.UsageError(f"{', '.join(named)} is served by an outside API: there is no engine of ours")
    ours = {key: model for key, model in served.items() if not (startable and model.engine.external)}
    if not ours:
        raise click.UsageError(f"engine.external says that {', '.join(served)} is not ours to start; try --preflight")
    return ours


def _serve(config: Config, models: Mapping[str, ModelConfig]) -> None:
    """Start, check and watch; returns when told to stop, raises the first engine's error."""
    for name, model in models.items():
        check_checkpoint(name, model)  # its tokenizer is used whatever weights are live
    signal.signal(signal.SIGTERM, _interrupt)
    stop = threading.Event()
    failures: list[EngineError] = []
    with ExitStack() as stack:
        store = open_store(config.store)
        stack.callback(store.close)
        try:
            engines = []
            for process in _processes(config, models, store):
                engines.append(stack.enter_context(process))
                in_flight = config.publishes_in_flight and process.model.trained
                check(process.client, process.model, in_flight=in_flight, slots=config.adapter_slots(process.name))
                _say(f"engine {process.label}: ready (log: {process.log_path})")
            watchers = [threading.Thread(target=_watch, args=(e, stop, failures), daemon=True) for e in engines]
            for watcher in watchers:
                watcher.start()
            while not stop.wait(0.5):
                pass
        except KeyboardInterrupt:
            _say("stopping")
        finally:
            stop.set()
    if failures:
        raise failures[0]


def _processes(config: Config, models: Mapping[str, ModelConfig], store: Store) -> Iterator[EngineProcess]:
    """One process for each engine; replicas are told apart by their number. A base's engine has room for adapters."""
    for name, model in models.items():
        flags = engine_launch.adapter_flags(config.adapters_on(name), config.adapter_slots(name))
        flags += engine_launch.kept_flags(config.proxy.limits.max_kept, model.checkpoint)
        for i, own in enumerate(model.each_engine()):
            engine = msgspec.structs.replace(own.engine, args=(*flags, *own.engine.args))
            each = msgspec.structs.replace(own, engine=engine)
            label = f"{name}-{i}" if model.replicas else name
            live, beside = partial(store.live_version, name), partial(_live_adapters, config, store, name)
            yield EngineProcess(name, each, live=live, adapters=beside, say=_say, label=label)


def _live_adapters(config: Config, store: Store, base: str) -> dict[str, PolicyVersion]:
    """The live versions of the adapters on a base; before a first one is published the base alone is served."""
    found = {name: store.live_version(name) for name in config.models if config.held_by(name) == base != name}
    return {name: version for name, version in found.items() if version is not None}


def _watch(process: EngineProcess, stop: threading.Event, failures: list[EngineError]) -> None:
    try:
        process.watch(stop)
    except EngineError as error:
        failures.append(error)
        stop.set()


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _say(message: str) -> None:
    click.echo(message, err=True)


def _fail(error: Exception, code: int) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(code)
