"""`tracegrad train`: one training job in the foreground.

Reads configuration, environment and command line once. The first Ctrl-C finishes the step at hand (or leaves at once
where it only waits) and ends with 130; the second drops the step: nothing is lost, the next start trains it again.
Exit codes: 0 done, 1 an error that it says in one paragraph, 2 a wrong command line, 3 the publish gate rejected too
many versions in a row, 4 a step was refused (so it would be again), 130 interrupted.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tracegrad.tracestore.config import Config

EXIT_ERROR, EXIT_GATE, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 3, 4, 130, 143


@click.command(name="train")
@click.option("--config", "path", type=click.Path(dir_okay=False), default="tracegrad.yaml", show_default=True)
@click.option("--steps", type=click.IntRange(min=0), help="Train until this step instead of trainer.steps.")
@click.option("--offline", is_flag=True, help="Train from stored runs; publish nothing, need no engine.")
@click.option("--job", help="Train this job instead of trainer.job: it has a ledger and checkpoints of its own.")
@click.option("--epoch", type=click.IntRange(min=0), help="Train every run once more: it trains once in each epoch.")
@click.option("--since", metavar="AGE|TIME", help="Only runs opened since: 30m, 2h, 7d, or an ISO time.")
@click.option("--until", metavar="AGE|TIME", help="Only runs opened before.")
@click.option("--recorded-model", "recorded_models", multiple=True, help="Offline: train calls of this model as well.")
@click.option("--show-config", is_flag=True, help="Print the resolved configuration and leave.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--ray-address", help="Join this Ray cluster instead of starting a local Ray.")
def train(
    *,
    path: str,
    steps: int | None,
    offline: bool,
    job: str | None,
    epoch: int | None,
    since: str | None,
    until: str | None,
    recorded_models: tuple[str, ...],
    show_config: bool,
    as_json: bool,
    ray_address: str | None,
) -> None:
    """Train models from recorded, rewarded runs and publish each step's weights.

    \b
    tracegrad train --offline --job again --since 7d            stored runs once more, by a job of its own
    tracegrad train --offline --epoch 1                         the same job once more, with newer rewards
    tracegrad train --offline --job split --recorded-model main calls of `main`, by another role map
    """
    from tracegrad.tracestore.config import dump_config, load_config
    from tracegrad.tracestore.errors import TraceStoreError

    try:
        config = load_config(path)
        said = {"epoch": epoch, "since": since, "until": until, "recorded_models": recorded_models or None}
        config = _overridden(config, {"steps": steps, "job": job}, said)
        if show_config:
            click.echo(dump_config(config), nl=False)
            return
        if not config.models:
            raise click.UsageError(f"{path} names no models: there is nothing to train")
        if not any(model.trained for model in config.models.values()):
            raise click.UsageError(f"{path} says `trained: false` of every model: there is nothing to train")
        code = _train(config, offline=offline, as_json=as_json, ray_address=ray_address)
    except TraceStoreError as error:
        click.echo(f"tracegrad train: {error}", err=True)
        code = EXIT_ERROR
    sys.exit(code)


def _overridden(config: "Config", trainer: dict[str, Any], runs: dict[str, Any]) -> "Config":
    """Put what the command line says (what is None it does not say) in place of the file's, under the same checks.

    Raises:
        ConfigError: as for the file.
    """
    import msgspec

    from tracegrad.tracestore.config import parse_config
    from tracegrad.tracestore.moments import iso_time, moment_of

    for name in ("since", "until"):
        if runs[name] is not None:
            runs[name] = iso_time(moment_of(runs[name], f"--{name}", time.time()))
    raw = msgspec.to_builtins(config)
    for section, said in ((raw["trainer"], trainer), (raw["trainer"]["batch"]["runs"], runs)):
        section |= {name: value for name, value in said.items() if value is not None}
    return parse_config(raw, origin="command line")


def _train(config: "Config", *, offline: bool, as_json: bool, ray_address: str | None) -> int:
    """Put the parts together and run the controller; return the exit code."""
    try:
        from tracegrad.trainer.controller import Controller, Surroundings
    except ImportError as error:
        click.echo(f"tracegrad train needs the train extra ({error}): pip install 'tracegrad[train]'", err=True)
        return EXIT_ERROR
    import msgspec

    from tracegrad.tracestore.store import open_store
    from tracegrad.trainer.adapter_client import engine_clients
    from tracegrad.trainer.cpu_flags import slow_bfloat16
    from tracegrad.trainer.crash_points import CrashPoints
    from tracegrad.trainer.errors import NothingToTrain, StepRefused, TrainerError
    from tracegrad.trainer.heartbeat import Heartbeat
    from tracegrad.trainer.job_folder import JobFolder
    from tracegrad.trainer.metrics import Console
    from tracegrad.trainer.ray_groups import ray_groups
    from tracegrad.trainer.trackers import open_trackers

    stop, job = Event(), config.trainer.job
    console = Console(click.echo, steps=config.trainer.steps, as_json=as_json)
    if config.trainer.workers.device == "cpu" and config.trainer.precision == "bf16" and slow_bfloat16():
        console.say(
            "this CPU has no instructions for bfloat16: `trainer.precision: fp32` and, of the models, "
            "`engine: {dtype: float32}` are several times faster here"
        )
    try:
        crash_points = CrashPoints.from_environment(os.environ)
        store = open_store(config.store)
        with contextlib.closing(store), JobFolder(config.trainer).held() as folder, Heartbeat(store, job) as heart:
            if offline:
                store.require_project(config.project)
            trackers = open_trackers(
                config.tracking, folder.path, job=job, settings=msgspec.to_builtins(config.trainer)
            )
            console.say("starting Ray" if ray_address is None else f"joining Ray at {ray_address}")
            with ray_groups(config, address=ray_address) as (workers, _), _signals(stop, console.say):
                around = Surroundings(
                    store=store,
                    workers=workers,
                    folder=folder,
                    console=console,
                    engines={} if offline else {name: engine_clients(config, name) for name in config.trained_models()},
                    trackers=trackers,
                    crash_points=crash_points,
                    stop=stop,
                    phase=heart.enter,
                )
                controller = Controller(config, around)
                step = controller.run()
    except TrainerError as error:
        click.echo(f"tracegrad train: {error}", err=True)
        again = isinstance(error, StepRefused) and not isinstance(error, NothingToTrain)  # those runs are put aside
        return EXIT_REFUSED if again else EXIT_ERROR
    except KeyboardInterrupt:
        console.say("interrupted: a step that was not committed yet was dropped, the next start trains it")
        return EXIT_INTERRUPTED
    if stop.is_set():
        console.say(f"interrupted after step {step}")
        return EXIT_INTERRUPTED
    if controller.gave_up:
        console.say(f"stopped after step {step}: {controller.gave_up}; the live version serves on")
        return EXIT_GATE
    console.say(f"done: step {step} of {config.trainer.steps}")
    return 0


@contextlib.contextmanager
def _signals(stop: Event, say: Callable[[str], None]) -> Iterator[None]:
    """First Ctrl-C: stop after this step. Second: KeyboardInterrupt. Termination: leave now, as the second."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("stopping after this step; Ctrl-C again drops it")

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    former = {
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
