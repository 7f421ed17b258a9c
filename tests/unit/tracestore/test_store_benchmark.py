"""The benchmark's large stores are what they say: so many calls, a lease's worth of them ready, tables all known."""

import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tracegrad.tracestore.database import parse_url
from tracegrad.tracestore.store import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import store_growth


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_growth, "SEED_GROUPS", 1)
    monkeypatch.setattr(store_growth, "LEASED_RUNS", 8)


def count(url: str, what: str) -> int:
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        found = int(connection.execute(text(f"SELECT count(*) FROM {what}")).scalar_one())
    engine.dispose()
    return found


def test_a_store_is_filled_and_a_lease_of_it_read(either_url: str) -> None:
    store_growth.fill(either_url, 96)
    waiting = 2 * store_growth.LEASED_RUNS
    assert count(either_url, "calls WHERE run_id LIKE 'old%'") == 96
    assert count(either_url, "ledger") == 96 // store_growth.CALLS_PER_RUN
    assert count(either_url, "runs WHERE run_id LIKE 'new%' AND status = 'closed'") == waiting
    assert store_growth.read(either_url, 2)["lease_ms"] > 0


def test_the_copies_are_rows_that_the_product_reads(either_url: str) -> None:
    store_growth.fill(either_url, 64)
    store = open_store(either_url, create=False)
    first, copy = store.traces(["old0-0", "old0-0.1"])
    assert copy.run.group_id == "old0.1"
    assert [call.prompt_ids for call in copy.calls] == [call.prompt_ids for call in first.calls]
    assert [call.choices for call in copy.calls] == [call.choices for call in first.calls]
    assert [reward.value for reward in copy.rewards] == [1.0]
    assert [span.span_id for span in copy.spans] == ["span-answerer.1"]
    store.close()


def test_a_table_that_nobody_thought_of_is_refused(either_url: str) -> None:
    store = open_store(either_url)
    store.register_proxy("p", "http://p")
    store.close()
    with pytest.raises(RuntimeError, match="table proxies has rows"):
        store_growth.multiply(either_url, 2)
