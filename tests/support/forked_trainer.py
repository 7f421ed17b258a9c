"""Trainers in processes of their own that start in no time, so that they can be killed often: forks of a warm one.

As a program it imports the trainer, then forks once for each line `CONFIG POINT:STEP AFTER_S` on its standard input
(`-` for nothing): the child trains with the learner in its own process (no Ray), offline unless it has a publish gate,
and is killed at the named point, or after so many seconds. It prints the child's id, then its exit status (negative:
the signal). `Trainers` is the other end. Used by tests/wire/test_trainer_kill.py and learner/test_gate_killed.py.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from warm import Warm

_LOOK_S = 0.002


class Trainers(Warm):
    """Owns the warm process. A context manager."""

    def __init__(self) -> None:
        super().__init__(__file__)
        self._is_warm = False

    def run(self, config: Path, *, point: str = "-", after_s: float | None = None) -> int:
        """Let one trainer live until its end, a point or a moment; return its exit status, negative for a signal."""
        self._start(config, point, after_s)
        return int(self.hear())

    def run_until(self, config: Path, reached: Callable[[], bool], *, delay_s: float) -> int:
        """Let one trainer live until something is reached (or its end) and a moment longer; return its exit status."""
        pid = self._start(config, "-", None)
        seen = float("inf")
        while time.monotonic() < seen + delay_s and Path(f"/proc/{pid}").exists():
            if seen == float("inf") and reached():
                seen = time.monotonic()
            time.sleep(_LOOK_S)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return int(self.hear())

    def _start(self, config: Path, point: str, after_s: float | None) -> int:
        """Return the id of the process."""
        self.get_warm()
        self.tell(f"{config} {point} {'-' if after_s is None else after_s}")
        return int(self.hear())

    def get_warm(self) -> None:
        """Wait until it has imported what it needs, which it does while the test makes its runs."""
        self._is_warm = self._is_warm or self.hear() == "warm"


def _train(path: str, point: str) -> int:
    from in_process import InProcess

    from tracegrad.tracestore.config import load_config
    from tracegrad.tracestore.store import open_store
    from tracegrad.trainer.adapter_client import engine_clients
    from tracegrad.trainer.controller import Controller, Surroundings
    from tracegrad.trainer.crash_points import CrashPoints
    from tracegrad.trainer.job_folder import JobFolder
    from tracegrad.trainer.metrics import Console

    config = load_config(path)
    store = open_store(config.store)
    online = config.trained_models() if config.trainer.publish.gate is not None else ()
    with JobFolder(config.trainer).held() as folder:
        around = Surroundings(
            store=store,
            workers=InProcess(config),
            folder=folder,
            console=Console(lambda line: None, steps=config.trainer.steps, as_json=False),
            crash_points=CrashPoints.from_environment({"TRACEGRAD_KILL_AT": point}),
            engines={model: engine_clients(config, model) for model in online},
        )
        Controller(config, around).run()
    store.close()
    return 0


def _serve() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import tracegrad.trainer.lora
    import tracegrad.trainer.model_group

    LlamaConfig, LlamaForCausalLM, tracegrad.trainer  # noqa: B018 - imported lazily: now, and not in each child
    print("warm", flush=True)
    for line in sys.stdin:
        path, point, after_s = line.split()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _train(path, "" if point == "-" else point)
            finally:
                os._exit(status)
        print(pid, flush=True)
        print(_end(pid, float("inf" if after_s == "-" else after_s)), flush=True)


def _end(pid: int, after_s: float) -> int:
    """Wait for a child, at most `after_s`: then it is killed."""
    deadline = time.monotonic() + after_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    _serve()
