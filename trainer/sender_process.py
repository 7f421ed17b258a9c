"""Weights sent over CUDA by processes that have vLLM: one for each engine, kept from one publish to the next.

Refuses (EngineRefused) what the sender says went wrong, (EngineUnreachable) one that does not answer in time. Either
way, and where the engine restarted meanwhile, that sender is ended and the next publish meets the engine anew.
Torch-free. Called by `transfer_client`.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracegrad.tracestore.config import TransferConfig
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineRefused, EngineUnreachable
from tracegrad.trainer.shared_weights import weight_files

_START_S = 120.0
"""For importing vLLM."""


class SenderProcess:
    """What sends to the engines of one model."""

    def __init__(self, config: TransferConfig, *, device: str = "cuda:0") -> None:
        self._config = config
        self._device = device
        self._senders: dict[str, tuple[Any, subprocess.Popen[str]]] = {}
        """URL -> (the engine's process, as its extension names it; the one that sends to it)."""
        self._lock = threading.Lock()

    def stage(self, path: str) -> None:
        """Nothing: tensors go from the file to the GPU one by one."""

    def unstage(self) -> None:
        """Nothing."""

    def send(self, wire: EngineClient, path: str, info: Mapping[str, Any], timeout_s: float) -> None:
        """Have one engine load the folder."""
        files = [str(file) for file in weight_files(Path(path))]
        with self._lock:
            known, sender = self._senders.pop(wire.url, (None, None))
        if sender is not None and (known != info["process"] or sender.poll() is not None):
            _end(sender)
            sender = None
        if sender is None:
            wire.transfer_step("shutdown_weight_transfer_engine")
            sender = self._start(wire.url)
        with contextlib.ExitStack() as undo:
            undo.callback(_end, sender)
            answer = _ask(sender, {"files": files, "timeout_s": timeout_s}, timeout_s + _START_S)
            if "error" in answer:
                raise EngineRefused(f"{wire.url} was not sent {path} by {self._config.backend}: {answer['error']}")
            undo.pop_all()
        with self._lock:
            self._senders[wire.url] = (info["process"], sender)

    def _start(self, url: str) -> subprocess.Popen[str]:
        config = self._config
        settings = {"backend": config.backend, "url": url, "address": config.address, "device": self._device}
        python = config.python.replace("{python}", sys.executable)
        program = str(Path(__file__).with_name("cuda_sender.py"))
        try:
            return subprocess.Popen(
                [python, program, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # the program lies among modules of ours that no import of its libraries may find
                env={**os.environ, "CUDA_VISIBLE_DEVICES": config.gpu, "PYTHONSAFEPATH": "1"},
                text=True,
            )
        except OSError as error:
            raise EngineRefused(f"engine.transfer.python: {python} cannot be run: {error}") from error


def _ask(sender: subprocess.Popen[str], question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    assert sender.stdin is not None
    assert sender.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        sender.stdin.write(json.dumps(question) + "\n")
        sender.stdin.flush()
    if not select.select([sender.stdout], [], [], timeout_s)[0]:
        raise EngineUnreachable(f"weights were not sent in {timeout_s:.0f} s")
    line = sender.stdout.readline()
    if not line:
        return {"error": "the sender died; its last words are in the trainer's output. Does its interpreter have vLLM?"}
    answer: dict[str, Any] = json.loads(line)
    return answer


def _end(sender: subprocess.Popen[str]) -> None:
    sender.kill()
    with contextlib.suppress(BrokenPipeError), sender:  # closes its pipes and waits for it
        pass
