"""Child processes kept running: started in order, watched, restarted with back-off, stopped in reverse.

Each child runs under a keeper (see `keeper`), writes to a log file of its own (or where we write), and is ready when
its health URLs answer. Refuses to go on with a child that crashes `max_restarts` times in a row. It knows nothing of
what the children are. Used by `tracegrad up`, by evaluations that start an engine and a proxy of their own, and by a
proxy of several processes. Call it from the main thread: a keeper dies with the thread that started it.
"""

import contextlib
import http.client
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from tracegrad.adapters.keeper import keeper_command

_LONGEST_LAST_WORDS = 400
ChildState = Literal["waiting", "starting", "ready", "backing off", "done", "given up", "stopped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """A command to keep running. With `may_finish`, one of `final_codes` is its normal end, not a crash.

    When it keeps crashing it stays down alone if `spares_others` says then that the others can do without it.
    It is ready when every one of `ready_urls` answers: 200, or whatever it says with `any_answer`; of `unix:PATH`, when
    somebody listens there; and `ready_when` says so of the Unix time at which it was started.
    """

    name: str
    command: tuple[str, ...]
    ready_urls: tuple[str, ...] = ()
    any_answer: bool = False
    ready_when: Callable[[float], bool] = lambda _started: True
    ready_timeout_s: float = 60.0
    may_finish: bool = False
    final_codes: tuple[int, ...] = (0,)
    spares_others: Callable[[], bool] = lambda: False
    env: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """How often and how fast a crashed child comes back; `steady_s` of readiness clears its count of crashes."""

    max_restarts: int = 5
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    steady_s: float = 60.0
    stop_timeout_s: float = 30.0

    def wait_s(self, crashes: int) -> float:
        """Return the pause before the restart that follows the `crashes`-th crash in a row."""
        return min(self.first_wait_s * 2.0 ** (crashes - 1), self.longest_wait_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to a child: started, ready, crashed, finished, stopped, gave up, or a log line."""

    kind: Literal["started", "ready", "crashed", "finished", "stopped", "gave up", "log"]
    child: str
    detail: str = ""
    pid: int | None = None
    exit_code: int | None = None
    at: float = field(default_factory=time.time)


class ChildGaveUp(Exception):
    """A child crashed too often in a row, or never became ready; the message names it and its log."""


class Child:
    """One child's process, log and state. Driven by `Supervisor`; `tick` never blocks for longer than a second."""

    def __init__(
        self, spec: ChildSpec, log_dir: Path | None, policy: RestartPolicy, emit: Callable[[Event], None]
    ) -> None:
        self.spec = spec
        self.state: ChildState = "waiting"
        self.exit_code: int | None = None
        self.log_path = None if log_dir is None else log_dir / f"{spec.name}.log"
        self._policy = policy
        self._emit = emit
        self._process: subprocess.Popen[bytes] | None = None
        self._crashes = 0
        self._since = self._started_at = 0.0
        self._next_probe = 0.0
        self._log_offset = 0
        self._partial = b""
        self._last_words = ""

    @property
    def running(self) -> bool:
        """Whether its process lives (the keeper's, which lives as long as the command does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def up(self) -> bool:
        """Whether it is ready, or nothing more is to come of it."""
        return self.state in ("ready", "done", "given up")

    def start(self) -> None:
        """Start the command under a keeper, in a session of its own (a terminal's Ctrl-C does not reach it)."""
        self._started_at = time.time()
        with contextlib.ExitStack() as stack:
            log: BinaryIO | None = None
            if self.log_path is not None:
                log = stack.enter_context(self.log_path.open("ab"))
                self._log_offset = log.tell() if self._process is None else self._log_offset
            self._process = subprocess.Popen(
                keeper_command(self.spec.command, grace_s=self._policy.stop_timeout_s),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=None if self.spec.env is None else dict(self.spec.env),
            )
        self._enter("starting")
        self._emit(Event(kind="started", child=self.spec.name, pid=self._process.pid))

    def tick(self) -> None:
        """Look once: pass on new log lines, notice readiness and death, restart when the pause is over.

        Raises:
            ChildGaveUp: it crashed more than `max_restarts` times in a row, and the others cannot do without it.
        """
        if self.state == "waiting":
            return  # what its log holds is of an earlier life
        self._read_log()
        if self.state == "backing off":
            if time.monotonic() - self._since >= self._policy.wait_s(self._crashes):
                self.start()
        elif self.state in ("starting", "ready"):
            self._watch()

    def ask_to_stop(self) -> None:
        """Ask the keeper to stop the command; asked a second time, it kills."""
        if self.running and self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill the keeper; the command dies with it (its parent-death signal), asked and not waited for."""
        if self.running and self._process is not None:
            self._process.kill()
            self._process.wait()

    def stopped(self) -> bool:
        """Return whether the process is gone; says so once."""
        if self.state == "waiting":
            return True
        self._read_log()
        if self.running:
            return False
        if self.state in ("starting", "ready", "backing off"):
            code = None if self._process is None else self._process.poll()
            self._enter("stopped")
            self._emit(Event(kind="stopped", child=self.spec.name, exit_code=code))
        return True

    def _watch(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            self._read_log()
            self._ended(code)
        elif self.state == "ready":
            if self._crashes and time.monotonic() - self._since >= self._policy.steady_s:
                self._crashes = 0
        elif self._is_ready():
            self._enter("ready")
            self._emit(Event(kind="ready", child=self.spec.name, pid=self._process.pid))
        elif time.monotonic() - self._since > self.spec.ready_timeout_s:
            self._process.terminate()
            self._process.wait()
            self._crashed(f"not ready after {self.spec.ready_timeout_s:g} s", None)

    def _ended(self, code: int) -> None:
        self.exit_code = code
        if self.spec.may_finish and code in self.spec.final_codes:
            self._enter("done")
            self._emit(Event(kind="finished", child=self.spec.name, detail=self._last_words, exit_code=code))
            return
        self._crashed(f"exited with code {code}", code)

    def _crashed(self, how: str, code: int | None) -> None:
        self._crashes += 1
        if self._crashes > self._policy.max_restarts:
            self._enter("given up")
            where = "its messages are above" if self.log_path is None else f"see {self.log_path}"
            detail = f"{self.spec.name} {how}, {self._crashes} times in a row; {where}"
            if self._last_words:
                detail += f"; it last said: {self._last_words}"
            spared = self.spec.spares_others()
            detail += "; the others run on without it" if spared else ""
            self._emit(Event(kind="gave up", child=self.spec.name, detail=detail, exit_code=code))
            if spared:
                return
            raise ChildGaveUp(detail)
        detail = f"{how}; starting it again in {self._policy.wait_s(self._crashes):g} s"
        self._enter("backing off")
        self._emit(Event(kind="crashed", child=self.spec.name, detail=detail, exit_code=code))

    def _is_ready(self) -> bool:
        if time.monotonic() < self._next_probe:
            return False
        self._next_probe = time.monotonic() + 0.2
        answered = all(answers(url, any_status=self.spec.any_answer) for url in self.spec.ready_urls)
        return answered and self.spec.ready_when(self._started_at)

    def _enter(self, state: ChildState) -> None:
        self.state = state
        self._since = time.monotonic()

    def _read_log(self) -> None:
        if self.log_path is None or not self.log_path.exists():
            return
        with self.log_path.open("rb") as log:
            log.seek(self._log_offset)
            data = log.read()
        self._log_offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            self._last_words = text.strip()[:_LONGEST_LAST_WORDS] or self._last_words
            self._emit(Event(kind="log", child=self.spec.name, detail=text))


class Supervisor:
    """Children in dependency order: each is started once the one before it is ready, and stopped before it is.

    With `together` they do not depend on one another: all start at once and stop at once. Without a `log_dir` they
    write where this process writes.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        log_dir: Path | None,
        together: bool = False,
        policy: RestartPolicy | None = None,
        emit: Callable[[Event], None] = lambda event: None,
        tick_s: float = 0.1,
    ) -> None:
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        self._together = together
        self._policy = policy or RestartPolicy()
        self._tick_s = tick_s
        self._stopping = False
        self._kill_now = False
        self.children = tuple(Child(spec, log_dir, self._policy, emit) for spec in specs)

    def request_stop(self) -> None:
        """Ask `start` and `watch` to return; a second time, to kill without waiting. Safe in a signal handler."""
        self._kill_now = self._stopping
        self._stopping = True

    def start(self) -> bool:
        """Start every child, each after the one before it is ready. False: a stop was asked for meanwhile.

        Raises:
            ChildGaveUp: a child crashed too often in a row before it was ready.
        """
        for child in self.children:
            if self._stopping:
                return False
            child.start()
            while not self._together and not self._stopping and not child.up:
                self._tick()
        while not self._stopping and not all(child.up for child in self.children):
            self._tick()
        return not self._stopping

    def watch(self, until: Callable[[], bool] = lambda: False) -> None:
        """Keep the children running until a stop is asked for or `until()` holds.

        Raises:
            ChildGaveUp: a child crashed too often in a row.
        """
        while not self._stopping and not until():
            self._tick()

    def stop(self) -> None:
        """Stop the children, the last first: each is asked, given the policy's time-out, then killed."""
        backwards = tuple(reversed(self.children))
        for some in (backwards,) if self._together else tuple((child,) for child in backwards):
            self._stop_some(some)

    def _stop_some(self, some: Sequence[Child]) -> None:
        for child in some:
            child.ask_to_stop()
        # The keeper kills the command itself at the time-out; the extra seconds are for what it left behind.
        deadline = time.monotonic() + self._policy.stop_timeout_s + 5.0
        hurried = False
        while left := [child for child in some if not child.stopped()]:
            if self._kill_now and not hurried:
                hurried = True
                for child in left:
                    child.ask_to_stop()
            if time.monotonic() > deadline:
                for child in left:
                    child.kill()
            time.sleep(0.02)

    def _tick(self) -> None:
        for child in self.children:
            child.tick()
        time.sleep(self._tick_s)


def supervise(supervisor: Supervisor, *, exit_with: str | None = None, ready: Callable[[], None] = lambda: None) -> int:
    """Run the children until a signal, until `exit_with` has ended, or until one gives up that the others need.

    Calls `ready` once all are. Returns 1 when a child gave up, else the exit code of `exit_with` where it has finished,
    else 0. Installs handlers of SIGINT and SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.request_stop())
    leaders = [child for child in supervisor.children if child.spec.name == exit_with]

    def finished() -> bool:
        return any(child.state in ("done", "given up") for child in leaders)

    try:
        if supervisor.start():
            ready()
            supervisor.watch(finished)
    except ChildGaveUp:
        return 1
    finally:
        gave_up = any(child.state == "given up" for child in supervisor.children)
        codes = [child.exit_code or 0 for child in leaders if child.state == "done"]
        supervisor.stop()
    return 1 if gave_up else max(codes, default=0)


def answers(url: str, *, any_status: bool = False, timeout_s: float = 1.0) -> bool:
    """Return whether a GET of `url` gives 200 (or any status) within the time-out; `unix:PATH` need only connect."""
    if url.startswith("unix:"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            return connection.connect_ex(url.removeprefix("unix:")) == 0
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return any_status or response.status == 200
    except urllib.error.HTTPError:
        return any_status
    except (OSError, http.client.HTTPException):
        return False
