"""Reward functions of rollouts and evaluations: `fn(task, output)` and what it may return.

A number (named `reward`), a mapping of names to numbers, a sequence of `RewardSpec` (or mappings with the same
keys) for rewards on a role or a call, or None for "no reward". Refuses NaN, infinity and two rewards with one name and
target: a missing reward is not 0 and a broken one is not a reward (law 6). Called by the runs' executor.
"""

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tracegrad.adapters.rollout_errors import RewardShapeError
from tracegrad.tracestore.records import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSpec:
    """One named reward of a run; with `role`, of that role's choices in it only; with `call_id`, of that call's."""

    name: str
    value: float
    role: str | None = None
    call_id: str | None = None

    @property
    def target(self) -> dict[str, str]:
        """The field of a posted reward that says what it stands on; none of a run's."""
        named = {"role": self.role, "call_id": self.call_id}
        return {field: value for field, value in named.items() if value is not None}


RewardResult = float | Mapping[str, float] | Sequence[RewardSpec | Mapping[str, Any]] | None
RewardFunction = Callable[[Task, Any], RewardResult | Awaitable[RewardResult]]

_SPEC_KEYS = frozenset(field.name for field in fields(RewardSpec))


async def score(function: RewardFunction, task: Task, output: Any, *, call: Callable[..., Awaitable[Any]]) -> Any:
    """Call a reward function, sync or async; `call(function, *args)` runs a sync one off the event loop."""
    if inspect.iscoroutinefunction(function):
        return await function(task, output)
    result = await call(function, task, output)
    return await result if inspect.isawaitable(result) else result


def read_rewards(result: Any) -> tuple[RewardSpec, ...]:
    """Turn what a reward function returned into rewards; None gives none.

    Raises:
        RewardShapeError: another type, a value that is not a finite number, or one name twice on one target.
    """
    specs = tuple(_specs(result))
    seen: set[tuple[str, str | None, str | None]] = set()
    for spec in specs:
        _check(spec)
        if (key := (spec.name, spec.role, spec.call_id)) in seen:
            where = "".join(f" on {field.removesuffix('_id')} {value!r}" for field, value in spec.target.items())
            raise RewardShapeError(f"the reward function returned {spec.name!r}{where} twice for one run")
        seen.add(key)
    return specs


def run_scores(specs: Sequence[RewardSpec]) -> dict[str, float]:
    """Return the rewards by display name: `name`, or `role:name` for a role's (as `RunSummary` has them).

    Those of single calls are left out: they say nothing of the run.
    """
    of_runs = [spec for spec in specs if spec.call_id is None]
    return {spec.name if spec.role is None else f"{spec.role}:{spec.name}": float(spec.value) for spec in of_runs}


def _specs(result: Any) -> list[RewardSpec]:
    if result is None:
        return []
    if _is_number(result):
        return [RewardSpec(name="reward", value=float(result))]
    if isinstance(result, Mapping):
        return [RewardSpec(name=name, value=value) for name, value in result.items()]
    if isinstance(result, Sequence) and not isinstance(result, str | bytes):
        return [_spec(item) for item in result]
    raise RewardShapeError(
        f"the reward function returned a {type(result).__name__}; return a number, a mapping of names to numbers, "
        "a sequence of RewardSpec, or None for no reward"
    )


def _spec(item: Any) -> RewardSpec:
    if isinstance(item, RewardSpec):
        return item
    if isinstance(item, Mapping) and {"name", "value"} <= item.keys() <= _SPEC_KEYS:
        return RewardSpec(**item)
    raise RewardShapeError(
        f"{item!r} in a reward list is not a RewardSpec or a mapping of name, value, and role or call_id"
    )


def _check(spec: RewardSpec) -> None:
    if not isinstance(spec.name, str) or not spec.name:
        raise RewardShapeError(f"{spec.name!r} is not a reward name: it must be a non-empty string")
    if spec.role is not None and (not isinstance(spec.role, str) or not spec.role):
        raise RewardShapeError(f"reward {spec.name!r}: {spec.role!r} is not a role name")
    if spec.call_id is not None and (not isinstance(spec.call_id, str) or not spec.call_id):
        raise RewardShapeError(f"reward {spec.name!r}: {spec.call_id!r} is not the id of a call")
    if len(spec.target) > 1:
        raise RewardShapeError(f"reward {spec.name!r} names a role and a call: name one target")
    if not _is_number(spec.value) or not math.isfinite(spec.value):
        raise RewardShapeError(f"reward {spec.name!r} is {spec.value!r}: it must be a finite number")


def _is_number(value: Any) -> bool:
    # numpy and torch scalars are numbers too, and are not instances of int or float.
    if isinstance(value, bool | int | float):
        return True
    return hasattr(value, "__float__") and not hasattr(value, "__len__") and getattr(value, "ndim", 0) == 0
