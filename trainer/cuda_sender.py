"""A process with the engine's interpreter that sends checkpoints by vLLM's own trainer-side clients, over CUDA.

Run by file name (``PYTHON cuda_sender.py '{"backend": ..., "url": ..., "address": ..., "device": ...}'``) by
`sender_process`, which tells it a folder a line on its standard input and is told a line back when the engine serves
what lies there: ``{"seconds": ...}`` or ``{"error": ...}``. It imports vllm, because sender and receiver of a transfer
have to be of one version, and nothing of tracegrad. Ends when its input does, when whoever started it is gone, and
after an error: vLLM's transfer groups do not outlive one.

Source: vllm 0.32 `distributed/weight_transfer/{base,clients,factory,nccl_engine,ipc_engine}.py`.
"""

import json
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import (
    HTTPVLLMWeightSyncClient,
    ParamMeta,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

_BUFFER_BYTES = 256 * 1024 * 1024


class CheckpointSource(WeightSource):
    """The weights of whatever folder `files` names at the moment, one tensor at a time on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.files: list[str] = []

    def metadata(self) -> list[ParamMeta]:
        """Say what iterating gives. The data stays on disk."""
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors():
            yield name, tensor.to(self.device)

    def largest_bytes(self) -> int:
        """Return the size of the largest tensor."""
        return max(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            with safe_open(file, framework="pt", device="cpu") as opened:  # maps the file
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    yield name, opened.get_tensor(name)


class Transfer:
    """One engine, met at the first folder, as vLLM's protocol wants it: init once, then send."""

    def __init__(self, backend: str, url: str, address: str, device: str) -> None:
        self.backend, self.url, self.address = backend, url, address
        self.source = CheckpointSource(device)
        self._engine: Any = None

    def send(self, files: list[str], timeout_s: float) -> None:
        """Send the tensors of these files, as one update."""
        self.source.files = files
        client = HTTPVLLMWeightSyncClient(self.url, timeout=timeout_s)
        if self._engine is None:
            made = WeightTransferTrainerFactory.trainer_init(self._init_info(), client=client, source=self.source)
            self._engine = made
        self._engine.client = client
        self._engine.send_weights()

    def _init_info(self) -> Any:
        buffer = max(_BUFFER_BYTES, self.source.largest_bytes())
        if self.backend == "ipc":
            return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=buffer)
        with urllib.request.urlopen(f"{self.url}/get_world_size", timeout=30) as answer:
            workers = int(json.load(answer)["world_size"])
        return NCCLTrainerInitInfo(
            rank=0,
            master_address=self.address,
            master_port=_free_port(self.address),
            world_size=1 + workers,
            packed=True,
            packed_buffer_size_bytes=buffer,
        )


def main(settings: dict[str, str]) -> int:
    """Answer each line of standard input with one on standard output, which belongs to us alone."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if settings["device"].startswith("cuda"):
        torch.cuda.set_device(settings["device"])
    transfer = Transfer(**settings)
    for line in sys.stdin:
        asked, start = json.loads(line), time.monotonic()
        try:
            transfer.send(asked["files"], asked["timeout_s"])
        except Exception as error:  # noqa: BLE001  (a boundary: whoever asked is told, and this process ends)
            print(json.dumps({"error": _said(error)}), file=out)
            out.flush()
            os._exit(1)  # a broken transfer leaves threads that never end
        print(json.dumps({"seconds": time.monotonic() - start}), file=out)
    return 0


def _said(error: Exception) -> str:
    answer = getattr(getattr(error, "response", None), "text", "")
    return f"{type(error).__name__}: {error}" + (f" ({answer[:500]})" if answer else "")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
