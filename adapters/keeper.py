"""A small process that runs one command and leaves no orphan: `python -m tracegrad.adapters.keeper ... -- CMD`.

It stops the command (SIGTERM, a grace period, SIGKILL) when it is told to (told twice, it does not wait) or when
its parent is gone, even by SIGKILL; then it stops what the command left behind: as a subreaper it inherits every
descendant, so an engine's workers or Ray's daemons cannot outlive it. It exits with the command's exit code (128 +
signal where it was killed). Standard library only, because one runs beside every child. Outside Linux there is no
subreaper: there it stops the command's process group. Started by `tracegrad.adapters.supervisor`.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TICK_S = 0.05
_LONGEST_LEFTOVER_GRACE_S = 2.0


def keeper_command(command: tuple[str, ...], *, grace_s: float) -> list[str]:
    """Return the command line that runs `command` under a keeper whose parent is this process."""
    module = "tracegrad.adapters.keeper"
    return [sys.executable, "-m", module, "--parent", str(os.getpid()), "--grace", str(grace_s), "--", *command]


def main(arguments: list[str] | None = None) -> int:
    """Run the command to its end and return the exit code to leave with."""
    parser = argparse.ArgumentParser(prog="keeper")
    parser.add_argument("--parent", type=int, required=True, help="stop when this process is no longer the parent")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return _Keeper(command, parent=options.parent, grace_s=options.grace).run()


class _Keeper:
    """One command, its parent, and the two reasons to stop it."""

    def __init__(self, command: list[str], *, parent: int, grace_s: float) -> None:
        self._command = command
        self._parent = parent
        self._grace_s = grace_s
        self._asked = 0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            child = subprocess.Popen(self._command, process_group=0, preexec_fn=_die_with_keeper)  # noqa: PLW1509
        except OSError as error:
            print(f"cannot start {self._command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            return 127
        code = self._wait(child)
        _stop_leftovers(child.pid, min(self._grace_s, _LONGEST_LEFTOVER_GRACE_S))
        return code

    def _ask(self, number: int, frame: object) -> None:
        self._asked += 1

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        kill_at: float | None = None
        while True:
            code = _reap(child.pid)
            if code is not None:
                child.returncode = code
                return code
            if kill_at is None and (self._asked or os.getppid() != self._parent):
                kill_at = time.monotonic() + self._grace_s
                _signal(child.pid, signal.SIGTERM)
            if kill_at is not None and (self._asked > 1 or time.monotonic() >= kill_at):
                _signal(child.pid, signal.SIGKILL)
            time.sleep(_TICK_S)


def _reap(pid: int) -> int | None:
    """Collect every dead child, adopted ones too; return the exit code of `pid` if it was among them."""
    found: int | None = None
    while True:
        try:
            reaped, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if reaped == 0:
            return found
        if reaped == pid:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code


def _stop_leftovers(group: int, grace_s: float) -> None:
    """Stop what the command left running: first asked, then killed."""
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    if sys.platform != "linux":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    while pids := _descendants(os.getpid()):
        force = time.monotonic() >= deadline
        for pid in pids:
            if force or pid not in asked:
                _signal(pid, signal.SIGKILL if force else signal.SIGTERM)
                asked.add(pid)
        _reap(group)
        time.sleep(_TICK_S)


def _descendants(root: int) -> list[int]:
    """Return the living processes below `root`, from /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid ...": the name may hold spaces and parentheses.
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found, frontier = [], [root]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _die_with_keeper() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
