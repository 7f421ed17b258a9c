"""The style's budgets: sizes of modules, functions, classes, configuration; where broad excepts may stand."""

import ast
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from tracegrad.tracestore import algorithm, config

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("tracestore", "adapters", "trainer")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# The boundaries at which anything at all may arrive, and must be turned into an answer or a record.
BROAD_EXCEPT_ALLOWED: set[tuple[str, str]] = {
    ("adapters/cli.py", "invoke"),  # a command: its error becomes one line and an exit code
    ("adapters/execution.py", "_attempt"),  # the user's graph and reward function: their error is recorded on the run
    ("adapters/rewards.py", "_failures"),  # the same, for `wrap`
    ("adapters/hook.py", "mark"),  # inside the user's app: attribution must never break a request
    ("adapters/plain_json.py", "read"),  # inside the user's app: an object that cannot be looked at
    ("adapters/proxy/app.py", "_http"),  # a request: answered 500 and logged, the server lives on
    ("tracestore/group_commit.py", "_commit"),  # the writer thread: whoever waits hears of it
    ("trainer/cuda_sender.py", "main"),  # a process of its own: whoever asked is told, and it ends
    ("tracestore/store.py", "open_store"),  # closes what was opened and raises again
}


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_modules_stay_under_the_cap_and_their_median_is_small() -> None:
    sizes = {path: path.read_text().count("\n") for path in MODULES if "migrations/versions" not in str(path)}
    assert {str(path): size for path, size in sizes.items() if size > 500} == {}
    ordered = sorted(sizes.values())
    assert ordered[len(ordered) // 2] <= 200, "the median module has outgrown its budget"


def test_functions_and_classes_stay_under_their_caps() -> None:
    too_long: dict[str, int] = {}
    sizes: list[int] = []
    for path in MODULES:
        if "migrations" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        for function in _functions(tree):
            sizes.append(_lines(function))
            if _lines(function) > 80:
                too_long[f"{path.name}:{function.name}"] = _lines(function)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and _lines(node) > 300:
                too_long[f"{path.name}:{node.name}"] = _lines(node)
    assert too_long == {}
    sizes.sort()
    assert sizes[int(len(sizes) * 0.9)] <= 40


def test_every_module_opens_with_a_docstring() -> None:
    bare = [str(path) for path in MODULES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))]
    assert bare == []


def test_names_that_mean_nothing_are_not_used() -> None:
    banned = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
    assert [str(path) for path in MODULES if path.stem in banned] == []


@pytest.mark.parametrize(
    "section",
    sorted(
        {
            s
            for s in [*vars(config).values(), *vars(algorithm).values()]
            if isinstance(s, type) and issubclass(s, msgspec.Struct)
        },
        key=lambda s: s.__name__,
    ),
    ids=lambda s: s.__name__,
)
def test_configuration_sections_are_small(section: type[msgspec.Struct]) -> None:
    assert len(msgspec.structs.fields(section)) <= 12


def test_broad_excepts_stand_only_at_the_listed_boundaries() -> None:
    found: set[tuple[str, str]] = set()
    for path in MODULES:
        for function in _functions(ast.parse(path.read_text())):
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler) and _is_broad(node):
                    found.add((str(path.relative_to(ROOT)), function.name))
    assert found == BROAD_EXCEPT_ALLOWED


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return bool(names & {"Exception", "BaseException"})


def test_helpers_of_tests_and_benchmarks_have_names_of_their_own() -> None:
    """Both folders are on the path of a session that tests a benchmark: of two modules the first would be meant."""
    names = Counter(path.name for folder in ("tests/support", "benchmarks") for path in (ROOT / folder).glob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []
