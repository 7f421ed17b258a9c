"""Identifiers: time-ordered, prefixed, made without the database.

Called by whoever creates a row (proxy, hook, rollout driver, trainer). Policy versions and leases are the
exception: their ids are integers given by the database, because they must be ordered and never reused.
"""

import os
import time


def new_id(prefix: str) -> str:
    """Return ``prefix_`` + 48 bits of Unix milliseconds + 80 random bits, as 32 hex digits.

    Ids made later sort later (to the millisecond), which keeps B-tree inserts at the right edge.
    """
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"
