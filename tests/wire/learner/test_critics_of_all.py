"""`credit.bootstrap` in jobs on a real store: whose critics' values the credit of several models is made of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recorded_roles as spoken
import recorded_runs as recorded
from offline_training import train
from watched_steps import Step, watched

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.store import Store
from tracegrad.trainer.credit import token_starts
from tracegrad.trainer.gae import gae

Configure = Callable[..., Config]
ByCall = dict[tuple[str, str], np.ndarray]
LAMBDA = 0.6


def job(configure: Configure, llama: Path, mode: str, bootstrap: str, name: str = "test") -> Config:
    """Two steps, credited along the graph as if the run were one sequence."""
    credit = {"scope": "graph", "normalise": "off", "gae_lambda": LAMBDA, "turn_lambda": LAMBDA, "bootstrap": bootstrap}
    algorithm = {"credit": {"advantage": "gae", **credit}}
    return spoken.mapped(configure(steps=2, job=name, algorithm=algorithm), mode, llama)


def by_call(steps: list[Step], arrays: list[np.ndarray]) -> ByCall:
    """(Run, role) -> what the arrays, one a model, say of the tokens of its call."""
    found = {}
    for step, array_N in zip(steps, arrays, strict=True):
        starts = token_starts(step.samples.choices)
        for choice, part_T in zip(step.samples.choices, np.split(array_N, starts[1:-1]), strict=True):
            found[choice.run_id, str(choice.role)] = part_T
    return found


def one_sequence(values: ByCall, rewards: dict[str, float], critics: list[tuple[str, ...]]) -> ByCall:
    """The twin: in each run, GAE over the concatenated tokens of the roles that know each other's values."""
    found = {}
    for run_id, reward in rewards.items():
        for roles in critics:
            parts = [values[run_id, role] for role in roles]
            paid = np.zeros(sum(map(len, parts)))
            paid[-1] = reward
            flat = gae(paid, np.concatenate(parts), gamma=1.0, gae_lambda=LAMBDA)
            cuts = np.cumsum([len(part) for part in parts])[:-1]
            found |= {(run_id, role): part for role, part in zip(roles, np.split(flat, cuts), strict=True)}
    return found


def farthest(one: ByCall, other: ByCall, role: str) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[key] - other[key]).max()) for key in one if key[1] == role)


@pytest.mark.parametrize("bootstrap", ["own", "all"])
@pytest.mark.parametrize(
    ("mode", "alone"),
    [
        ("full separation", [("planner",), ("writer",), ("critic",)]),
        ("partial sharing", [("planner", "critic"), ("writer",)]),
        ("adapter per role", [("planner",), ("writer",)]),
        ("adapter and full model", [("planner",), ("writer",)]),
    ],
)
def test_credit_is_gae_over_the_tokens_whose_values_it_may_know(
    configure: Configure,
    llama: Path,
    store: Store,
    score: recorded.Score,
    monkeypatch: pytest.MonkeyPatch,
    *,
    mode: str,
    alone: list[tuple[str, ...]],
    bootstrap: str,
) -> None:
    """At the second step, when critics say something. A frozen role (of the adapters' modes) has no value."""
    config = job(configure, llama, mode, bootstrap)
    spoken.fill(store, config, 4, score=score)
    seen = watched(monkeypatch)
    train(config, store)
    steps = seen.steps[len(seen.steps) // 2 :]
    assert len(steps) == len(config.trained_models())
    values = by_call(steps, [np.asarray(step.before.proximal and step.before.proximal.values_N) for step in steps])
    rewards = {run_id: given[0].value for run_id, given in steps[0].samples.rewards.items()}
    together = [tuple(role for role in spoken.ROLES if any(role in roles for roles in alone))]
    twins = {
        "own": one_sequence(values, rewards, alone),
        "all": one_sequence(values, rewards, together),
    }
    found = by_call(steps, [step.credit.advantages_N for step in steps])
    for role in together[0]:
        assert farthest(found, twins[bootstrap], role) < 1e-12
    assert farthest(twins["own"], twins["all"], "planner") > 1e-3
    assert farthest(twins["own"], twins["all"], together[0][-1]) == 0.0, "nothing follows it that has a value"


def test_one_model_learns_the_same_to_the_bit(
    configure: Configure, llama: Path, store: Store, score: recorded.Score
) -> None:
    made = []
    for bootstrap in ("own", "all"):
        config = job(configure, llama, "full sharing", bootstrap, name=bootstrap)
        if not made:
            spoken.fill(store, config, 4, score=score)
        train(config, store)
        made.append([version.checkpoint_hash for version in store.list_versions("all") if version.job_id == bootstrap])
    assert made[0] == made[1] and len(made[0]) == 3
