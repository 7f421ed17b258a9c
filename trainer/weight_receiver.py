"""The end of our own weight-transfer backend inside vLLM: weights that lie in shared memory, loaded in place.

vLLM makes it where `worker_extension.tracegrad_register` registered it and the engine was started with
``--weight-transfer-config '{"backend": "tracegrad"}'``; `shared_weights` is the trainer's end. Beside the worker
extension this is the one module that imports vllm, and it imports nothing else of tracegrad, so that copies of the
files serve an engine installed elsewhere.

Refuses (a 500 to whoever asked) a segment of another layout than its own or with a piece missing, and an update that
leaves a weight of the model out. What a broken update left behind is thrown away before the next one begins.

Source: vllm 0.32 `distributed/weight_transfer/base.py`, `model_executor/model_loader/reload/layerwise.py`.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from tracegrad.trainer.worker_extension import tracegrad_discard, tracegrad_repack

LAYOUT = 1
"""What `shared_weights.LAYOUT` has to be."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64}


@dataclass
class SharedInit(WeightTransferInitInfo):
    """What the two ends have to agree on."""

    layout: int


@dataclass
class SharedUpdate(WeightTransferUpdateInfo):
    """Tensors of a segment in /dev/shm, as the header of a safetensors file says them: [name, dtype, shape, offset]."""

    segment: str
    size: int
    tensors: list[list[Any]]


class SharedMemoryEngine(WeightTransferEngine[SharedInit, SharedUpdate]):
    """Loads from shared memory by vLLM's own layerwise reload."""

    init_info_cls = SharedInit
    update_info_cls = SharedUpdate
    supports_draft_weight_update = False
    _lacking: set[str]

    def init_transfer_engine(self, init_info: SharedInit) -> None:
        """Agree on the layout."""
        if init_info.layout != LAYOUT:
            raise ValueError(f"the trainer's layout of shared weights is {init_info.layout}, this engine's {LAYOUT}")

    def start_weight_update(self) -> None:
        """Make room for new weights beside those that serve."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        tracegrad_discard(self.model)
        self._lacking = {name.replace(".base_layer.", ".") for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load what a segment holds, and wait for the device where there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedUpdate) -> None:
        """Map the segment and load every tensor of it; the mapping lives as long as a layer waits for its rest."""
        loaded = self.model.load_weights(_tensors(update_info))
        self._lacking -= self._lacking if loaded is None else loaded

    def finish_weight_update(self) -> None:
        """Bring the new weights into the place of the old ones; on a CPU, pack a tied head again."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._lacking and self.model_config.quantization is None:  # else vLLM makes weights of its own
            some = ", ".join(sorted(self._lacking)[:3])
            raise ValueError(f"the update has no {some} ({len(self._lacking)} weights are missing)")
        finalize_layerwise_reload(self.model, self.model_config)
        tracegrad_repack(self.model, self.model_config)

    def shutdown(self) -> None:
        """Hold nothing: a segment is the trainer's."""


def _tensors(update: SharedUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    with Path("/dev/shm", update.segment).open("rb") as file:
        memory = mmap.mmap(file.fileno(), update.size, access=mmap.ACCESS_COPY)
    for name, kind, shape, offset in update.tensors:
        dtype, count = _DTYPES[kind], torch.Size(shape).numel()
        if count:
            yield name, torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
        else:
            yield name, torch.empty(shape, dtype=dtype)
