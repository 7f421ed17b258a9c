"""How rows are divided over the workers of a group: by tokens, whole, in turns that everybody takes part in."""

import random
from collections.abc import Callable

import pytest
import recorded_runs as recorded

from tracegrad.trainer.learner import Learner
from tracegrad.trainer.ranks import ALONE, Ranks, divided, slowest
from tracegrad.trainer.samples import build_batch


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 17])
def test_every_row_is_one_ranks_and_all_take_as_many_turns(size: int, count: int) -> None:
    tokens = [random.Random(count).randrange(1, 100) for _ in range(count)]
    shares = divided(tokens, size)
    assert len(shares) == size and len({len(share) for share in shares}) == 1
    assert sorted(index for share in shares for index in share if index is not None) == list(range(count))
    loads = [sum(tokens[index] for index in share if index is not None) for share in shares]
    assert max(loads, default=0) - min(loads, default=0) <= max(tokens, default=0)


def test_the_longest_rows_meet_in_one_turn() -> None:
    assert divided([5, 40, 3, 39, 4], 2) == [[1, 4, 2], [3, 0, None]]
    assert slowest([40, 39, 5, 4], 2, float) == 45.0


def test_a_worker_alone_takes_the_rows_as_they_are() -> None:
    assert ALONE.share([3, 1, 2], lambda tokens: tokens) == [3, 1, 2]
    assert ALONE.sums(1.0, 2.0) == (1.0, 2.0)


def test_each_rank_takes_its_own() -> None:
    rows = ["a" * 9, "b" * 5, "c" * 4]
    assert [Ranks(rank=rank, size=2).share(rows, len) for rank in (0, 1)] == [[rows[0], None], [rows[1], rows[2]]]


def test_rows_are_made_shorter_where_several_divide_them(learner: Callable[..., Learner]) -> None:
    """One row for one worker; for three three of about one length, and each token in one of them."""
    made = learner(batch={"row_tokens": 1024})
    traces = recorded.traces_of(recorded.recorded_groups(6, score=made.score))
    choices = build_batch(traces, recorded.RULE).choices
    alone = made.ppo.pack(choices)
    assert len(alone.rows) == 1
    made.policy.ranks = Ranks(rank=0, size=3)
    rows = made.ppo.pack(choices).rows
    assert len(rows) == 3
    assert sum(row.n_edges for row in rows) == alone.stats.n_edges
    assert max(row.n_nodes for row in rows) <= 1.4 * alone.stats.n_nodes / 3 + 1
