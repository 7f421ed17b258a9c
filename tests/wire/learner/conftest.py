"""The model and learners of `learners`, an engine that answers with that model's logprobs, and an empty store."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import recorded_runs as recorded
from learners import configure, learner, llama, tied_llama
from llama_engine import LlamaEngine

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.learner import Learner

__all__ = ["configure", "learner", "llama", "tied_llama"]


@pytest.fixture(scope="module")
def score(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> recorded.Score:
    """The model's logprobs."""
    folder = tmp_path_factory.mktemp("scorer")
    scorer = Learner(recorded.configuration(llama, folder))
    scorer.create(str(folder))
    return scorer.score


@pytest.fixture
def engine(llama: Path, tmp_path: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(llama, tmp_path / "scratch", recorded.MODEL) as running:
        yield running


@pytest.fixture
def store(configure: Callable[..., Config]) -> Iterator[Store]:
    with closing(open_store(configure().store)) as opened:
        yield opened
