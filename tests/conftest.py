"""Fixtures shared by all tiers. Heavy things (torch, vLLM) are imported and started only by who asks for them.

`tests/support` goes on the path, so that ``import digits_task`` works in tests, in programs they start with
``PYTHONPATH``, and by hand.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"
sys.path.insert(0, str(SUPPORT))

import tiny_model as tiny  # noqa: E402

from tracegrad.adapters.serving import free_port  # noqa: E402
from tracegrad.tracestore.config import EngineConfig, ModelConfig  # noqa: E402
from tracegrad.trainer.engine import EngineProcess  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Who starts the tests in the background of a script ignores Ctrl-C, and so would all that they start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class ServedTiny:
    """A real vLLM that serves the tiny model in fp32. A test that swaps weights calls `reset` first: it is shared."""

    url: str
    name: str
    model_path: Path
    process: EngineProcess

    def reset(self) -> None:
        """Bring back the weights the engine was started with, marked "default" as after a start."""
        self.process.client.reload(str(self.model_path))
        self.process.client.reset_prefix_cache()
        self.process.client.set_version("default")


def tiny_config(path: Path, *arguments: str, port: int, log: Path) -> ModelConfig:
    """Configuration of an engine for the tiny model: fp32, 512 tokens, one thread, tool calls parsed."""
    config = EngineConfig(
        url=f"http://127.0.0.1:{port}",
        dtype="float32",
        max_model_len=512,
        start_timeout_s=240,
        args=("--enable-auto-tool-choice", "--tool-call-parser", "hermes", *arguments),
        log=str(log),
    )
    return ModelConfig(checkpoint=str(path), engine=config)


def start_tiny(path: Path, log: Path, *arguments: str) -> EngineProcess:
    process = EngineProcess("tiny", tiny_config(path, *arguments, port=free_port(), log=log), say=print)
    process.start()
    return process


@pytest.fixture(scope="session")
def new_port() -> Callable[[], int]:
    """A function that returns a free port of the loopback interface."""
    return free_port


@pytest.fixture(scope="session")
def start_engine() -> Callable[..., EngineProcess]:
    """A function that starts a real vLLM on (model folder, log file, *arguments); whoever calls it stops it."""
    return start_tiny


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of the warmed-up tiny model, untied, cached between sessions."""
    return tiny.tiny_model()


@pytest.fixture(scope="session")
def tied_tiny_model() -> Path:
    """The same with the output head tied to the embedding."""
    return tiny.tiny_model(tied=True)


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedTiny]:
    """The shared real vLLM, on the untied tiny model, served as ``tiny``."""
    process = start_tiny(tiny_model, tmp_path_factory.mktemp("engine") / "engine.log")
    try:
        yield ServedTiny(url=process.client.url, name="tiny", model_path=tiny_model, process=process)
    finally:
        process.stop()
