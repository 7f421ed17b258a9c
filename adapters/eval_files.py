"""The file of an evaluation: its report and a row per run, written whole, read back to compare with.

Refuses files that are not one. Outputs are kept as JSON text, shortened: enough to look at, not to train on.
Called by `tracegrad eval`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tracegrad.adapters.evaluation import EvalReport, EvalRow
from tracegrad.adapters.rollout_errors import EvalFileError

_EXCERPT = 4000


def write(path: Path, report: EvalReport, rows: Sequence[EvalRow]) -> None:
    """Write the report and the rows; the file appears whole or not at all."""
    shown = [asdict(row) | {"scores": dict(row.scores), "output": excerpt(row.output)} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"report": asdict(report), "rows": shown}, indent=1, ensure_ascii=False))
    partial.replace(path)


def read_rows(path: Path) -> list[EvalRow]:
    """Read the rows of a file that `write` made.

    Raises:
        EvalFileError: it cannot be read or is something else.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return [EvalRow(**row) for row in rows]
    except OSError as error:
        raise EvalFileError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvalFileError(f"{path} is not a file that `tracegrad eval --out` wrote ({error})") from error


def excerpt(output: Any) -> str | None:
    """Return an app's output as JSON text of at most 4,000 characters; what is not JSON is shown by its str()."""
    if output is None:
        return None
    text = json.dumps(output, default=str, ensure_ascii=False)
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
