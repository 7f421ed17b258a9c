"""A store file that is migrated once and copied for each test."""

import shutil
from pathlib import Path

import pytest

from tracegrad.tracestore.store import open_store


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "empty.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def store_url(tmp_path: Path, empty_file: Path) -> str:
    path = tmp_path / "store.db"
    shutil.copy(empty_file, path)
    return f"sqlite:///{path}"
