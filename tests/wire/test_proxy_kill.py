"""Law 3 under `kill -9`: random moments under concurrent plain and streaming load, with the fake engine."""

import os
import time
from pathlib import Path

import kill_load
import pytest


def a_seed() -> int:
    return time.time_ns() % 100_000


def some(store_url: str) -> int:
    """How many kills: fewer on PostgreSQL, where each takes longer."""
    return 10 if store_url.startswith("sqlite") else 4


def test_kills_lose_no_answered_call_and_duplicate_none(tmp_path: Path, either_url: str) -> None:
    kill_load.kill_at_random_moments(tmp_path, either_url, seed=a_seed(), moments=some(either_url))


def test_killing_one_of_two_proxies_loses_no_answered_call_and_duplicates_none(tmp_path: Path, either_url: str) -> None:
    kill_load.kill_one_of_two_at_random_moments(tmp_path, either_url, seed=a_seed(), moments=some(either_url))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long")
def test_killing_one_of_two_proxies_fifty_times(tmp_path: Path, either_url: str) -> None:
    kill_load.kill_one_of_two_at_random_moments(tmp_path, either_url, seed=a_seed(), moments=50)
