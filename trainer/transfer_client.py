"""An engine that is sent its weights by vLLM's weight-transfer protocol (init, start, update, finish).

To the publisher it is any engine: `reload` brings the checkpoint at a path into it, and raises where it did not arrive.
What is sent is always a committed folder, never a trainer's memory: what is put back, probed, gated, pinned or rolled
back to has no other place, and the hash of the folder is what the ledger names (law 7). How it travels is the sender's
business: shared memory here, vLLM's own clients in `cuda_sender` there.

After an update that failed or that nobody finished, the engine is told to forget it before the next begins. Refuses
(EngineRefused) an engine without our worker extension, and one that was started for another backend. Called by whoever
publishes. Torch-free. Source: vllm 0.32 `entrypoints/rl/online/api_router.py`.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tracegrad.tracestore.config import ModelConfig
from tracegrad.trainer.engine_client import EngineClient, Reload
from tracegrad.trainer.engine_errors import EngineRefused
from tracegrad.trainer.engine_launch import TRANSFER_BACKENDS
from tracegrad.trainer.sender_process import SenderProcess
from tracegrad.trainer.shared_weights import LAYOUT, SharedWeights


class Sender(Protocol):
    """Brings checkpoints into engines. One serves all replicas of a model, which may ask at once."""

    def stage(self, path: str) -> None:
        """Prepare the folder; it may be sent without that, more slowly."""

    def unstage(self) -> None:
        """Give back what was prepared."""

    def send(self, wire: EngineClient, path: str, info: Mapping[str, Any], timeout_s: float) -> None:
        """Run the protocol against an engine that has no update under way. `info` is its extension's."""


class TransferClient(EngineClient):
    """The engine at `url` that serves `name`; `backend` is what it was started for, in our configuration's words."""

    def __init__(self, url: str, name: str, backend: str, sender: Sender, *, timeout_s: float = 60.0) -> None:
        super().__init__(url, name, timeout_s=timeout_s)
        self.backend = backend
        self._sender = sender

    def stage(self, path: str) -> None:
        """Prepare the folder for `swap`."""
        self._sender.stage(path)

    def unstage(self) -> None:
        """Give back what was prepared."""
        self._sender.unstage()

    def reload(self, path: str, *, timeout_s: float = 120.0) -> Reload:
        """Send the weights of the checkpoint at `path` (a folder that *we* can read).

        Raises:
            EngineRefused: they did not arrive; the engine's weights must then be taken for broken.
            EngineUnreachable: no answer in `timeout_s`.
        """
        start = time.monotonic()
        info = self.extension_info()
        if info is None or info.get("transfer") != TRANSFER_BACKENDS[self.backend]:
            raise EngineRefused(f"{self.url} was not started to be sent weights by {self.backend}: {started_for(info)}")
        self._rpc("tracegrad_break_off", {})
        self._sender.send(self, path, info, timeout_s)
        return Reload(seconds=time.monotonic() - start, extension=True, tied=None, repacked=None)


class MemorySender:
    """Puts a checkpoint into shared memory, and has engines of this machine load it from there."""

    def __init__(self) -> None:
        self._staged: SharedWeights | None = None
        self._lock = threading.Lock()

    def stage(self, path: str) -> None:
        """Copy the folder's weights into shared memory, in place of those of another folder."""
        with self._lock:
            if self._staged is not None and self._staged.folder == Path(path):
                return
            self._drop()
            self._staged = SharedWeights(Path(path))

    def unstage(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._drop()

    def send(self, wire: EngineClient, path: str, _info: Mapping[str, Any], timeout_s: float) -> None:
        """Have one engine load the folder. Raises what the engine answers."""
        self.stage(path)
        assert self._staged is not None
        wire.transfer_step("init_weight_transfer_engine", {"init_info": {"layout": LAYOUT}})
        wire.transfer_step("start_weight_update", timeout_s=timeout_s)
        wire.transfer_step("update_weights", {"update_info": self._staged.as_json()}, timeout_s=timeout_s)
        wire.transfer_step("finish_weight_update", timeout_s=timeout_s)

    def _drop(self) -> None:
        if self._staged is not None:
            self._staged.close()
            self._staged = None


def started_for(info: Mapping[str, Any] | None) -> str:
    """Say how an engine takes weights, by what its extension says of it."""
    if info is None or "transfer" not in info:
        return "it lacks our worker extension"
    known = {theirs: ours for ours, theirs in TRANSFER_BACKENDS.items()}
    backend = info["transfer"]
    return f"it takes them by {known.get(backend, backend)}" if backend else "it takes them from files only"


def sender_for(model: ModelConfig) -> Sender:
    """Return what sends weights to the engines of a model."""
    transfer = model.engine.transfer
    return MemorySender() if transfer.backend == "memory" else SenderProcess(transfer)
