"""Where a training job keeps its files, and the lock that makes it the only trainer there.

`<output>/<job>/checkpoints/step-…`, `metrics.jsonl`, `tensorboard/`, `canary/` (removed after use), `lock`. The lock
is the kernel's (flock): it ends with the process, however that ends. Called by the trainer's command.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracegrad.tracestore.config import TrainerConfig
from tracegrad.trainer.errors import JobBusy


class JobFolder:
    """The paths of one job."""

    def __init__(self, config: TrainerConfig) -> None:
        self.path = Path(config.output) / config.job
        self.checkpoints = self.path / "checkpoints"
        self.canary = self.path / "canary"

    @contextmanager
    def held(self) -> Iterator["JobFolder"]:
        """Hold the job while it is trained.

        Raises:
            JobBusy: another process on this machine holds it.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise JobBusy(
                    f"another trainer (process {holder}) holds {self.path}: stop it, or give this job another name"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield self
