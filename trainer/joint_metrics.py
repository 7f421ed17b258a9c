"""The numbers of one step over all models: of one model its own, of several what they add up to, and each one's own.

Counts add up; means are weighted by trained tokens; a ratio of counts is that of the sums; what is a greatest value, or
of the whole step, is the greatest; seconds are those of the slowest, for groups run in parallel. What no model has
stays absent (law 6). Called by the controller; `step_metrics` and `ppo` make a model's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tracegrad.trainer.results import StepResult
from tracegrad.trainer.samples import excluded_by_reason
from tracegrad.trainer.shares import Shares
from tracegrad.trainer.step_metrics import with_account

_GREATEST = frozenset(
    (
        "runs",
        "silent_steps",
        "memory_bytes",
        "ratio_max",
        "weight_max",
        "staleness_max",
        "updates",
        "seconds",
        "workers_restarted",
    )
)


def joint_metrics(results: Mapping[str, StepResult], shares: Shares) -> dict[str, Any]:
    """Return the metrics of a step; `tokens_excluded` is of every call of its runs, also those to no model of the job.

    With several models each one's own stand under `models`, what trained nothing with what it lost. A role whose
    calls are of several models (it was mapped anew) is joined like these.
    """
    own = {
        model: {**(results[model].metrics if model in results else with_account({}, samples))}
        for model, samples in shares.by_model.items()
    }
    of_role: dict[str, list[Mapping[str, Any]]] = {}
    for metrics in own.values():
        for role, numbers in metrics.pop("roles").items():
            of_role.setdefault(role, []).append(numbers)
    roles = {role: _joined(each, [one.get("tokens_trained", 0) for one in each]) for role, each in of_role.items()}
    joint = _joined(list(own.values()), [metrics["tokens_trained"] for metrics in own.values()])
    if joint.get("tokens_computed"):  # of all tokens, whichever model each is of
        joint["efficiency"] = joint["tokens_unique"] / joint["tokens_computed"]
    several = {"models": own} if len(shares.by_model) > 1 else {}
    return {**joint, "roles": roles, **several, "tokens_excluded": excluded_by_reason(shares.consumption)}


def _joined(each: Sequence[Mapping[str, Any]], weights: Sequence[int], greatest: bool = False) -> dict[str, Any]:
    joined = {}
    for name in dict.fromkeys(name for metrics in each for name in metrics):
        known = [(metrics[name], weight) for metrics, weight in zip(each, weights, strict=True) if name in metrics]
        joined[name] = _one(known, greatest=greatest or name in _GREATEST)
    return joined


def _one(known: Sequence[tuple[Any, int]], *, greatest: bool) -> Any:
    """Join (value, weight) of the models that have the number."""
    values = [value for value, _ in known]
    if isinstance(values[0], Mapping):
        return _joined(values, [weight for _, weight in known], greatest)
    numbers = [(value, weight) for value, weight in known if value is not None]
    values = [value for value, _ in numbers]
    if len(values) < 2:
        return values[0] if values else None
    if greatest:
        return max(values)
    if all(isinstance(value, int) for value in values):
        return sum(values)
    return sum(value * weight for value, weight in numbers) / sum(weight for _, weight in numbers)
