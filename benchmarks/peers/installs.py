"""Virtual environments of the peers that the store is compared with: where they are kept, and how they get there.

Each has its own under ``${TRACEGRAD_CACHE:-~/.cache/tracegrad}/peer-<name>-<hash>``; the hash is of what is asked for
and of Python's version. About a minute each, once; 0.2 and 0.9 GB. Never a dependency of tracegrad. Refuses to leave
half an installation behind (its log stays, `install.log`). Called by `store_peers`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ASKED = {
    # 1.0.2 says that it wants Python 3.12 and runs on 3.11.
    "agentlightning": ("agentlightning==1.0.2", "--ignore-requires-python"),
    "mlflow": ("mlflow==3.17.2",),
}


def python_of(name: str) -> Path:
    """Return the interpreter that has the peer, installing it where it is missing. Raises CalledProcessError."""
    digest = hashlib.sha256(repr((sys.version_info[:2], ASKED[name])).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("TRACEGRAD_CACHE") or Path.home() / ".cache" / "tracegrad")
    target = cache / f"peer-{name}-{digest}"
    python = target / "bin" / "python"
    if not (target / "complete").exists():
        print(f"installing {ASKED[name][0]} in {target}", file=sys.stderr, flush=True)
        shutil.rmtree(target, ignore_errors=True)
        venv.create(target, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        with (target / "install.log").open("w") as log:
            subprocess.run([*pip, *ASKED[name]], check=True, stdout=log, stderr=log)
        (target / "complete").touch()
    return python
