"""An engine and a proxy of one's own for a checkpoint: started on free ports, gone afterwards.

The store is temporary and nothing trains or publishes. Without a configuration every role is served by the one
model; with one, its roles, models and engine settings hold and the trained model's weights are the checkpoint's.
Refuses a folder that holds no Hugging Face checkpoint. Called by `tracegrad eval --checkpoint`.
"""

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tracegrad.adapters.rollout_errors import ServingError
from tracegrad.adapters.supervisor import ChildGaveUp, ChildSpec, Event, RestartPolicy, Supervisor
from tracegrad.adapters.up import child_specs
from tracegrad.tracestore.config import Config, EngineConfig, ModelConfig, ProxyConfig, dump_config

_LOG_TAIL = 15


def serving_config(checkpoint: Path, config: Config | None, folder: Path) -> Config:
    """Return a configuration that serves `checkpoint` on free ports, with its store and logs under `folder`.

    Raises:
        ServingError: the checkpoint has no config.json.
    """
    if not (checkpoint / "config.json").is_file():
        raise ServingError(f"{checkpoint} is not a checkpoint in Hugging Face format: it has no config.json")
    given = config or Config(models={"main": ModelConfig(checkpoint=str(checkpoint))}, roles={"*": "main"})
    trained = given.trainer.model
    models = {
        name: msgspec.structs.replace(
            model,
            checkpoint=str(checkpoint.resolve()) if name == trained else model.checkpoint,
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
