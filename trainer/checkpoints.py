"""Checkpoint folders: `step-000012-1a2b3c4d`, written atomically, verified by hash, pruned.

A folder holds every model of the job in a subfolder of its name, in Hugging Face format (what vLLM and transformers
load as is; vLLM globs `*.safetensors` there, so nothing else may lie beside it; of an adapter, in peft's format), with
the trainer's state of the model under `trainer_state/` there. A version's path is such a subfolder, and means the
folder around it wherever the manifest is asked for. `manifest.json` has the sha256 and size of every file. The
checkpoint's hash is the sha256 of the manifest, which holds no clock: equal weights and state have equal hashes. A
folder is filled under a temporary name, every file and folder is fsynced, then it is renamed: a visible folder is
complete. It is *committed* only by a ledger or version row that names its hash (law 7); `remove_orphans` removes the
others.

Refuses a folder whose files are not the manifest's. Called by `worker_groups` (write, verify), by the learner for the
canary's weights, and by the controller (prune, orphans). No torch: `tracegrad.trainer.weights` knows what is inside
the files.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracegrad.trainer.errors import CheckpointError

MANIFEST = "manifest.json"
STATE_FOLDER = "trainer_state"
_TEMPORARY = ".writing-"
_NAME = re.compile(r"step-(\d{6,})-([0-9a-f]{8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete folder. `hash` is the sha256 of its manifest; `size_bytes` and `write_s` say what it cost."""

    path: str
    hash: str
    step: int
    size_bytes: int
    write_s: float


def write_checkpoint(
    root: Path, step: int, fill: Callable[[Path], Mapping[str, str]], facts: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Make the folder of `step` under `root`: `fill` writes its files into the temporary folder it is given.

    `fill` returns the sha256 of the files (by name in the folder) that it hashed while writing; the others are
    hashed here. `facts` are kept in the manifest and so are part of the hash. Writing what is already there is a no-op.

    Raises:
        CheckpointError: the disk refused (full, read-only); nothing visible was left.
    """
    started = time.monotonic()
    temporary = root / f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}"
    try:
        temporary.mkdir(parents=True)
        manifest = _manifest(temporary, step, facts or {}, fill(temporary))
        (temporary / MANIFEST).write_bytes(manifest)
        _sync_all(temporary)
        digest = hashlib.sha256(manifest).hexdigest()
        path = root / f"step-{step:06d}-{digest[:8]}"
        _reveal(temporary, path, digest)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} under {root}: {error}; free the disk and start again"
        ) from error
    files = json.loads(manifest)["files"]
    return Checkpoint(
        path=str(path),
        hash=digest,
        step=step,
        size_bytes=sum(entry["bytes"] for entry in files.values()) + len(manifest),
        write_s=time.monotonic() - started,
    )


def verify_checkpoint(path: str | Path, expected_hash: str | None = None) -> dict[str, Any]:
    """Check every file of the folder (of all models) against its manifest, and the manifest against `expected_hash`.

    Returns:
        The manifest: {"format", "step", "facts", "files": {name: {"sha256", "bytes"}}}.

    Raises:
        CheckpointError: the folder is missing, or any file is missing, changed or added.
    """
    path = step_folder(path)
    try:
        raw = (path / MANIFEST).read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        manifest: dict[str, Any] = json.loads(raw)
        found = _hash_files(path, {})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}; restore it or roll back") from error
    if expected_hash is not None and digest != expected_hash:
        raise CheckpointError(
            f"checkpoint {path} has the hash {digest[:12]}, its row says {expected_hash[:12]}: it was replaced"
        )
    wrong = sorted(name for name in {*found, *manifest["files"]} if found.get(name) != manifest["files"].get(name))
    if wrong:
        raise CheckpointError(f"checkpoint {path} is damaged: {', '.join(wrong)} differ from its manifest")
    return manifest


def step_folder(path: str | Path) -> Path:
    """Return the checkpoint folder that a path is, or lies directly in as the subfolder of one model."""
    path = Path(path)
    return path.parent if _NAME.fullmatch(path.parent.name) and not _NAME.fullmatch(path.name) else path


def list_checkpoints(root: Path) -> list[Path]:
    """Return the visible folders under `root`, oldest step first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_orphans(root: Path, known: Iterable[str | Path]) -> list[str]:
    """Remove folders that no row names, and what a killed writer left; return the names removed.

    `known` are the checkpoint paths of the job's version and ledger rows. Call it only while holding the job.
    """
    kept = {step_folder(path).resolve() for path in known}
    unfinished = list(root.glob(f"{_TEMPORARY}*")) if root.is_dir() else []
    orphans = [path for path in list_checkpoints(root) if path.resolve() not in kept]
    for path in [*orphans, *unfinished]:
        _remove(path)
    return [path.name for path in orphans]


def prune(root: Path, *, keep_last: int, protected: Collection[str | Path]) -> list[str]:
    """Remove all folders but the first, the last `keep_last` and the `protected`; return the names removed."""
    folders = list_checkpoints(root)
    kept = {step_folder(path).resolve() for path in protected}
    removed = [path for path in folders[1 : max(1, len(folders) - keep_last)] if path.resolve() not in kept]
    for path in removed:
        _remove(path)
    return [path.name for path in removed]


def _remove(path: Path) -> None:
    """Take the folder out of sight in one rename first: a kill half-way leaves no damaged visible folder."""
    if not path.name.startswith(_TEMPORARY):
        hidden = path.with_name(f"{_TEMPORARY}removed-{os.urandom(4).hex()}")
        path.rename(hidden)
        path = hidden
    shutil.rmtree(path)


def _reveal(temporary: Path, path: Path, digest: str) -> None:
    """Rename into place. A folder already there has the same hash: keep it when it is whole, else replace it."""
    if path.exists():
        try:
            verify_checkpoint(path, digest)
        except CheckpointError:
            _remove(path)
        else:
            shutil.rmtree(temporary)
            return
    temporary.rename(path)
    _sync(path.parent)


def _manifest(folder: Path, step: int, facts: Mapping[str, Any], hashed: Mapping[str, str]) -> bytes:
    content = {"format": 1, "step": step, "facts": dict(facts), "files": _hash_files(folder, hashed)}
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _hash_files(folder: Path, hashed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Hash what is not hashed yet, in threads (hashlib gives up the interpreter lock), the largest files first."""
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    rest = sorted(files.keys() - hashed.keys(), key=lambda name: -files[name].stat().st_size)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = {**hashed, **dict(zip(rest, pool.map(lambda name: _hash_file(files[name]), rest), strict=True))}
    return {name: {"sha256": digests[name], "bytes": path.stat().st_size} for name, path in files.items()}


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_all(folder: Path) -> None:
    files = [*_files(folder), folder / MANIFEST]
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(_sync, files))
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
