"""Law 3 under `kill -9`: random moments under concurrent plain and streaming load, with the fake engine."""

import os
import time
from pathlib import Path

import kill_load
import pytest
from sqlalchemy import URL


def a_seed() -> int:
    return time.time_ns() % 100_000


def test_ten_kills_lose_no_answered_call_and_duplicate_none(tmp_path: Path) -> None:
    kill_load.kill_at_random_moments(tmp_path, seed=a_seed(), moments=10, clients=16)


def test_killing_one_of_two_proxies_ten_times_loses_no_answered_call_and_duplicates_none(tmp_path: Path) -> None:
    kill_load.kill_one_of_two_at_random_moments(tmp_path, seed=a_seed(), moments=10)


def test_killing_one_of_two_proxies_on_postgresql(tmp_path: Path, postgres_database: URL) -> None:
    url = postgres_database.render_as_string(hide_password=False)
    kill_load.kill_one_of_two_at_random_moments(tmp_path, seed=a_seed(), moments=5, store_url=url)


@pytest.mark.long
@pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long")
def test_killing_one_of_two_proxies_fifty_times_loses_no_answered_call_and_duplicates_none(tmp_path: Path) -> None:
    kill_load.kill_one_of_two_at_random_moments(tmp_path, seed=a_seed(), moments=50)
