"""The demo's child processes: real `tracegrad` commands, logged to files, stopped with the demo however it ends.

Refuses to go on when a command fails: the error ends with the last lines of its log. Called by `demo.py`.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRACEGRAD = (sys.executable, "-m", "tracegrad.adapters.cli")
_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1


class DemoError(RuntimeError):
    """A part of the demo failed; the message says which, and where its log is."""


def start(arguments: list[str], log: Path, *, stdout: Path | None = None) -> subprocess.Popen[bytes]:
    """Start ``tracegrad <arguments>`` in a session of its own (a terminal's Ctrl-C goes to the demo alone).

    Standard output goes to `stdout`, else with standard error to `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as errors, (stdout or log).open("ab") as output:
        return subprocess.Popen(
            [*TRACEGRAD, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
            preexec_fn=_stop_with_the_demo if sys.platform == "linux" else None,  # noqa: PLW1509  no threads here
        )


def stop(process: subprocess.Popen[bytes], *, first: int = signal.SIGINT, patience_s: float = 60.0) -> None:
    """Ask a command to stop, and kill its whole session if it has not after `patience_s`."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(first)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def check(process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    """Raise DemoError if a command that should be running has ended."""
    if (code := process.poll()) is not None:
        raise DemoError(f"{what} ended with code {code}; see {log}\n{tail(log)}")


def run(arguments: list[str], what: str, log: Path) -> None:
    """Run a command to its end; its progress (standard error) is shown here, its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*TRACEGRAD, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True
        )
        try:
            code = process.wait()
        except BaseException:
            stop(process, patience_s=15.0)
            raise
    if code != 0:
        raise DemoError(f"{what} failed with code {code}; its messages are above, its output in {log}")


@contextlib.contextmanager
def running(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Keep a command running for the body; stopped afterwards, also by Ctrl-C."""
    process = start(arguments, log)
    try:
        yield process
    finally:
        stop(process, first=signal.SIGTERM)


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the demo as Ctrl-C does: children stopped, state kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


class Ticker:
    """One line of progress: redrawn on a terminal, printed now and then elsewhere."""

    def __init__(self, every_s: float = 15.0) -> None:
        self._live = sys.stderr.isatty()
        self._every_s = every_s
        self._at = 0.0

    def show(self, text: str, *, now: bool = False) -> None:
        """Show `text`; where nothing can be redrawn only when `now` or when some time has passed."""
        if self._live:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if now else ""))
        elif now or time.monotonic() - self._at >= self._every_s:
            sys.stderr.write(f"{text}\n")
            self._at = time.monotonic()
        sys.stderr.flush()


def _stop_with_the_demo() -> None:
    """In the child: a SIGTERM when the demo dies without having stopped it (kill -9)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
