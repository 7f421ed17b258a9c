"""Virtual environments of the peers that we are compared with: where they are kept, and how they get there.

Each has its own under ``${TRACEGRAD_CACHE:-~/.cache/tracegrad}/peer-<name>-<hash>``; the hash is of what is asked for
and of Python's version. About a minute each, once; 0.2, 0.9 and 1.5 GB. Never a dependency of tracegrad. Refuses to
leave half an installation behind (its log stays, `install.log`). Called by `store_peers` and `trainer_speed`.
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
    "trl": ("trl==1.16.0", "torch==2.13.0", "transformers==5.19.0", "accelerate==1.15.0"),
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
