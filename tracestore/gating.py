"""The publish gate's rule: what its evaluation found, and whether the candidate may serve. Pure, but for no clock.

A score that is missing is not 0 (law 6), so failed runs count by their own bound and in no mean. The comparison with
the live version is paired by task and one-sided: the candidate passes where, at the stated confidence, it is not worse
by more than the allowed drop. What cannot be judged does not pass (law 9). The publisher decides, the proxy reads the
terms, the evaluator names its runs by `run_prefix`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tracegrad.tracestore.bootstrap import bootstrap_difference
from tracegrad.tracestore.config import GateRule
from tracegrad.tracestore.records import Json, Publish

_OF_A_GATE = re.compile(r"gate(\d+)_")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateTerms:
    """What a publish must pass, as proxies read it. `engines`: the URLs of those that get the candidate first.

    `beside`: they serve it under a name of its own (`publishes.REHEARSED`), and what is live on as before. `together`
    are the publishes that one evaluation decides on; the store fills it in.
    """

    share: float
    engines: tuple[str, ...]
    timeout_s: float
    beside: bool = False
    together: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what the store keeps."""
        return {**asdict(self), "engines": list(self.engines), "together": list(self.together)}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvaluation:
    """An evaluation of a version over a task file. `values`: task id -> mean score; `mean` None: nothing was scored.

    `versions`: model -> version of all that were judged as one; `model` and `version_id` are the first of them.
    """

    evaluation_id: int
    model: str
    version_id: int
    publish_id: int | None
    name: str
    tasks_hash: str
    score: str
    n_runs: int
    n_failed: int
    values: Mapping[str, float]
    mean: float | None
    low: float | None
    high: float | None
    error: str | None
    started_at: float
    created_at: float
    versions: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether a candidate serves, and why. `judged` is False where there was no evaluation to go by: try it again."""

    passed: bool
    judged: bool
    why: str
    evaluation_id: int | None = None
    baseline_id: int | None = None
    mean: float | None = None
    baseline_mean: float | None = None
    difference: float | None = None
    at_worst: float | None = None
    """The lower bound of the difference at the rule's confidence."""
    n_paired: int = 0
    n_failed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return what the store keeps."""
        return asdict(self)


def unjudged(why: str) -> Decision:
    """Return the decision where no evaluation came to be: it fails closed."""
    return Decision(passed=False, judged=False, why=why)


def judge(rule: GateRule, candidate: StoredEvaluation, baseline: StoredEvaluation | None) -> Decision:
    """Apply the rule. `baseline` is the live version's evaluation on the same tasks, None where nothing is live."""
    if candidate.error is not None:
        return unjudged(f"its evaluation {candidate.evaluation_id} could not be made: {candidate.error}")
    compared = _compare(rule, candidate, baseline)
    why = _complaint(rule, candidate, baseline, compared)
    return Decision(
        passed=why is None,
        judged=True,
        why=why or _praise(candidate, compared),
        evaluation_id=candidate.evaluation_id,
        baseline_id=None if baseline is None else baseline.evaluation_id,
        mean=candidate.mean,
        baseline_mean=None if baseline is None else baseline.mean,
        difference=None if compared is None else compared.difference,
        at_worst=None if compared is None else compared.at_worst,
        n_paired=0 if compared is None else compared.n,
        n_failed=candidate.n_failed,
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    difference: float
    at_worst: float
    n: int


def _compare(rule: GateRule, candidate: StoredEvaluation, baseline: StoredEvaluation | None) -> _Compared | None:
    tasks = sorted(candidate.values.keys() & baseline.values.keys()) if baseline is not None else []
    if baseline is None or not tasks:
        return None
    after, before = [candidate.values[task] for task in tasks], [baseline.values[task] for task in tasks]
    if rule.confidence <= 0.5:
        mean = sum(a - b for a, b in zip(after, before, strict=True)) / len(tasks)
        return _Compared(mean, mean, len(tasks))
    # The lower end of a two-sided interval at 2c - 1 is the one-sided bound at c.
    interval = bootstrap_difference(after, before, level=2 * rule.confidence - 1)
    return _Compared(interval.mean, interval.low, len(tasks))


def _complaint(
    rule: GateRule, candidate: StoredEvaluation, baseline: StoredEvaluation | None, compared: _Compared | None
) -> str | None:
    score, failed, runs = candidate.score, candidate.n_failed, candidate.n_runs
    if candidate.mean is None:
        return f"none of its {runs} runs has the score {score!r}"
    if failed > rule.max_failed * runs:
        return f"{failed} of {runs} runs failed or have no score (at most {rule.max_failed:.0%} may)"
    if rule.minimum is not None and candidate.mean < rule.minimum:
        return f"mean {score} {candidate.mean:.4g} is below the minimum {rule.minimum:g}"
    if rule.max_drop is not None and baseline is not None and compared is None:
        return f"it shares no scored task with evaluation {baseline.evaluation_id} of the live version"
    if rule.max_drop is not None and compared is not None and compared.at_worst < -rule.max_drop:
        bound = (
            f" (perhaps {compared.at_worst:+.4g}, at confidence {rule.confidence:g})" if rule.confidence > 0.5 else ""
        )
        return (
            f"{score} differs by {compared.difference:+.4g} from the live version's over {compared.n} tasks{bound}; "
            f"allowed is a drop of {rule.max_drop:g}"
        )
    return None


def _praise(candidate: StoredEvaluation, compared: _Compared | None) -> str:
    against = "" if compared is None else f", {compared.difference:+.4g} to the live version over {compared.n} tasks"
    return f"mean {candidate.score} {candidate.mean:.4g}{against}"


def evaluator_of(models: Iterable[str]) -> str:
    """Return what an evaluator of these models is registered for: it judges all of them as one."""
    return " + ".join(sorted(models))


def run_prefix(publish_id: int) -> str:
    """Return what the ids of the runs begin with that evaluate the candidate of a publish (then `_` and a hash).

    Of several that are judged together, `publish_id` is the first.
    """
    return f"gate{publish_id}"


def publish_of_run(run_id: str | None) -> int | None:
    """Return the publish whose candidate a run evaluates, by its id; None for every other run."""
    found = None if run_id is None else _OF_A_GATE.match(run_id)
    return None if found is None else int(found[1])


def rejections_in_a_row(publishes: Sequence[Publish]) -> int:
    """Return how many candidates were rejected since one last went live; `publishes` of a model, oldest first."""
    count = 0
    for publish in reversed(publishes):
        if publish.state == "live":
            break
        count += publish.state == "rejected"
    return count


def was_rejected(decision: Json | None) -> bool:
    """Return whether a stored decision is a judgement against the version, not merely that nobody judged it."""
    return decision is not None and decision["judged"] and not decision["passed"]
