"""The benchmark's traces are what its header says: tokens sampled, unique, computed per call, and laid in chains."""

import sys
from pathlib import Path

import pytest

from tracegrad.trainer.packing import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import trainer_shapes as shapes

# trained, unique, per call; by hand:
GOLDEN = {
    # A turn adds 80 tokens: contexts of 80 k - 1. Two runs share the task of 48.
    "agent_8_turns": (2 * 8 * 32, 2 * (8 * 80 - 1) - 48, 2 * sum(80 * turn - 1 for turn in range(1, 9))),
    # A conversation: 112 + 32, then twice 64 + 32: contexts of 143, 239, 335; the two runs share 112 in each role.
    "workflow_3_roles": (2 * 9 * 32, 2 * 3 * 335 - 3 * 112, 2 * 3 * (143 + 239 + 335)),
    # Path of the plan 192; a branch adds 16 + 31, the join 256 + 47; the two runs share the prompt of 160.
    "fan_out_8": (
        2 * (32 + 8 * 32 + 48),
        2 * (192 + 8 * 47 + 303) - 160,
        2 * (191 + 8 * (192 + 47) + 192 + 303),
    ),
    "group_of_8": (8 * 32, 640 + 8 * 31, 8 * 671),
    "nothing_shared": (8 * 32, 8 * 255, 8 * 255),
}


@pytest.mark.parametrize("kind", shapes.SHAPES)
def test_counts_by_hand(kind: str) -> None:
    calls = shapes.SHAPES[kind]()
    found = (shapes.trained_tokens(calls), shapes.unique_tokens(calls), shapes.per_call_tokens(calls))
    assert found == GOLDEN[kind]


def test_the_ideal_ratios_are_those_of_the_issue() -> None:
    ratio = {kind: per_call / unique for kind, (_, unique, per_call) in GOLDEN.items()}
    rounded = {kind: round(value, 2) for kind, value in ratio.items()}
    assert rounded == {
        "agent_8_turns": 4.67,
        "workflow_3_roles": 2.57,
        "fan_out_8": 3.28,
        "group_of_8": 6.05,
        "nothing_shared": 1.0,
    }


@pytest.mark.parametrize("kind", shapes.SHAPES)
def test_our_packing_counts_as_the_benchmark_does_and_computes_what_is_unique(kind: str, make_choice) -> None:
    calls = shapes.SHAPES[kind]()
    choices = [make_choice(call.prompt_ids, call.token_ids, call_id=str(n)) for n, call in enumerate(calls)]
    stats = pack(choices, row_tokens=4096).stats
    assert (stats.n_edges, stats.n_unique, stats.n_naive) == GOLDEN[kind]
    assert stats.n_nodes == stats.n_unique


@pytest.mark.parametrize("kind", shapes.SHAPES)
@pytest.mark.parametrize("lay", [shapes.chains, shapes.one_by_one])
def test_rows_without_trees_train_every_sampled_token_once(kind: str, lay) -> None:
    calls = shapes.SHAPES[kind]()
    rows = lay(calls)
    trained = [
        tuple(token for token, counts in zip(row.completion_ids, row.trained, strict=True) if counts) for row in rows
    ]
    assert sum(map(len, trained)) == shapes.trained_tokens(calls)
    assert sorted(token for row in trained for token in row) == sorted(t for call in calls for t in call.token_ids)


def test_chains_join_the_turns_of_a_conversation_and_nothing_else() -> None:
    n_rows = {kind: len(shapes.chains(make())) for kind, make in shapes.SHAPES.items()}
    assert n_rows == {
        "agent_8_turns": 2,
        "workflow_3_roles": 6,
        "fan_out_8": 18,
        "group_of_8": 8,
        "nothing_shared": 8,
    }
    (row, _) = shapes.chains(shapes.agent_8_turns())
    assert (len(row.prompt_ids), len(row.completion_ids)) == (48, 8 * 32 + 7 * 48)


def test_the_traces_are_the_same_each_time() -> None:
    assert shapes.fan_out_8() == shapes.fan_out_8()
