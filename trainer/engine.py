"""One engine as a process of its own: started, watched, restarted on the live weights, stopped with all its children.

Refuses a port that something already listens on, and an engine that dies or does not become healthy in time: then
it says so with the last lines of the engine's log. The process dies with its owner (see `engine_guard`). Torch-free;
talks to the engine over HTTP only. Called by `tracegrad engine`, and by tests and demos that own an engine.
"""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from tracegrad.tracestore.config import ModelConfig
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.trainer import engine_guard, engine_launch
from tracegrad.trainer.adapter_client import AdapterClient
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineStartFailed
from tracegrad.trainer.errors import EngineError

LOG_TAIL_LINES = 15
_GRACE_S = 8.0
_PROGRESS_S = 5.0
_HEALTH_POLL_S = 0.2


def _silent(_message: str) -> None:
    """Say nothing."""


class EngineProcess:
    """The engine of the model `name`.

    `live` returns the version whose checkpoint is to be served (None: the model's own checkpoint), `adapters` those of
    the adapters on it, by name; both are asked at each start, so that an engine that died comes back with the last
    committed weights. `say` gets progress lines. May be used as a context manager: started on entry, stopped on exit.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        *,
        live: Callable[[], PolicyVersion | None] | None = None,
        adapters: Callable[[], Mapping[str, PolicyVersion]] = dict,
        say: Callable[[str], None] = _silent,
        max_failed_starts: int = 5,
        label: str | None = None,
    ) -> None:
        self.name = name
        self.label = label or name
        """What messages call it: replicas share the name."""
        self.model = model
        self.client = EngineClient(model.engine.url, name)
        self.restarts = 0
        self.start_s = 0.0
        """Seconds the last start took, from spawning to the first healthy answer."""
        self._live = live or (lambda: None)
        self._adapters = adapters
        self._say = say
        self._max_failed_starts = max_failed_starts
        self._guard: subprocess.Popen[str] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._log: Path | None = None
        self._engine_pid: int | None = None
        self._wanted = False
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def log_path(self) -> Path | None:
        """Where the engine's output goes; None before the first start."""
        return self._log

    @property
    def pid(self) -> int | None:
        """Process id (and process group) of the engine's server, None when it does not run."""
        return self._engine_pid if self._guard is not None and self._guard.poll() is None else None

    def start(self) -> None:
        """Start the engine and wait until it is healthy and marked with its version.

        Raises:
            EngineStartFailed: port taken, command not found, process dead, or not healthy in `start_timeout_s`.
            EngineError: it cannot be told the version it serves.
        """
        if self.pid is not None:
            raise EngineStartFailed(f"engine {self.label} already runs (process {self.pid}): stop it first")
        self._wanted = True
        self._start()

    def stop(self) -> None:
        """Stop the engine and all its children; returns when they are gone. Harmless when it does not run."""
        self._wanted = False
        self._clear()

    def watch(self, until: threading.Event) -> None:
        """Keep the engine up until `until` is set; blocks. Restarts it with back-off when it dies.

        Raises:
            EngineError: `max_failed_starts` starts in a row failed; the message is the last one's.
        """
        failed = 0
        while not until.wait(0.5):
            if not self._wanted or self.pid is not None:
                continue
            if failed == 0:
                self._say(f"engine {self.label}: died; restarting. The end of its log:\n{self.tail()}")
            try:
                self._start()
            except EngineError as error:
                failed += 1
                if failed >= self._max_failed_starts:
                    raise
                pause_s = min(2.0 ** (failed - 1), 30.0)
                self._say(f"engine {self.label}: {error}\nnext try in {pause_s:.0f} s (failed {failed} times)")
                until.wait(pause_s)
            else:
                failed = 0
                self.restarts += 1

    def tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """Return the last lines of the engine's log."""
        if self._log is None or not self._log.exists():
            return "(no log)"
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - 64 * 1024))
            text = log.read().decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:]) or "(empty log)"

    def _start(self) -> None:
        started = time.monotonic()
        with self._lock:
            self._clear()
            version, adapters = self._live(), self._adapters()
            checkpoint = version.checkpoint_path if version else self.model.checkpoint
            for each in (*(() if version is None else (version,)), *adapters.values()):
                self._refuse_gone(each)
            with contextlib.ExitStack() as undo:
                undo.callback(self._clear)
                self._spawn(checkpoint, {name: each.checkpoint_path for name, each in adapters.items()})
                self._wait_healthy(started)
                self._catch_up(version)
                undo.pop_all()
            self.start_s = time.monotonic() - started
        beside = "".join(f", {name} from {each.checkpoint_path}" for name, each in adapters.items())
        self._say(
            f"engine {self.label}: up after {self.start_s:.0f} s at {self.client.url}, serving {checkpoint}{beside}"
        )

    def _refuse_gone(self, version: PolicyVersion) -> None:
        if not Path(version.checkpoint_path).is_dir():
            raise EngineStartFailed(
                f"engine {self.label}: the folder of the live version {version.version_id}, {version.checkpoint_path}, "
                "is gone: put it back, or `tracegrad rollback` to a version whose folder is there"
            )

    def _spawn(self, checkpoint: str, adapters: Mapping[str, str]) -> None:
        """Start the guard and, through it, the engine. The log is appended to, never truncated."""
        config = self.model.engine
        config = msgspec.structs.replace(config, args=(*engine_launch.lora_modules(adapters), *config.args))
        host, port = engine_launch.address(config)
        _refuse_taken_port(self.label, self.name, host, port)
        self._scratch = tempfile.TemporaryDirectory(prefix="tracegrad-engine-")
        scratch = Path(self._scratch.name)
        if self._log is None:
            handle, default = tempfile.mkstemp(prefix=f"tracegrad-engine-{self.label}-", suffix=".log")
            os.close(handle)
            self._log = Path(config.log or default)
            self._log.parent.mkdir(parents=True, exist_ok=True)
        command = engine_launch.command(self.name, checkpoint, self.model.checkpoint, config)
        guarded = [sys.executable, "-S", "-E", engine_guard.__file__, str(os.getpid()), str(_GRACE_S), "--", *command]
        with self._log.open("ab") as log:
            log.write(f"\n[tracegrad] {shlex.join(command)}\n".encode())
            log.flush()
            self._guard = subprocess.Popen(
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=engine_launch.environment(config, engine_launch.lay_out_extension(scratch)),
                start_new_session=True,
                text=True,
            )
        assert self._guard.stdout is not None
        announced = self._guard.stdout.readline().strip()
        if not announced:
            raise EngineStartFailed(f"engine {self.label}: cannot run {command[0]!r}:\n{self.tail()}")
        self._engine_pid = int(announced)

    def _wait_healthy(self, started: float) -> None:
        """Wait for `/health`, with a progress line every few seconds."""
        timeout_s = self.model.engine.start_timeout_s
        told = started
        while not self.client.healthy():
            now = time.monotonic()
            if not self._wanted:
                raise EngineStartFailed(f"engine {self.label} was stopped while it started")
            if self._guard is None or self._guard.poll() is not None:
                raise EngineStartFailed(
                    f"engine {self.label} died while starting; the end of {self._log}:\n{self.tail()}"
                )
            if now - started > timeout_s:
                raise EngineStartFailed(
                    f"engine {self.label} is not healthy after {timeout_s:.0f} s; "
                    f"the end of {self._log}:\n{self.tail()}"
                )
            if now - told >= _PROGRESS_S:
                told = now
                self._say(f"engine {self.label}: starting, {now - started:.0f} s  {self.tail(1)[:100]}")
            time.sleep(_HEALTH_POLL_S)

    def _catch_up(self, version: PolicyVersion | None) -> None:
        """Mark the engine with what it serves; where another version went live meanwhile, load that one."""
        serving = version
        while True:
            newest = self._live()
            if newest is not None and (serving is None or newest.version_id != serving.version_id):
                self.client.reload(newest.checkpoint_path)
                self.client.reset_prefix_cache()
                serving = newest
                continue
            if serving is not None:
                self.client.set_version(str(serving.version_id))
            break
        for name, each in self._adapters().items():
            adapter = AdapterClient(self.client.url, name, self.name)
            if not adapter.serves(each.checkpoint_path, str(each.version_id)):
                adapter.swap(each.checkpoint_path, str(each.version_id))

    def _clear(self) -> None:
        """End the process, if there is one, and wait until it and its children are gone."""
        guard = self._guard
        if guard is not None and guard.poll() is None:
            guard.terminate()
        with self._lock:
            guard, self._guard, self._engine_pid = self._guard, None, None
            if guard is not None:
                try:
                    guard.wait(_GRACE_S + 5)
                except subprocess.TimeoutExpired:
                    guard.kill()
                    guard.wait()
                assert guard.stdout is not None
                guard.stdout.close()
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None


def _refuse_taken_port(label: str, name: str, host: str, port: int) -> None:
    """Raise where something listens on the port: a health check would take it for ours."""
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineStartFailed(
                f"engine {label}: {host}:{port} is taken ({error.strerror}). Stop what listens there, "
                f"or set another port in models.{name}.engine.url (or replicas)"
            ) from error
