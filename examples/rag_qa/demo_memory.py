"""How much memory the demo uses: the proportional set sizes of its processes, added up.

A page that several processes share counts once in all. Read from /proc (Linux); elsewhere there is no figure, and
None says so. Called by `demo` while it trains, which is when engine and learner are both at work.
"""

import os
from collections import defaultdict
from pathlib import Path

_PROC = Path("/proc")


def tree_memory_bytes(root: int | None = None) -> int | None:
    """Return the bytes of process `root` (default: this one) and all its descendants, or None where /proc has none."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in _PROC.glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        children[int(after_name[1])].append(int(folder.name))
    waiting, total = [os.getpid() if root is None else root], 0
    while waiting:
        process = waiting.pop()
        waiting += children[process]
        total += _pss_bytes(process)
    return total or None


def _pss_bytes(process: int) -> int:
    try:
        lines = (_PROC / str(process) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
