"""A checkpoint's weights in shared memory, for an engine on the same machine: the trainer's end of our own backend.

The bytes are those of the checkpoint's safetensors files, unread: only their headers are. `weight_receiver` maps the
segment. Refuses (PublishFailed) a folder without such files, a file whose header is wrong or that is shorter than it
says, and a machine without room. A segment is gone with `close`, and with the process, however that ends (Python's
resource tracker). Torch-free. Called by `transfer_client`.

Source of the format: https://huggingface.co/docs/safetensors (header length, JSON header, raw little-endian data).
"""

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from tracegrad.trainer.engine_errors import PublishFailed

LAYOUT = 1
"""Of what `weight_receiver` is told: raised when it changes."""
_ALIGNED = 64
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """The data of one file: where it lies there, how long it is, where it comes to lie, and its tensors."""

    path: Path
    begin: int
    size: int
    offset: int
    tensors: Sequence[list[Any]]
    """[name, dtype, shape, offset in the segment]"""


class SharedWeights:
    """The weights of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[_Part] = []
        end = 0
        for path in weight_files(folder):
            part = _part(path, offset=-(-end // _ALIGNED) * _ALIGNED)
            self._parts.append(part)
            end = part.offset + part.size
        try:
            name = f"tracegrad-{os.getpid()}-{secrets.token_hex(4)}"
            self._memory = SharedMemory(name, create=True, size=max(end, 1))
        except OSError as error:
            raise PublishFailed(
                f"{folder} needs {end / 1e6:.0f} MB of shared memory, and the machine refuses ({error}): give "
                "/dev/shm more room, or write engine.transfer.backend: files"
            ) from error
        with ExitStack() as undo:
            undo.callback(self.close)
            for part in self._parts:
                self._fill(part)
            undo.pop_all()

    def as_json(self) -> dict[str, Any]:
        """Return what the receiver has to know."""
        tensors = [tensor for part in self._parts for tensor in part.tensors]
        return {"segment": self._memory.name.lstrip("/"), "size": self._memory.size, "tensors": tensors}

    def close(self) -> None:
        """Give the memory back. Who has it mapped keeps it."""
        self._memory.close()
        self._memory.unlink()

    def _fill(self, part: _Part) -> None:
        assert self._memory.buf is not None
        done = 0
        with (
            part.path.open("rb", buffering=0) as file,
            self._memory.buf[part.offset : part.offset + part.size] as target,
        ):
            file.seek(part.begin)
            while done < part.size:
                with target[done:] as rest:
                    count = file.readinto(rest)
                if not count:
                    raise PublishFailed(f"{part.path} ends before its last tensor: it was not written whole")
                done += count


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make a model, as its index names them where it has one.

    Raises:
        PublishFailed: there is none.
    """
    try:
        if (folder / _INDEX).exists():
            names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
            return [folder / name for name in names]
        found = sorted(folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError) as error:
        raise PublishFailed(f"{folder / _INDEX} cannot be read: {error}") from error
    if not found:
        raise PublishFailed(f"{folder} has no safetensors files: nothing can be sent from there")
    return found


def _part(path: Path, offset: int) -> _Part:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < path.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = [
            [name, each["dtype"], each["shape"], offset + each["data_offsets"][0]] for name, each in header.items()
        ]
        size = max((each["data_offsets"][1] for each in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishFailed(f"{path} is no safetensors file: {error}") from error
    return _Part(path=path, begin=8 + length, size=size, offset=offset, tensors=tensors)
