"""What `cuda_sender` imports of vLLM's, without CUDA: as 0.32, but a transfer names the files instead of sending them.

To be laid out as ``vllm.distributed.weight_transfer`` by `lay_out`. tests/integration/test_engine_real.py runs the same
program with the real ones.
"""

import json
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: Any
    shape: tuple[int, ...]


class WeightSource:
    files: list[str]

    def groups(self) -> None:
        raise NotImplementedError


class HTTPVLLMWeightSyncClient:
    def __init__(self, base_url: str, timeout: float = 300) -> None:
        self.base_url, self.timeout = base_url, timeout

    def post(self, path: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(f"{self.base_url}/{path}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout):
            pass


class WeightTransferTrainerFactory:
    @classmethod
    def trainer_init(cls, init_info: Any, *, client: HTTPVLLMWeightSyncClient, source: WeightSource) -> "_Trainer":
        client.post("init_weight_transfer_engine", {"init_info": asdict(init_info)})
        return _Trainer(client, source)


class _Trainer:
    def __init__(self, client: HTTPVLLMWeightSyncClient, source: WeightSource) -> None:
        self.client, self.source = client, source

    def send_weights(self) -> None:
        declared = [(meta.name, meta.dtype, meta.shape) for meta in self.source.metadata()]
        assert declared == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.source]
        self.client.post("start_weight_update", {})
        self.client.post("update_weights", {"update_info": {"files": self.source.files}})
        self.client.post("finish_weight_update", {})


@dataclass
class IPCTrainerInitInfo:
    rank: int
    packed: bool = False
    packed_buffer_size_bytes: int = 0


@dataclass
class NCCLTrainerInitInfo:
    rank: int
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int = 0


def lay_out(folder: Path) -> Path:
    """Make `folder` a place to import `vllm` from that has these names."""
    package = folder / "vllm" / "distributed" / "weight_transfer"
    package.mkdir(parents=True)
    for module in ("vllm/__init__.py", "vllm/distributed/__init__.py"):
        (folder / module).touch()
    (package / "__init__.py").write_text(Path(__file__).read_text())
    for module in ("ipc_engine.py", "nccl_engine.py"):
        (package / module).write_text("from vllm.distributed.weight_transfer import *\n")
    return folder
