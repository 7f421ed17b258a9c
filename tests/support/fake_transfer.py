"""The part of the toy engine that is sent weights: vLLM's weight-transfer protocol, and the two ends a test needs.

As vLLM 0.32: an update that fails is over, one that nobody finished refuses the next (`gpu_worker.py`), and what was
loaded before the failure stays in the model. The toy takes its number from shared memory as our receiver does, or from
the file itself, as a CUDA backend would bring it (`{"files": [...]}`).
"""

import json
import struct
from pathlib import Path
from typing import Any

STEPS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


def save_tensor(folder: Path, weight: float) -> None:
    """Write the toy's one weight as a safetensors file."""
    header = json.dumps({"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<d", weight))


class TransferWire:
    """To be mixed into the toy engine."""

    weight: float
    head_weight: float
    stale_head: bool

    def __init__(self) -> None:
        self.transfer_backend = ""
        self.fail_at: str | None = None
        """The step that answers 500, once."""
        self.process = 1
        self.met = False
        self.init_info: dict[str, Any] = {}
        self.update_active = False
        self._arriving: float | None = None

    def transfer(self, step: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.fail_at == step:
            self.fail_at, self.update_active = None, False
            self.weight = -1.0 if step != STEPS[0] else self.weight  # half of it came: nobody's weights
            return 500, {"error": {"message": "Worker failed with error 'out of memory'"}}
        if step == "shutdown_weight_transfer_engine":
            self.met = False
        elif not self.transfer_backend or (step == STEPS[1] and self.update_active):
            return 500, {"error": {"message": "Worker failed with error 'not configured, or already active'"}}
        elif step == STEPS[0]:
            self.met, self.init_info = True, body["init_info"]
        elif step == STEPS[1]:
            self.update_active = True
        elif not self.update_active or not self.met:
            return 500, {"error": {"message": "Worker failed with error 'no update was started'"}}
        elif step == STEPS[2]:
            self._arriving = _read(body["update_info"])
        else:
            assert self._arriving is not None
            self.weight, self.update_active = self._arriving, False
            if not self.stale_head:
                self.head_weight = self.weight
        return 200, {"message": "done"}


def _read(info: dict[str, Any]) -> float:
    if "files" in info:
        raw, offset = Path(info["files"][0]).read_bytes(), -8
    else:
        raw, ((_, _, _, offset),) = Path("/dev/shm", info["segment"]).read_bytes(), info["tensors"]
    return float(struct.unpack_from("<d", raw, offset if offset >= 0 else len(raw) + offset)[0])
