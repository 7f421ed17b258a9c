"""A small process between the engine and its owner: when the owner is gone, however it went, so is the engine.

vLLM is a tree of processes (server, core, worker). The guard starts it in a session of its own, waits, and kills the
whole group when it is told to stop (SIGTERM), when the owner no longer is its parent (killed with -9 included), or
when the server itself has died and left children. The engine asks the kernel for SIGTERM should the guard die first.

Run by file name (``python -S -E engine_guard.py OWNER_PID GRACE_S -- COMMAND...``) by `tracegrad.trainer.engine`; it
imports nothing of tracegrad. Prints the engine's process id, then nothing; the engine's output goes to stderr.
Exits with the engine's own code, or 0 after a stop it was asked for.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1


def main(arguments: list[str]) -> int:
    """Start the command after ``--`` and stay until it, the owner or the caller's patience ends."""
    owner, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[3:]
    told_to_stop = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal told_to_stop
        told_to_stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=2,
        start_new_session=True,
        preexec_fn=_die_with_guard,  # noqa: PLW1509  (this process has one thread)
    )
    sys.stdout.write(f"{engine.pid}\n")
    sys.stdout.flush()
    while engine.poll() is None and not told_to_stop and os.getppid() == owner:
        time.sleep(_POLL_S)
    code = engine.poll()
    if code is None:
        engine.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            engine.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()
    return 0 if code is None else code if code >= 0 else 128 - code


def _die_with_guard() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
