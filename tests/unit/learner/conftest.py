"""A random Llama in a folder, learners on it, and stores with recorded runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorded_runs
import torch

from tracegrad.tracestore.config import Config
from tracegrad.trainer.learner import Learner

MakeLearner = Callable[..., Learner]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_runs.random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_runs.random_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture
def configure(llama: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(base: Path = llama, output: Path = tmp_path / "out", **trainer: Any) -> Config:
        store = f"sqlite:///{tmp_path}/store.db"
        return recorded_runs.configuration(base, output, store=store, **trainer)

    return make


@pytest.fixture
def learner(configure: Callable[..., Config], tmp_path: Path) -> MakeLearner:
    """A learner with the base's weights; keyword arguments override `trainer` settings."""

    def make(**trainer: Any) -> Learner:
        made = Learner(configure(**trainer))
        made.create(str(tmp_path / f"made-{torch.randint(1 << 40, ()).item()}"))
        return made

    return make
