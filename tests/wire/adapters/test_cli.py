"""The `tracegrad` command: lazy subcommands, helps in step, plain errors."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tracegrad.adapters import cli
from tracegrad.tracestore.errors import NotFound

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS: dict[str, str] = PROJECT["entry-points"][cli.GROUP]


def test_the_helps_name_every_command() -> None:
    assert set(cli.HELPS) == set(ENTRY_POINTS)
    assert set(cli._commands()) >= set(ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_each_help_is_the_first_line_of_its_command(name: str) -> None:
    module, function = ENTRY_POINTS[name].split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    functions = [
        node for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, ast.FunctionDef)
    ]
    (command,) = [node for node in functions if node.name == function]
    assert (ast.get_docstring(command) or "").split("\n")[0] == cli.HELPS[name]


def test_help_imports_no_subcommand() -> None:
    code = (
        "import sys; from tracegrad.adapters.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "loaded = {m for m in sys.modules if m.startswith('tracegrad.')}\n"
        "assert loaded == {'tracegrad.adapters', 'tracegrad.adapters.cli'}, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ENTRY_POINTS)


def _with(monkeypatch: pytest.MonkeyPatch, **commands: Any) -> None:
    class Loaded(EntryPoint):
        def load(self) -> Any:
            if isinstance(commands[self.name], Exception):
                raise commands[self.name]
            return commands[self.name]

    monkeypatch.setattr(cli, "_commands", lambda: {name: Loaded(name, "m:f", cli.GROUP) for name in commands})


def _command(error: BaseException) -> click.Command:
    def body() -> None:
        raise error

    return click.Command("x", callback=body)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (NotFound("no run run_1; list them with `tracegrad runs`"), 1, "tracegrad: no run run_1; list them"),
        (KeyboardInterrupt(), 130, ""),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), 1, "pip install 'tracegrad[train]'"),
        (click.UsageError("which?"), 2, "which?"),
    ],
)
def test_errors_are_plain(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str) -> None:
    _with(monkeypatch, x=_command(error))
    result = CliRunner().invoke(cli.main, ["x"])
    assert result.exit_code == code
    assert says in result.stderr and "Traceback" not in result.output


def test_a_subcommand_whose_extra_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, train=ModuleNotFoundError("No module named 'ray'", name="ray"))
    result = CliRunner().invoke(cli.main, ["train"])
    assert (result.exit_code, result.stderr) == (1, "Error: train needs ray: pip install 'tracegrad[train]'\n")
    assert CliRunner().invoke(cli.main, ["--help"]).exit_code == 0


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, x=_command(KeyError("bug")), y=ModuleNotFoundError("No module named 'odd'", name="odd"))
    assert isinstance(CliRunner().invoke(cli.main, ["x"]).exception, KeyError)
    assert isinstance(CliRunner().invoke(cli.main, ["y"]).exception, ModuleNotFoundError)


def test_the_version_is_the_distributions() -> None:
    assert CliRunner().invoke(cli.main, ["--version"]).output == f"tracegrad, version {PROJECT['version']}\n"
