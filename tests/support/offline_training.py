"""A controller run to its end in this process, without Ray, and where no engine is named without one."""

from collections.abc import Mapping, Sequence
from threading import Event

from in_process import InProcess

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.store import Store
from tracegrad.trainer.controller import Controller, Surroundings
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.metrics import Console
from tracegrad.trainer.worker_groups import WorkerGroups


def train(
    config: Config,
    store: Store,
    workers: WorkerGroups | None = None,
    stop: Event | None = None,
    engines: Mapping[str, Sequence[EngineClient]] | None = None,
) -> list[str]:
    """Run a controller to its end; return what it said. `engines`: model -> those that serve it."""
    said: list[str] = []
    with JobFolder(config.trainer).held() as folder:
        around = Surroundings(
            store=store,
            workers=workers or InProcess(config),
            folder=folder,
            console=Console(said.append, steps=config.trainer.steps, as_json=False),
            stop=stop or Event(),
            engines=engines or {},
        )
        Controller(config, around).run()
    return said
