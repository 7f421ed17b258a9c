"""`module:attribute` from a command line: the app's graph and the reward function.

The current directory goes to the front of `sys.path`, as `python -m` would have it. A file path
(`examples/rag_qa/app.py:graph`) works as well: its folder goes on the path. Refuses names that do not import or do
not exist, with what would. The module runs with whatever environment is set when this is called: the caller sets
OPENAI_* and installs the hook first, because apps build their clients at import.
"""

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

from tracegrad.adapters.rollout_errors import EntryPointError


def load_entrypoint(spec: str, *, option: str) -> Any:
    """Import and return what `spec` names; `option` is the command line's name for it, used in messages.

    Raises:
        EntryPointError: the spec is malformed, the module cannot be imported, or it has no such attribute.
    """
    module_name, separator, attribute = spec.rpartition(":")
    if not separator or not module_name or not attribute:
        raise EntryPointError(f"{option} {spec!r} is not module:attribute (for example app:graph)")
    module = _import(_importable(module_name), option, spec)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            near = difflib.get_close_matches(part, [name for name in dir(target) if not name.startswith("_")], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise EntryPointError(f"{option} {spec!r}: {module_name} has no {part!r}{hint}")
        target = getattr(target, part)
    return target


def _importable(module_name: str) -> str:
    """Put the right folder on `sys.path` and return the module's dotted name."""
    folder, name = Path.cwd(), module_name
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        folder, name = path.parent, path.stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return name


def _import(name: str, option: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise EntryPointError(
                f"{option} {spec!r}: there is no module {error.name!r} in {Path.cwd()} or the environment"
            ) from error
        raise EntryPointError(f"{option} {spec!r}: importing {name} needs the module {error.name!r}") from error
    except ImportError as error:
        raise EntryPointError(f"{option} {spec!r}: importing {name} failed: {error}") from error
