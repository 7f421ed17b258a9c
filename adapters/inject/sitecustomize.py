"""Python runs this at start-up in a program started by `tracegrad run`: its folder is first on PYTHONPATH.

It first runs the `sitecustomize` that it hides, if there is one, then attaches the process to the proxy. In a Python
where tracegrad is not installed it says so and leaves the program alone. Not imported by anything.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def _run_hidden() -> None:
    """Execute the sitecustomize further down the path, as if ours were not there."""
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry).resolve() != here])
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _attach() -> None:
    try:
        from tracegrad.adapters.attach import attach
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"tracegrad: {sys.executable} has no module {error.name!r}: its model calls are recorded without role and "
            "run; install tracegrad beside the program\n"
        )
    else:
        attach(os.environ)


try:
    _run_hidden()
finally:
    _attach()
