"""An engine and a proxy of one's own for a checkpoint: started on free ports, gone afterwards.

The store is temporary and nothing trains. Without a configuration every role is served by the one model; with one, its
roles, models and engine settings hold and the trained models' weights are the checkpoint's: the folder of a step has
one for each of them. Adapters are live in the temporary store, so that the engine starts with them. Refuses a folder
that holds no Hugging Face checkpoint, or not those of all trained models. Called by `tracegrad eval --checkpoint`.
"""

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tracegrad.adapters.rollout_errors import ServingError
from tracegrad.adapters.supervisor import ChildGaveUp, ChildSpec, Event, RestartPolicy, Supervisor
from tracegrad.adapters.up import child_specs
from tracegrad.tracestore.config import Config, EngineConfig, ModelConfig, ProxyConfig, dump_config
from tracegrad.tracestore.records import PublishState
from tracegrad.tracestore.store import open_store

_LOG_TAIL = 15
_TO_LIVE: tuple[PublishState, ...] = ("draining", "swapping", "live")


def serving_config(checkpoint: Path, config: Config | None, folder: Path) -> Config:
    """Return a configuration that serves `checkpoint` on free ports, with its store and logs under `folder`.

    Raises:
        ServingError: as `weights_in`.
    """
    given = config or Config(models={"main": ModelConfig(checkpoint=str(checkpoint))}, roles={"*": "main"})
    weights = weights_in(checkpoint, given)
    models = {
        name: model
        if model.adapter is not None
        else msgspec.structs.replace(
            model,
            checkpoint=str(weights[name]) if name in weights else model.checkpoint,
            engine=_engine_of_our_own(model.engine) if model.api is None else model.engine,
            replicas=(),
        )
        for name, model in given.models.items()
    }
    proxy = msgspec.structs.replace(given.proxy, host=ProxyConfig().host, port=free_port())
    publish = msgspec.structs.replace(given.trainer.publish, canary=False, gate=None)
    trainer = msgspec.structs.replace(given.trainer, output=str(folder), publish=publish)
    store = f"sqlite:///{folder}/eval.db"
    return msgspec.structs.replace(given, models=models, proxy=proxy, trainer=trainer, store=store)


def weights_in(checkpoint: Path, config: Config) -> dict[str, Path]:
    """Return the folder of each trained model: its subfolder of a step, or the folder itself where it is the only one.

    Raises:
        ServingError: a model's weights are not there.
    """
    trained, checkpoint = config.trained_models(), checkpoint.resolve()
    found = {name: checkpoint / name for name in trained}
    if all(map(_has_weights, found.values())) and found:
        return found
    if not _has_weights(checkpoint):
        raise ServingError(f"{checkpoint} is not a checkpoint in Hugging Face format: it has no config.json")
    if len(trained) > 1:
        raise ServingError(
            f"{checkpoint} holds one model, and the configuration trains {', '.join(trained)}: name the folder of the "
            "step, which has one for each"
        )
    return dict.fromkeys(trained, checkpoint)


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))


def _bring_live(config: Config, adapters: Mapping[str, Path]) -> None:
    """Write down that these adapters are live: the engine loads what is, when it starts."""
    with contextlib.closing(open_store(config.store)) as store:
        for name, folder in adapters.items():
            version = store.add_version(
                model=name,
                kind="initial",
                parent_id=None,
                checkpoint_path=str(folder),
                checkpoint_hash=folder.parent.name,
                step=0,
                job_id=None,
            )
            publish_id = store.request_publish(version.version_id).publish_id
            for state in _TO_LIVE:
                store.advance_publish(publish_id, state)


@contextmanager
def serving(
    checkpoint: Path,
    config: Config | None,
    *,
    say: Callable[[str], None] = lambda text: None,
    specs: Callable[..., tuple[ChildSpec, ...]] = child_specs,
) -> Iterator[str]:
    """Serve `checkpoint` for the body; yields the proxy's root URL.

    Raises:
        ServingError: the engine or the proxy did not come up; the message ends with the last lines of its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="tracegrad-eval-"))
    own = serving_config(checkpoint, config, folder)
    path = folder / "tracegrad.yaml"
    path.write_text(dump_config(own))
    of_adapters = {name: model for name, model in own.models.items() if model.adapter is not None and model.trained}
    if config is not None and of_adapters:
        weights = weights_in(checkpoint, config)
        _bring_live(own, {name: weights[name] for name in of_adapters if name in weights})
    tail: list[str] = []

    def hear(event: Event) -> None:
        if event.kind == "log":
            tail.append(event.detail)
            del tail[:-_LOG_TAIL]
        else:
            say(f"{event.child}: {event.kind} {event.detail}".rstrip())

    policy = RestartPolicy(max_restarts=0, stop_timeout_s=20.0)
    supervisor = Supervisor(specs(own, path, train=False), log_dir=folder / "logs", policy=policy, emit=hear)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        cleanup.callback(supervisor.stop)
        try:
            supervisor.start()
        except ChildGaveUp as error:
            raise ServingError("\n  ".join([f"cannot serve {checkpoint}: {error}", *tail])) from error
        yield f"http://{own.proxy.host}:{own.proxy.port}"


def _engine_of_our_own(engine: EngineConfig) -> EngineConfig:
    url = f"http://127.0.0.1:{free_port()}"
    return msgspec.structs.replace(engine, url=url, bind=None, external=False, log=None)


def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
