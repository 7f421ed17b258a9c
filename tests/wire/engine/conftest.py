"""An empty store for each test (fixtures of `databases`), and the house of a module that publishes behind a gate."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from databases import empty_file, store, store_url

from tracegrad.tracestore.store import Store
from tracegrad.trainer import gate

__all__ = ["empty_file", "store", "store_url"]


@pytest.fixture
def make_house(
    request: pytest.FixtureRequest, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Any]]:
    """Make the `House` of the test's module, with so many engines; a gate looks often."""
    monkeypatch.setattr(gate, "POLL_S", 0.01)
    with ExitStack() as stack:
        yield lambda n_engines: request.module.House(tmp_path, store, stack, n_engines)


@pytest.fixture
def house(make_house: Callable[[int], Any]) -> Any:
    return make_house(1)
