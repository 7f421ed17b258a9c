"""A run is as old as its oldest token; what is too old is dropped whole, and every token stays accounted for."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tracegrad.tracestore.reasons import TOO_STALE
from tracegrad.tracestore.records import Consumption, Reward
from tracegrad.trainer.run_graph import CallNode, linked
from tracegrad.trainer.samples import Samples
from tracegrad.trainer.shares import Shares
from tracegrad.trainer.staleness import without_stale_runs


def samples_of(choices):
    consumption = [
        Consumption(
            run_id=choice.run_id,
            call_id=choice.call_id,
            choice_index=0,
            trained_tokens=len(choice.token_ids),
            excluded_tokens=0,
            reason=None,
        )
        for choice in choices
    ]
    greedy = replace(consumption[0], choice_index=1, trained_tokens=0, excluded_tokens=4, reason="greedy")
    runs = {choice.run_id for choice in choices}
    return Samples(
        choices=tuple(choices),
        consumption=(*consumption, greedy),
        rewards={r: (Reward(reward_id=r, run_id=r, name="score", value=1.0, source="t"),) for r in runs},
        run_groups=dict.fromkeys(runs, "group_1"),
        graphs={run: linked([CallNode(call_id=run, role=None, model="m")], []) for run in runs},
    )


def updates_of(version_id):
    return version_id * 10  # an id is no number of updates


def of_one(samples, *, own, max_staleness, live=None):
    """A job of one model."""
    shares = Shares(by_model={"m": samples}, consumption=samples.consumption)
    serves = {} if live is None else {"m": live}
    left, stale = without_stale_runs(shares, updates_of, updates={"m": own}, live=serves, max_staleness=max_staleness)
    assert left.consumption == left.by_model["m"].consumption
    return left.by_model["m"], stale


def test_nothing_is_dropped_within_the_bound(make_choice):
    samples = samples_of([make_choice(run_id="a", version_id=3), make_choice(run_id="b", version_id=4)])
    left, stale = of_one(samples, own=40, max_staleness=10)
    assert (left, stale) == (replace(samples, version_ages={3: 10, 4: 0}), frozenset())


def test_while_serving_is_held_back_the_bound_counts_from_what_is_live_and_ages_from_what_is_trained(make_choice):
    """Weights of 90 updates, while those of 40 serve: their samples are leased, so they are trained, 50 old."""
    samples = samples_of([make_choice(run_id="a", version_id=4), make_choice(run_id="b", version_id=2)])
    left, stale = of_one(samples, own=90, live=40, max_staleness=10)
    assert stale == {"b"}
    assert left.version_ages == {4: 50, 2: 70}


def test_a_run_is_as_old_as_its_oldest_token(make_choice):
    fresh = make_choice(run_id="a", version_id=4)
    mixed = [
        make_choice(run_id="b", version_id=4),
        make_choice((1, 2), (3, 4, 5), run_id="b", call_id="late", version_id=4, version_spans=((0, 2), (1, 4))),
    ]
    left, stale = of_one(samples_of([fresh, *mixed]), own=40, max_staleness=10)
    assert stale == {"b"}
    assert left.choices == (fresh,)
    assert set(left.rewards) == set(left.run_groups) == set(left.graphs) == {"a"}
    assert left.excluded_tokens == {TOO_STALE: 5, "greedy": 4}
    assert left.n_trained_tokens == 2


def test_a_run_that_is_too_old_for_one_model_is_dropped_for_all(make_choice):
    """Each model's age is its own: w has had 10 updates, p 40; the run b is too old for p."""
    planner = samples_of([make_choice(run_id="a", version_id=4), make_choice(run_id="b", version_id=2)])
    writer = samples_of([make_choice(run_id=run, call_id=f"w-{run}", version_id=1) for run in "ab"])
    shares = Shares(by_model={"p": planner, "w": writer}, consumption=planner.consumption + writer.consumption)
    left, stale = without_stale_runs(shares, updates_of, updates={"p": 40, "w": 10}, live={}, max_staleness=10)
    assert stale == {"b"}
    assert [[c.run_id for c in samples.choices] for samples in left.by_model.values()] == [["a"], ["a"]]
    assert [samples.version_ages for samples in left.by_model.values()] == [{2: 20, 4: 0}, {1: 0}]
    assert left.n_trained_tokens == sum(samples.n_trained_tokens for samples in left.by_model.values())
    assert {entry.run_id for entry in left.consumption if entry.reason == TOO_STALE} == {"b"}


@settings(max_examples=50, deadline=None)
@given(versions=st.lists(st.integers(0, 6), min_size=1, max_size=6), own=st.integers(0, 80), bound=st.integers(0, 30))
def test_every_token_stays_accounted_for(make_choice, versions, own, bound):
    choices = [make_choice(run_id=f"run{i % 3}", call_id=f"c{i}", version_id=v) for i, v in enumerate(versions)]
    samples = samples_of(choices)
    left, stale = of_one(samples, own=own, max_staleness=bound)

    def total(of):
        return sum(entry.trained_tokens + entry.excluded_tokens for entry in of.consumption)

    assert total(left) == total(samples)
    assert left.n_trained_tokens == sum(len(choice.token_ids) for choice in left.choices)
    assert {c.run_id for c in left.choices}.isdisjoint(stale)
    assert all(own - updates_of(v) <= bound for choice in left.choices for v in choice.token_versions)
