"""Waiting for what another thread or process does: by looking again and again, and never for ever."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], what: str, limit_s: float = 10.0) -> Found:
    """Look until it holds, and return what was found then; `what` ends the sentence "waited in vain until ..."."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)
    return found


def gone(pid: int) -> bool:
    """Whether no such process runs (a zombie that nobody has reaped yet counts as gone)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
