"""The wheel built from the sdist holds every module, and tests of every room pass on it in a clean environment.

The clean environment sees this one's third-party packages through a .pth line, which Python does not process
recursively: the editable install of tracegrad is therefore not visible in it, only the wheel.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tracestore", "adapters", "trainer")


def _run(*command: str, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


OF_EVERY_ROOM = (
    "tests/unit/doctor/test_doctor_command.py",
    "tests/wire/engine/test_engine_commands.py",
    "tests/unit/engine/test_preflight.py",
    "tests/unit/learner/test_train_command.py",
    "tests/unit/learner/test_weights.py",
    "tests/unit/proxy",
    "tests/unit/rollout/test_rollout_loop.py",
    "tests/unit/tracestore/test_migrations.py",
    "tests/unit/tracestore/test_upkeep.py",
    "tests/wire/proxy/test_proxy_recording.py",
    "tests/wire/adapters/test_cli.py",
    "tests/wire/adapters/test_hook.py",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist from the tree, then the wheel from nothing but the unpacked sdist."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), ".", cwd=ROOT)
    sdist = next(out.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="tar")
    tree = out / sdist.name.removesuffix(".tar.gz")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), ".", cwd=tree)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_flat(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert tracked
    assert {f"tracegrad/{path}" for path in tracked} - names == set()
    assert {name for name in names if name.split("/")[0] in PACKAGES} == set()


@pytest.mark.timeout(600)
def test_tests_of_every_room_pass_on_the_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    _run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = _run(python, "-c", "import tracegrad.tracestore.store as s; print(s.__file__)", cwd=tmp_path)
    assert where.startswith(str(home))
    for name in ("tests", "examples", "scripts", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    # What a wheel can lack is a module or a file beside one: so a test or two of every room, not all of them again.
    _run(
        python,
        "-m",
        "pytest",
        *OF_EVERY_ROOM,
        "-q",
        "-n",
        "2",
        "--dist",
        "worksteal",
        "-p",
        "no:cacheprovider",
        cwd=tmp_path,
    )
