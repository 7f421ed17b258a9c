"""Packing: conservation, ancestry, sharing; against a trie built the naive way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegrad.tracestore.records import Choice, LeaseRule, ModelCalls, Reward
from tracegrad.trainer.batches import packed_row, probe_row, split_groups
from tracegrad.trainer.errors import PackingError
from tracegrad.trainer.packing import pack
from tracegrad.trainer.samples import build_batch

TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=5)
CHOICES = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), TOKENS), min_size=0, max_size=12)


def contexts_of(choice):
    """Every (context, target) pair that the choice trains, the naive way."""
    return [(choice.prompt_ids + choice.token_ids[:i], token) for i, token in enumerate(choice.token_ids)]


def ancestors(row, node):
    return [j for j in range(node + 1) if node < row.end_T[j]]


def check_row(row):
    for node in range(row.n_nodes):
        path = ancestors(row, node)
        assert [row.depth_T[j] for j in path] == list(range(len(path)))
    children = {}
    for node in range(row.n_nodes):
        parent = ancestors(row, node)[-2] if row.depth_T[node] else -1
        assert (parent, row.token_ids_T[node]) not in children, "two children with one token: not merged"
        children[parent, row.token_ids_T[node]] = node


@settings(max_examples=150, deadline=None)
@given(shapes=CHOICES, row_tokens=st.sampled_from([1, 4, 8, 1000]), cost=st.sampled_from([0.0, 0.1]))
def test_every_trained_token_is_exactly_one_edge_in_its_own_context(make_choice, shapes, row_tokens, cost):
    choices = [make_choice(prompt, tokens) for prompt, tokens in shapes]
    packing = pack(choices, row_tokens=row_tokens, attention_cost=cost)
    wanted = [(b, i, *pair) for b, c in enumerate(choices) for i, pair in enumerate(contexts_of(c))]
    found = []
    for row in packing.rows:
        check_row(row)
        longest = max(row.depth_T) + 1
        assert row.n_nodes <= row_tokens or longest == row.n_nodes
        for e in range(row.n_edges):
            context = tuple(int(row.token_ids_T[j]) for j in ancestors(row, row.edge_parent_E[e]))
            found.append((row.edge_choice_E[e], row.edge_offset_E[e], context, row.edge_token_E[e]))
    assert sorted(found) == sorted(wanted)
    flat = np.concatenate([row.edge_index_E for row in packing.rows]) if packing.rows else np.zeros(0)
    assert sorted(flat) == list(range(sum(len(c.token_ids) for c in choices)))


@settings(max_examples=100, deadline=None)
@given(shapes=CHOICES)
def test_computed_tokens_are_the_nodes_of_the_trie_where_all_fits(make_choice, shapes):
    choices = [make_choice(prompt, tokens) for prompt, tokens in shapes]
    nodes = {c.prompt_ids[:k] for c in choices if c.token_ids for k in range(1, len(c.prompt_ids) + 1)}
    nodes |= {context for c in choices for context, _ in contexts_of(c)}
    stats = pack(choices, row_tokens=10_000).stats
    assert stats.n_nodes == stats.n_unique == len(nodes)
    assert stats.n_naive == sum(len(c.prompt_ids) + len(c.token_ids) - 1 for c in choices if c.token_ids)
    assert stats.n_edges == sum(len(c.token_ids) for c in choices)


def test_a_group_on_one_prompt_by_hand(make_choice):
    # Prompt 1 2; answers (7 8 9), (7 8 4), (7 8 9) again, (6). Contexts: 1 2 7 8 (three users) and 1 2 (one user).
    # Nodes in pre-order: 1, 2, 7, 8. Last tokens 9, 4, 9, 6 need no node.
    answers = [(7, 8, 9), (7, 8, 4), (7, 8, 9), (6,)]
    packing = pack([make_choice((1, 2), a) for a in answers], row_tokens=100)
    (row,) = packing.rows
    assert row.token_ids_T.tolist() == [1, 2, 7, 8]
    assert row.depth_T.tolist() == [0, 1, 2, 3]
    assert row.end_T.tolist() == [4, 4, 4, 4]
    edges = sorted(zip(row.edge_choice_E, row.edge_offset_E, row.edge_parent_E, row.edge_token_E, strict=True))
    assert edges == [
        *[(0, 0, 1, 7), (0, 1, 2, 8), (0, 2, 3, 9)],
        *[(1, 0, 1, 7), (1, 1, 2, 8), (1, 2, 3, 4)],
        *[(2, 0, 1, 7), (2, 1, 2, 8), (2, 2, 3, 9)],
        (3, 0, 1, 6),
    ]
    assert (packing.stats.n_naive, packing.stats.n_unique) == (4 + 4 + 4 + 2, 4)


def test_a_fork_has_two_subtrees_that_do_not_see_each_other(make_choice):
    (row,) = pack([make_choice((1,), (2, 3, 0)), make_choice((1,), (4, 5, 0))], row_tokens=100).rows
    assert row.token_ids_T.tolist() == [1, 2, 3, 4, 5]
    assert row.end_T.tolist() == [5, 3, 3, 5, 5]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert packed_row(row).mask()[0, 0].int().tolist() == expected


def test_the_turns_of_a_conversation_merge_into_one_path(make_choice):
    first = make_choice((1, 2), (3, 4))
    second = make_choice((1, 2, 3, 4, 5), (6, 7))
    packing = pack([second, first], row_tokens=100)
    (row,) = packing.rows
    assert row.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert packing.stats.n_unique == 6
    assert sorted(zip(row.edge_index_E, row.edge_parent_E, strict=True)) == [(0, 4), (1, 5), (2, 1), (3, 2)]


def test_two_interleaved_agents_of_six_turns_are_two_rows(make_call, make_trace):
    # A turn adds 4 tokens that are read and 3 that are sampled: turn k ends at 7 k, a conversation at 42.
    # A row for each call: 2 agents * (7 + 14 + 21 + 28 + 35 + 42) = 2 * 147 = 294 tokens in 12 rows.
    # Each conversation once: 2 * 42 = 84 tokens in 2 rows. Trained are 2 * 6 * 3 = 36, each once.
    # The last token of a row is a target and no context, so nothing is computed for it: 294 - 12 = 282 and 84 - 2 = 82.
    calls, said = [], {"asker": (), "helper": ()}
    for turn in range(6):
        for agent, first in (("asker", 100), ("helper", 200)):
            read, sampled = (tuple(range(first + 7 * turn + a, first + 7 * turn + b)) for a, b in ((0, 4), (4, 7)))
            choice = Choice(index=0, token_ids=sampled, logprobs=(-0.5,) * 3, finish_reason="stop")
            prompt = said[agent] + read
            calls.append(make_call(f"{agent}{turn}", role=agent, prompt_ids=prompt, choices=(choice,)))
            said[agent] = prompt + sampled
    paid = Reward(reward_id="r", run_id="run_a", name="f1", value=1.0, source="t")
    rule = LeaseRule(trained=(ModelCalls(model="main"),), max_staleness=1, min_group=1)
    choices = build_batch([make_trace(calls=calls, rewards=[paid])], rule).choices
    assert [choice.role for choice in choices] == ["asker", "helper"] * 6, "one run, the agents in turn"

    apart = [pack([choice], row_tokens=42) for choice in choices]
    assert (sum(len(one.rows) for one in apart), sum(one.stats.n_nodes + 1 for one in apart)) == (12, 294)
    together = pack(choices, row_tokens=42)
    assert (len(together.rows), sum(row.n_nodes + 1 for row in together.rows)) == (2, 84)
    assert (together.stats.n_naive, together.stats.n_nodes, together.stats.n_unique) == (282, 82, 82)
    assert sorted(np.concatenate([row.edge_index_E for row in together.rows]).tolist()) == list(range(36))
    for row, agent in zip(together.rows, said, strict=True):
        assert row.token_ids_T.tolist() == list(said[agent][:-1])
    assert [row.n_nodes for row in pack(choices, row_tokens=512).rows] == [82], "two trees lie in one row where it fits"


def test_a_tree_that_must_be_split_repeats_the_least(make_choice):
    # Two groups of two answers. Prompts of 4 with a first token in common: 1 2 2 2 and 1 3 3 3; answers of 3 (2 nodes).
    # All in one: 1 + 3 + 4 + 3 + 4 = 15 nodes. Two rows of <= 8: cut between the groups repeats 1 token (16 in all);
    # any other cut repeats 4 or leaves a row over 8.
    prompts = [(1, 2, 2, 2), (1, 2, 2, 2), (1, 3, 3, 3), (1, 3, 3, 3)]
    choices = [make_choice(p, (5 + i, 5 + i, 5 + i)) for i, p in enumerate(prompts)]
    assert [row.n_nodes for row in pack(choices, row_tokens=15).rows] == [15]
    split = pack(choices, row_tokens=10)
    assert [row.n_nodes for row in split.rows] == [8, 8]
    assert (split.stats.n_unique, split.stats.n_nodes) == (15, 16)


def test_the_cost_of_attention_decides_whether_to_repeat_a_prefix(make_choice):
    choices = [make_choice((1, 2, 2, 2), (5, 6)), make_choice((1, 3, 3, 3), (5, 6))]
    # One row: 9 nodes, cost 9 + 81 a. Two rows of 5: 10 + 50 a (+ 2 rows). Equal at a = 1 / 31.
    assert len(pack(choices, row_tokens=100, attention_cost=1 / 32).rows) == 1
    assert len(pack(choices, row_tokens=100, attention_cost=1 / 30).rows) == 2
    assert len(pack(choices, row_tokens=100, attention_cost=1 / 30, row_cost=1.0).rows) == 1


def test_a_row_that_is_not_easy_is_cut_where_nothing_is_computed_again(make_choice):
    """Two prompts of 20 that share nothing, one answered twice: 22 + 21 nodes; cut between the prompts, not inside."""
    first, second = tuple(range(20)), tuple(range(20, 40))
    choices = [make_choice(first, (41, 42)), make_choice(first, (43, 44)), make_choice(second, (45, 46))]

    def rows(easy_tokens):
        return [row.n_nodes for row in pack(choices, row_tokens=100, row_cost=5.0, easy_tokens=easy_tokens).rows]

    assert rows(None) == rows(43) == rows(24) == [43]
    assert rows(23) == rows(22) == rows(10) == [22, 21]


def test_a_context_longer_than_a_row_gets_its_own(make_choice):
    rows = pack([make_choice(range(20), (1, 2)), make_choice((9,), (1,))], row_tokens=8).rows
    assert sorted(row.n_nodes for row in rows) == [1, 21]


def test_selected_choices_keep_their_places_in_the_batch(make_choice):
    choices = [make_choice((1,), (2, 3)), make_choice((1,), (4,)), make_choice((1,), (5, 6))]
    (row,) = pack(choices, row_tokens=100, select=[2]).rows
    assert row.edge_choice_E.tolist() == [2, 2]
    assert row.edge_index_E.tolist() == [3, 4]


def test_packing_is_deterministic_and_refuses_a_choice_without_context(make_choice):
    choices = [make_choice((1, i % 3), (i % 5, i % 2, i)) for i in range(30)]
    first, second = (pack(choices, row_tokens=16) for _ in range(2))
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a.token_ids_T.tobytes() == b.token_ids_T.tobytes()
        assert a.edge_index_E.tobytes() == b.edge_index_E.tobytes()
    with pytest.raises(PackingError, match="without context"):
        pack([make_choice((), (1,))], row_tokens=8)
    with pytest.raises(PackingError, match="row_tokens"):
        pack(choices, row_tokens=0)


def test_slots_are_the_distinct_parents_and_temperatures(make_choice):
    hot = make_choice((1, 2), (3, 4), temperature=2.0)
    cold = make_choice((1, 2), (3, 5), temperature=0.5)
    twin = make_choice((1, 2), (9,), temperature=0.5)
    row = packed_row(pack([hot, cold, twin], row_tokens=100).rows[0])
    pairs = list(zip(row.slot_parent_S.tolist(), row.slot_temperature_S.tolist(), strict=True))
    assert pairs == [(1, 0.5), (1, 2.0), (2, 0.5), (2, 2.0)]
    assert row.slot_parent_S[row.edge_slot_E].tolist() == row.edge_parent_E.tolist()
    assert row.slot_temperature_S[row.edge_slot_E].tolist() == row.edge_temperature_E.tolist()


def test_a_probe_row_keeps_the_order_of_its_sequences():
    row = probe_row([[5, 6, 7], [1, 2], [5, 6, 8, 9]])
    assert row.edge_token_E.tolist() == [7, 2, 9]


def test_minibatches_hold_whole_groups_and_every_choice_once(make_choice):
    choices = [
        make_choice(run_id=f"r{g}{m}", group_id=f"g{g}", tokens=(1,) * (g + 1)) for m in range(3) for g in range(5)
    ]
    for parts in (1, 2, 4, 9):
        for seed in (None, 0, 1):
            split = split_groups(choices, parts, seed=seed)
            assert sorted(i for part in split for i in part) == list(range(15))
            assert len(split) == min(parts, 5)
            owners = [{choices[i].group_id for i in part} for part in split]
            assert sum(len(owner) for owner in owners) == 5
            assert split == split_groups(choices, parts, seed=seed)
    assert split_groups([], 3) == []
