"""Whether an exported folder is whole: nothing in it names what was deleted while the export read the store.

An export reads page by page, children before their parents, so that writers take nothing from it. A deletion does: the
calls of a run were read, and then the run was gone, or a stub. The files are looked at once they are written, the ids
alone. Refuses a folder whose import a constraint would stop. Called by `parquet`, which has found pyarrow.
"""

from pathlib import Path
from typing import Any

from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.schema import CONTENT_DELETED

_NAMES = (
    *((child, "run_id", "runs") for child in ("rewards", "calls", "spans")),
    ("runs", "group_id", "groups"),
    ("runs", "task_id", "tasks"),
    ("groups", "task_id", "tasks"),
)
"""Which column of a table names rows of which other one."""
_WITHIN_A_RUN = (("calls", "span_id", "spans"), ("rewards", "call_id", "calls"))
"""As `_NAMES`, of what only goes while its run stays where this becomes a stub."""


def check_whole(folder: Path) -> None:
    """Raises Conflict where a row names one that is in no file."""
    import pyarrow.compute as pc

    runs = _ids(folder, "runs", "run_id", "error")
    stubs = runs.filter(pc.equal(runs["error"], CONTENT_DELETED))["run_id"]
    for child, key, parent in _NAMES:
        named = _ids(folder, child, key)[key].drop_null()
        missing = named.filter(pc.invert(pc.is_in(named, value_set=_ids(folder, parent, key)[key])))
        _refuse(folder, child, parent, missing.unique().to_pylist())
    for child, key, parent in _WITHIN_A_RUN if len(stubs) else ():
        there = set(_of_runs(folder, parent, key, stubs))
        lost = {one for one in _of_runs(folder, child, key, stubs) if one[1] is not None and one not in there}
        _refuse(folder, child, parent, [f"{name} of {run_id}" for run_id, name in sorted(lost)])


def _refuse(folder: Path, child: str, parent: str, missing: list[str]) -> None:
    if missing:
        raise Conflict(
            f"{len(missing)} of the {parent} that {child} name were deleted during the export, such as {missing[0]}: "
            f"{folder} is not whole and cannot be imported; export again into a new folder while nothing is deleted"
        )


def _of_runs(folder: Path, table: str, key: str, run_ids: Any) -> list[tuple[str, str | None]]:
    """Return (run, key) of the rows of these runs."""
    import pyarrow.compute as pc

    found = _ids(folder, table, "run_id", key)
    found = found.filter(pc.is_in(found["run_id"], value_set=run_ids))
    return list(zip(found["run_id"].to_pylist(), found[key].to_pylist(), strict=True))


def _ids(folder: Path, table: str, *columns: str) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(folder / f"{table}.parquet") as file:
        return file.read(columns=list(columns))
