"""Fixtures: a random Llama in a folder, learners on it, and stores with recorded runs.

Imported by the conftests of the folders that test the learner and the controller.
"""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import recorded_runs as recorded
import torch

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.learner import Learner

MakeLearner = Callable[..., Learner]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded.random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded.random_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture
def configure(llama: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(base: Path = llama, output: Path = tmp_path / "out", **trainer: Any) -> Config:
        store = f"sqlite:///{tmp_path}/store.db"
        return recorded.configuration(base, output, store=store, **trainer)

    return make


@pytest.fixture
def learner(configure: Callable[..., Config], tmp_path: Path) -> MakeLearner:
    """A learner with the base's weights; keyword arguments override `trainer` settings."""

    def make(**trainer: Any) -> Learner:
        made = Learner(configure(**trainer))
        made.create(str(tmp_path / f"made-{torch.randint(1 << 40, ()).item()}"))
        return made

    return make


@pytest.fixture(scope="session")
def recorded_store(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with eight groups that another job's weights (equal to the base) sampled."""
    folder = tmp_path_factory.mktemp("recorded")
    config = recorded.configuration(llama, folder / "out", store=f"sqlite:///{folder}/store.db")
    recorded.sample_groups(config, folder / "sampler", 8)
    with closing(sqlite3.connect(folder / "store.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "store.db"


@pytest.fixture
def store(recorded_store: Path, configure: Callable[..., Config]) -> Iterator[Store]:
    """A copy of it, where `configure` says."""
    url = configure().store
    shutil.copyfile(recorded_store, url.removeprefix("sqlite:///"))
    with closing(open_store(url, create=False)) as opened:
        yield opened
