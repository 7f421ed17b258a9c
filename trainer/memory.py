"""Giving freed memory back to the system. Torch on a CPU allocates by malloc, and glibc keeps what is freed.

The rows of a step differ in size, so freed pages of one step do not fit the next: a learner that holds 3 GB keeps
twice that between steps, beside an engine that could use it. Refuses nothing: without glibc it does nothing.
Called by the learner after each step.
"""

import ctypes


def return_freed_memory() -> None:
    """Give every free page of the heap back. Costs a page fault per 4 KB when it is needed again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
