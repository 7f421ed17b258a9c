"""Runs of three roles as a proxy would have recorded them under a role map: each call by the model of its role.

Each role is a node of the graph, one after another as they are named.
Every model computes what the base does when its job begins, so one learner of the base gives the logprobs of all.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import recorded_runs as recorded

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import Call, RunTrace, Span
from tracegrad.tracestore.store import Store

ROLES = ("planner", "writer", "critic")
FULL: dict[str, Any] = {"engine": {"dtype": "float32"}}
FROZEN = {**FULL, "trained": False}
MODES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "full sharing": ({"all": FULL}, dict.fromkeys(ROLES, "all")),
    "partial sharing": ({"a": FULL, "b": FULL}, {"planner": "a", "writer": "b", "critic": "a"}),
    "full separation": ({"p": FULL, "w": FULL, "c": FULL}, {"planner": "p", "writer": "w", "critic": "c"}),
    "adapter and full model": (
        {"base": FROZEN, "p": {"adapter": {"of": "base", "rank": 4}}, "w": FULL},
        {"planner": "p", "writer": "w", "critic": "base"},
    ),
    "adapter per role": (
        {"base": FROZEN, "p": {"adapter": {"of": "base", "rank": 4}}, "w": {"adapter": {"of": "base", "rank": 2}}},
        {"planner": "p", "writer": "w", "critic": "base"},
    ),
}


def mapped(config: Config, mode: str, base: Path, **trainer: Any) -> Config:
    """Return the configuration with the models and the role map of a mode, trained by one job."""
    models, roles = MODES[mode]
    raw = msgspec.to_builtins(config)
    raw["models"] = {
        name: model
        if "adapter" in model
        else {
            **model,
            "checkpoint": str(base),
            "engine": {**model["engine"], "url": f"http://127.0.0.1:{8000 + number}"},
        }
        for number, (name, model) in enumerate(models.items())
    }
    raw["trainer"] |= {"model": "", **trainer}
    return parse_config({**raw, "roles": roles})


def versions_of(store: Store, config: Config) -> dict[str, int]:
    """Return a version of every model of the configuration, made now where it has none."""
    found = {}
    for name in config.models:
        live, known = store.live_version(name), store.list_versions(name)
        version = live or (known[0] if known else None)
        if version is None:
            version = store.add_version(
                model=name,
                kind="initial",
                parent_id=None,
                checkpoint_path=config.models[config.held_by(name)].checkpoint,
                checkpoint_hash=name,
                step=0,
                job_id=None,
            )
        found[name] = version.version_id
    return found


def fill(
    store: Store, config: Config, groups: int, *, score: recorded.Score, seed: int = 0, roles: Any = ROLES
) -> None:
    """Put groups into the store in which these roles speak, each by the model that the configuration gives it."""
    versions = versions_of(store, config)

    def spoken(call: Call, role: str) -> Call:
        model = config.roles[role]
        version = versions[model]
        return replace(
            call,
            call_id=f"{call.attribution.run_id}-{role}",
            attribution=replace(call.attribution, role=role, span=_node(str(call.attribution.run_id), role)),
            model=model,
            version_dispatched=version,
            version_completed=version,
        )

    def as_mapped(trace: RunTrace) -> RunTrace:
        planner, writer = trace.calls
        by_role = {"planner": planner, "writer": writer, "critic": planner}
        return replace(trace, calls=tuple(spoken(by_role[role], role) for role in roles), rewards=trace.rewards[:1])

    made = recorded.recorded_groups(groups, score=score, seed=seed)
    recorded.fill(store, [replace(one, traces=tuple(map(as_mapped, one.traces))) for one in made])


def _node(run_id: str, role: str) -> Span:
    step = ROLES.index(role)
    return Span(span_id=f"{run_id}-{role}", run_id=run_id, name=role, namespace=f"{role}:{step}", superstep=step)
