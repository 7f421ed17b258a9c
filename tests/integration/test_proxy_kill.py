"""Law 3 under `kill -9`: ten random moments under concurrent plain and streaming load, with the fake engine."""

import time
from pathlib import Path

import kill_load


def test_ten_kills_lose_no_answered_call_and_duplicate_none(tmp_path: Path) -> None:
    kill_load.kill_at_random_moments(tmp_path, seed=time.time_ns() % 100_000, moments=10, clients=16)
