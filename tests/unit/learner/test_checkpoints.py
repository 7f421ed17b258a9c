"""Folders appear whole or not at all, say what they hold, and are removed only when nothing needs them."""

import hashlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from tracegrad.trainer.checkpoints import list_checkpoints, prune, remove_orphans, verify_checkpoint, write_checkpoint
from tracegrad.trainer.errors import CheckpointError


def fill(folder: Path, text: str = "weights") -> dict[str, str]:
    (folder / "trainer_state").mkdir()
    (folder / "trainer_state" / "moments").write_text("m" * 5000)
    (folder / "model").write_text(text)
    return {"model": hashlib.sha256(text.encode()).hexdigest()}


def test_name_and_hash_come_from_the_manifest(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, 12, fill, {"model": "main"})
    raw = (Path(made.path) / "manifest.json").read_bytes()
    assert made.hash == hashlib.sha256(raw).hexdigest()
    assert Path(made.path).name == f"step-000012-{made.hash[:8]}"
    assert json.loads(raw)["files"]["trainer_state/moments"] == {
        "bytes": 5000,
        "sha256": hashlib.sha256(b"m" * 5000).hexdigest(),
    }
    assert made.size_bytes == len("weights") + 5000 + len(raw)
    assert verify_checkpoint(made.path, made.hash)["step"] == 12


def test_equal_content_has_an_equal_hash_and_writing_again_changes_nothing(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 1, fill)
    before = (Path(first.path) / "model").stat().st_ino
    again = write_checkpoint(tmp_path, 1, fill)
    assert (again.path, again.hash) == (first.path, first.hash)
    assert (Path(first.path) / "model").stat().st_ino == before
    assert [p.name for p in tmp_path.iterdir()] == [Path(first.path).name]


def test_a_damaged_folder_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 1, fill)
    (Path(first.path) / "model").write_text("WEIGHTS")
    write_checkpoint(tmp_path, 1, fill)
    verify_checkpoint(first.path, first.hash)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model", lambda p: p.write_text("Weights")),
        ("trainer_state/moments", lambda p: p.unlink()),
        ("model-extra", lambda p: p.write_text("")),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, damage: object) -> None:
    made = write_checkpoint(tmp_path, 1, fill)
    damage(Path(made.path) / name)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(made.path, made.hash)


def test_a_replaced_manifest_or_folder_is_refused(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, 1, fill)
    other = write_checkpoint(tmp_path / "other", 1, lambda folder: fill(folder, "others"))
    with pytest.raises(CheckpointError, match="its row says"):
        verify_checkpoint(other.path, made.hash)
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify_checkpoint(tmp_path / "nowhere")


def _write_and_die(root: Path, after: int) -> None:
    """Write four files and be killed after `after` of them; 4 is after all of them, before the rename."""

    def stops(folder: Path) -> dict[str, str]:
        for number in range(5):
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / f"file{number}").write_text("x" * 1000)
        return {}

    write_checkpoint(root, 3, stops)


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_kill_between_files_leaves_no_visible_folder(tmp_path: Path, after: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list_checkpoints(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1
    remove_orphans(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(tmp_path, 1, full)
    assert list(tmp_path.iterdir()) == []


def test_orphans_are_the_folders_without_a_row(tmp_path: Path) -> None:
    made = [write_checkpoint(tmp_path, step, lambda folder: fill(folder, "w")) for step in range(3)]
    assert remove_orphans(tmp_path, [made[0].path, made[1].path]) == [Path(made[2].path).name]
    assert [str(p) for p in list_checkpoints(tmp_path)] == [made[0].path, made[1].path]


def test_pruning_keeps_first_last_and_protected(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path, step, lambda folder: fill(folder, "w")).path for step in range(7)]
    removed = prune(tmp_path, keep_last=2, protected=[paths[3]])
    assert removed == [Path(paths[step]).name for step in (1, 2, 4)]
    assert [str(p) for p in list_checkpoints(tmp_path)] == [paths[step] for step in (0, 3, 5, 6)]
    assert prune(tmp_path, keep_last=2, protected=[paths[3]]) == []
