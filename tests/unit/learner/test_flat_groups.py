"""Groups in which nothing is learned: the doctor, from metadata, finds those that the trainer's credit counts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.tracestore.diagnosis_records import Extent
from tracegrad.tracestore.records import Attribution, Span
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import add_group, first_version, make_call, make_reward, make_rule, take
from tracegrad.trainer.credit import assign
from tracegrad.trainer.returns import Scope
from tracegrad.trainer.samples import build_batch

Given = tuple[int, str, float, str | None]
"""A reward: of which member, its name and value, and what it stands on: None, a role, or a role and a turn ("a2")."""

SCOPES: tuple[Scope, ...] = ("call", "role", "graph")
EQUAL: list[Given] = [(0, "f1", 1.0, None), (1, "f1", 1.0, None)]
TRADED: list[Given] = [(0, "f1", 1.0, None), (0, "em", 0.0, None), (1, "f1", 0.0, None), (1, "em", 1.0, None)]


@pytest.mark.parametrize(
    ("calls", "weights", "given"),
    [
        (["a", "a"], {}, EQUAL),
        (["a", "a"], {}, [(0, "f1", 1.0, None), (1, "f1", 0.5, None)]),
        (["a", "a"], {"f1": 1.0, "em": 1.0}, TRADED),
        (["a", "a"], {"f1": 1.0, "em": 3.0}, TRADED),
        (["a", "a"], {"f1": 1.0, "em": 0.0}, [*EQUAL, (0, "em", 0.0, None), (1, "em", 1.0, None)]),
        (["a", "a"], {"f1": 1.0}, [*EQUAL, (1, "style", 1.0, None)]),
        (["ab", "ab"], {}, [*EQUAL, (0, "f1", 0.5, "b"), (1, "f1", 0.5, "b")]),
        (["ab", "ab"], {}, [*EQUAL, (0, "f1", 0.5, "b"), (1, "f1", 0.0, "b")]),
        (["ab", "ab"], {}, [(0, "f1", 1.0, None), (1, "f1", 0.5, None), (1, "f1", 0.5, "b")]),
        (["ab", "a"], {}, EQUAL),
        (["ab", "c"], {}, EQUAL),
        (["ab", "c"], {}, [(0, "f1", 1.0, None), (1, "f1", 0.0, None)]),
        (["aa", "aa"], {}, [(0, "f1", 1.0, "a1"), (1, "f1", 1.0, "a1"), (0, "f1", 1.0, "a0"), (1, "f1", 1.0, "a0")]),
        (["aa", "aa"], {}, [(0, "f1", 1.0, "a0"), (0, "f1", 0.0, "a1"), (1, "f1", 0.0, "a0"), (1, "f1", 1.0, "a1")]),
        (["aa", "aa"], {}, [*EQUAL, (0, "f1", 0.5, "a1"), (1, "f1", 0.25, "a1")]),
    ],
)
def test_the_doctor_finds_what_the_trainer_counts(
    tmp_path: Path, calls: list[str], weights: Mapping[str, float], given: list[Given]
) -> None:
    """`calls`: per member the roles that called, one after another."""
    store = open_store(f"sqlite:///{tmp_path}/trace.db")
    for member, run_id in enumerate(add_group(store, size=len(calls))):
        for turn, role in enumerate(calls[member]):
            span = Span(span_id=f"{run_id}-{turn}", run_id=run_id, name=role, superstep=turn)
            place = Attribution(run_id=run_id, run_source="header", role=role, role_source="header", span=span)
            call = make_call(f"{run_id}-{role}{turn}", run_id, version=first_version(store))
            store.append_calls([replace(call, attribution=place)])
        for number, (_, name, value, on) in enumerate(one for one in given if one[0] == member):
            target: dict[str, Any] = {"role": on} if on is None or len(on) == 1 else {"call_id": f"{run_id}-{on}"}
            store.add_rewards([make_reward(f"{run_id} {number}", run_id, value, name=name, **target)])
        store.end_run(run_id, status="closed", ended_by="explicit")
    rule = make_rule(reward_names=tuple(sorted(weights)))
    traces = store.lease_traces(take(store, reward_names=rule.reward_names))
    for scope in SCOPES:
        credit = CreditConfig(advantage="grpo", scope=scope, reward_weights=weights)
        counted = assign(build_batch(traces, rule, scope=scope), credit).counts["n_zero_variance"]
        found = store.count_flat_groups(Extent(), rule, weights=weights, scope=scope)
        assert (scope, found.compared, found.flat) == (scope, 1, counted)
    store.close()
