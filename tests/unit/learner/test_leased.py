"""What a lease trains on is what it trained on when it was made: its shares, after a kill too."""

from pathlib import Path

import pytest

from tracegrad.tracestore.records import Attribution, LateAttribution, Lease, Span
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import JOB, MODEL, first_version, make_call, make_reward, make_rule
from tracegrad.trainer.leased import leased_shares
from tracegrad.trainer.shares import Shares

RULE = make_rule(min_group=1)
PLANNER = Span(span_id="planner", run_id="r", name="planner", namespace="planner:1", superstep=1)
WRITER = Span(span_id="writer", run_id="r", name="writer", namespace="writer:2", superstep=2)


@pytest.mark.parametrize("hook", [True, False])
def test_a_tree_that_comes_after_the_lease_changes_no_share(tmp_path: Path, hook: bool) -> None:
    """A reward on the writer reaches the planner through the graph: for the next lease, not for the one reclaimed.

    With the hook the calls know their spans, and the tree says how they follow; without, it says that too.
    """
    store = open_store(f"sqlite:///{tmp_path}/trace.db")
    version = first_version(store)
    for at, span in ((1_000.0, PLANNER), (1_010.0, WRITER)):
        told = Span(span_id=span.span_id, run_id="r", name=span.name) if hook else None
        who = Attribution(run_id="r", run_source="header", role=span.name, role_source="header", span=told)
        store.append_calls([make_call(span.name, "r", version=version, at=at, attribution=who)])
    store.add_rewards([make_reward("w", "r", call_id="writer")])
    store.end_run("r", status="closed", ended_by="explicit")
    store.register_job(JOB, [MODEL], {})
    lease = store.lease(JOB, RULE, groups=1, lease_s=60, step=1, epoch=0, seed=7)
    assert lease is not None
    before = shares(store, lease)
    store.put_spans([PLANNER, WRITER])
    store.attribute_late(
        [LateAttribution(source="langsmith", call_id=name, run_id="r", span_id=name) for name in ("planner", "writer")]
    )
    again = store.reclaim(JOB, 60)
    assert again is not None and again.plan == lease.plan
    assert shares(store, again) == before
    assert before.n_trained_tokens == 3
    store.release(again)
    newest = store.lease(JOB, RULE, groups=1, lease_s=60, step=1, epoch=0, seed=7)
    assert newest is not None
    assert shares(store, newest).n_trained_tokens == 6
    store.close()


def shares(store: Store, lease: Lease) -> Shares:
    found, stale = leased_shares(store, lease, RULE, scope="graph", updates={MODEL: 0}, say=print)
    assert not stale
    return found
