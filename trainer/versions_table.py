"""What `tracegrad versions` shows: each version with its publishes, the gate's decisions and the evaluations.

As objects with everything, or as a table that fits 80 columns, with the reasons of what does not serve below it. Reads
the store, decides nothing. Called by `versions_command`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tracegrad.tracestore.store import Store

_REASONS = 5


def describe(store: Store, model: str | None = None) -> list[dict[str, Any]]:
    """Return every version, oldest first, as a JSON object with its `publishes` and `evaluations`."""
    publishes, evaluations = store.list_publishes(model), store.list_evaluations()
    found = store.list_versions(model)
    models = {version.model for version in found}
    live, pinned = {name: store.live_version(name) for name in models}, {name: store.pinned(name) for name in models}
    rows = []
    for version in found:
        alive, mine = live[version.model], version.version_id
        row = {**asdict(version), "live": alive is not None and alive.version_id == mine}
        row |= {"pinned": pinned[version.model] == mine}
        row["publishes"] = [asdict(p) for p in publishes if p.version_id == mine]
        row["evaluations"] = [asdict(e) for e in evaluations if mine in e.versions.values()]
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table: one line a version."""
    some = [name for name, key in (("model", "model"), ("job", "job_id")) if len({row[key] for row in rows}) > 1]
    made = Table(title="policy versions", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names = ("version", *some, "step", "state", "published", "probe", "gate")
    for name in names:
        right = name in ("version", "step")
        made.add_column(name, justify="right" if right else "left", no_wrap=name not in ("model", "job"))
    for row in rows:
        cells = _cells(row)
        made.add_row(*(cells[name] for name in names))
    return made


def reasons(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield why the newest versions that do not serve do not, the newest last."""
    told = [(row, _why(row["publishes"][-1])) for row in rows if row["publishes"]]
    for row, why in [(row, why) for row, why in told if why][-_REASONS:]:
        yield f"version {row['version_id']} {row['publishes'][-1]['state']}: {why}"


def _why(publish: dict[str, Any]) -> str | None:
    if publish["state"] == "rejected" and publish["decision"] is not None:
        return str(publish["decision"]["why"])
    return publish["error"] if publish["state"] in ("failed", "skipped") else None


def _cells(row: dict[str, Any]) -> dict[str, str]:
    last = row["publishes"][-1] if row["publishes"] else None
    report = (last and last["probe"]) or {}
    at = max(last["entered"].values()) if last else None
    return {
        "version": str(row["version_id"]),
        "model": row["model"],
        "job": row["job_id"] or "",
        "step": str(row["step"]),
        "state": _state(row, last),
        "published": "" if at is None else time.strftime("%m-%d %H:%M", time.localtime(at)),
        "probe": _probe(report, last),
        "gate": _gate(row, last),
    }


def _state(row: dict[str, Any], last: dict[str, Any] | None) -> str:
    if row["live"]:
        return "LIVE, pinned" if row["pinned"] else "LIVE"
    if row["kind"] == "canary":
        return "canary"
    if row["abandoned"]:
        return "abandoned"
    if not last:
        return "unpublished"
    return "was live" if last["state"] == "live" else str(last["state"])


def _probe(report: dict[str, Any], last: dict[str, Any] | None) -> str:
    seen = report.get("result") or {}
    if not seen:
        return "not probed" if last and last["state"] == "live" else ""
    away = seen.get("mean_abs_new")
    return seen["verdict"] if away is None else f"{seen['verdict']} {away:.2g}"


def _gate(row: dict[str, Any], last: dict[str, Any] | None) -> str:
    """The mean and its difference to the version that was live; of a version that served ungated, its evaluation."""
    decision = (last and last["decision"]) or {}
    if decision.get("mean") is not None:
        difference = decision["difference"]
        return f"{decision['mean']:.3g}" + ("" if difference is None else f" ({difference:+.2g})")
    if decision:
        return "not judged"
    means = [each["mean"] for each in row["evaluations"] if each["mean"] is not None]
    return f"{means[-1]:.3g}" if means else ""
