"""Law 3 under `kill -9`: random moments under concurrent plain and streaming load, with the fake engine."""

import os
import time
from pathlib import Path

import kill_load
import pytest
from sqlalchemy import create_engine, text

from tracegrad.tracestore.database import parse_url


def a_seed() -> int:
    return time.time_ns() % 100_000


def test_ten_kills_lose_no_answered_call_and_duplicate_none(tmp_path: Path) -> None:
    kill_load.kill_at_random_moments(tmp_path, seed=a_seed(), moments=10, clients=16)


def test_killing_one_of_two_proxies_ten_times_loses_no_answered_call_and_duplicates_none(tmp_path: Path) -> None:
    kill_load.kill_one_of_two_at_random_moments(tmp_path, seed=a_seed(), moments=10)


@pytest.mark.skipif("TRACEGRAD_TEST_POSTGRES" not in os.environ, reason="TRACEGRAD_TEST_POSTGRES names no server")
def test_killing_one_of_two_proxies_on_postgresql(tmp_path: Path) -> None:
    server = create_engine(parse_url(os.environ["TRACEGRAD_TEST_POSTGRES"]), isolation_level="AUTOCOMMIT")
    name = f"tracegrad_kill_{os.getpid()}"
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = server.url.set(database=name).render_as_string(hide_password=False)
    try:
        kill_load.kill_one_of_two_at_random_moments(tmp_path, seed=a_seed(), moments=5, store_url=url)
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


@pytest.mark.long
@pytest.mark.skipif("TRACEGRAD_LONG" not in os.environ, reason="make test-long")
def test_killing_one_of_two_proxies_fifty_times_loses_no_answered_call_and_duplicates_none(tmp_path: Path) -> None:
    kill_load.kill_one_of_two_at_random_moments(tmp_path, seed=a_seed(), moments=50)
