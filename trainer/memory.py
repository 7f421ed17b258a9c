"""Giving freed memory back to the system. Torch on a CPU allocates by malloc, and glibc keeps what is freed.

The rows of a step differ in size, so freed pages of one step do not fit the next: a learner that holds 3 GB keeps
twice that between steps, beside an engine that could use it. But a page that is given back costs a fault when it is
needed again, and a step of a small model needs a few hundred thousand: a tenth of its time. So up to `KEPT_BYTES` stay.
Refuses nothing: without glibc it does nothing. Called by the learner after each step.
"""

import ctypes
import os
from pathlib import Path

KEPT_BYTES = 3 << 29
"""What the process may hold beyond what is in use: free pages, and code and libraries (some 400 MB)."""


class _Mallinfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def return_freed_memory(kept_bytes: int = KEPT_BYTES) -> bool:
    """Give every free page of the heap back, if the process holds more than `kept_bytes` beyond what is in use."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not hasattr(libc, "mallinfo2"):
        return False
    libc.mallinfo2.restype = _Mallinfo
    info = libc.mallinfo2()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident - info.uordblks - info.hblkhd <= kept_bytes:
        return False
    libc.malloc_trim(0)
    return True
