"""Task files: JSON Lines of `{"id"?: str, "input": {...}, "reference"?: {...}}`, one task a line.

Refuses anything else: unknown keys, inputs that are not objects, NaN, two lines with one id. Every bad line is
named, not only the first. A task without an id gets one from its input's content, so the same line in another
file, or at another place in it, is the same task. Called by the rollout and evaluation commands.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tracegrad.adapters.rollout_errors import TaskFileError
from tracegrad.tracestore.records import Task

_KEYS = frozenset({"id", "input", "reference"})
_SHOWN = 20


def load_tasks(path: str | Path, *, project: str = "default") -> list[Task]:
    """Read a task file, in file order. Blank lines are skipped.

    Raises:
        TaskFileError: the file cannot be read, is empty, or has bad or duplicate lines (all of them named).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TaskFileError(f"cannot read the task file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskFileError(f"the task file {path} is not UTF-8 (byte {error.start})") from error
    return parse_tasks(text, origin=str(path), project=project)


def parse_tasks(text: str, *, origin: str = "tasks", project: str = "default") -> list[Task]:
    """Turn the text of a task file into tasks; `origin` is what messages call it.

    Raises:
        TaskFileError: as `load_tasks`.
    """
    tasks: list[Task] = []
    first_line: dict[str, int] = {}
    faults: list[str] = []
    for number, line in _lines(text):
        try:
            task = _read_line(line, project)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        if task.task_id in first_line:
            faults.append(f"line {number}: the same task as line {first_line[task.task_id]} (id {task.task_id})")
            continue
        first_line[task.task_id] = number
        tasks.append(task)
    if faults:
        raise TaskFileError(_summary(origin, faults))
    if not tasks:
        raise TaskFileError(f"{origin} has no tasks: write one JSON object a line, with an `input` object")
    return tasks


def content_id(value: Mapping[str, Any]) -> str:
    """Return the id of a task that was given none: a hash of its canonical JSON, so key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "task_" + hashlib.sha256(text.encode()).hexdigest()[:32]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): it also cuts at U+2028 and the like, which are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _read_line(line: str, project: str) -> Task:
    try:
        raw = json.loads(line, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"a {type(raw).__name__}, not an object")
    if unknown := sorted(raw.keys() - _KEYS):
        raise ValueError(f"unknown keys {', '.join(unknown)} (known: id, input, reference)")
    if not isinstance(raw.get("input"), dict):
        raise ValueError("`input` is missing or not an object")
    reference = raw.get("reference") or {}
    if not isinstance(reference, dict):
        raise ValueError(f'`reference` is not an object: write {{"answer": {json.dumps(reference)}}}')
    task_id = raw.get("id", content_id(raw["input"]))
    if not isinstance(task_id, str) or not task_id or len(task_id) > 200:
        raise ValueError("`id` must be a string of 1 to 200 characters")
    return Task(task_id=task_id, input=raw["input"], reference=reference, project=project)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _summary(origin: str, faults: list[str]) -> str:
    shown = "\n  ".join(faults[:_SHOWN])
    more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return f"{origin} has {len(faults)} bad line{'s' if len(faults) != 1 else ''}:\n  {shown}{more}"
