"""What may import what, beyond the import-linter contracts: heavy libraries stay out of light rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

_SCIENCE = {"torch", "ray", "transformers", "vllm", "numpy"}
_APP_SIDE = _SCIENCE | {"sqlalchemy", "aiohttp", "langgraph"}
LIGHT = {
    "tracegrad.adapters.hook": _APP_SIDE,
    "tracegrad.adapters.client": _APP_SIDE,
    "tracegrad.adapters.langgraph": _APP_SIDE - {"langgraph"},
    "tracegrad.adapters.cli": _APP_SIDE,
    "tracegrad.adapters.proxy.command": _SCIENCE | {"langgraph"},
    "tracegrad.tracestore.store": _SCIENCE | {"langgraph", "openai", "starlette", "aiohttp"},
    "tracegrad.trainer.engine": _SCIENCE,
    "tracegrad.trainer.publish": _SCIENCE,
    "tracegrad.trainer.command": _SCIENCE - {"numpy"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert LIGHT[module] & set(done.stdout.split()) == set()


def test_no_example_app_imports_tracegrad() -> None:
    apps = sorted((ROOT / "examples").glob("*/app.py"))
    assert apps
    for app in apps:
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(app.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert "tracegrad" not in imported, f"{app} is not an unmodified app"


def test_only_what_runs_with_the_engines_interpreter_imports_vllm() -> None:
    importers = set()
    for package in ("tracestore", "adapters", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] == "vllm" for name in names):
                    importers.add(path.name)
    assert importers == {"worker_extension.py", "weight_receiver.py", "cuda_sender.py", "engine_spans.py"}
