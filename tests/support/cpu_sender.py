"""Runs `cuda_sender` with vLLM's own trainer-side client where there is no GPU: only the wire under it is another.

``python cpu_sender.py PROGRAM SETTINGS``: "ipc" is then a trainer engine of ours in vLLM's registry, which lays the
source's tensors into a file in shared memory instead of a GPU's, as `weight_receiver` wants them.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer import TrainerWeightTransferEngine, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class CpuTrainer(TrainerWeightTransferEngine[IPCTrainerInitInfo]):
    init_info_cls = IPCTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info: IPCTrainerInitInfo, *, client: Any, source: Any = None) -> "CpuTrainer":
        assert init_info.is_sender
        client.init_weight_transfer_engine({"layout": 1})
        return cls(client=client, source=source)

    def send_weights(self) -> None:
        assert self.source is not None
        declared = {(meta.name, meta.dtype, meta.shape) for meta in self.source.metadata()}
        at, tensors = Path("/dev/shm") / f"cpu-sender-{os.getpid()}", []
        self.client.start_weight_update()
        with at.open("wb") as file:
            for name, tensor in self.source:
                assert (name, tensor.dtype, tuple(tensor.shape)) in declared
                tensors.append([name, NAMES[tensor.dtype], list(tensor.shape), file.tell()])
                file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        try:
            size = at.stat().st_size
            self.client.update_weights({"segment": at.name, "size": size, "tensors": tensors})
        finally:
            at.unlink()
        self.client.finish_weight_update()


WeightTransferTrainerFactory._registry["ipc"] = lambda: CpuTrainer
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
