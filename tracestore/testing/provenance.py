"""What every backend must answer of weights and calls: which calls made them, and which of them answered a call."""

import pytest

from tracegrad.tracestore.errors import Conflict, NotFound
from tracegrad.tracestore.provenance import CallUse, MadeFrom, TrainedCall
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    account,
    first_version,
    live_version,
    make_call,
    make_commit,
    ready_group,
    take,
)


class ProvenanceContract:
    """From weights to calls and back."""

    def two_steps(self, store: Store) -> tuple[int, int, int]:
        """Return the versions: the first one, that of step 1 (one call left out), that of step 2, its child."""
        base = live_version(store).version_id
        made = base
        versions = [base]
        for step in (1, 2):
            ready_group(store, f"g{step}", version=base)
            lease = take(store, step=step)
            excluded = {"call-g1-1": "greedy"} if step == 1 else {}
            commit = make_commit(account(store, lease, excluded=excluded), hash_=f"{step}{step}-sha", parent=made)
            made = store.commit_step(lease, commit)[MODEL].version_id
            versions.append(made)
        return versions[0], versions[1], versions[2]

    def test_which_calls_made_these_weights(self, store: Store) -> None:
        """Those of its own step, call by call; with its ancestors' in all."""
        base, first, second = self.two_steps(store)
        origin = store.version_origin(second)
        assert (origin.version.step, origin.version.parent_id, origin.epoch) == (2, first, 0)
        assert origin.own == MadeFrom(steps=1, runs=2, choices=2, trained_tokens=6, excluded_tokens=0)
        assert origin.all_steps == MadeFrom(steps=2, runs=4, choices=4, trained_tokens=9, excluded_tokens=3)
        assert origin.answered_calls == 0
        nothing = MadeFrom(steps=0, runs=0, choices=0, trained_tokens=0, excluded_tokens=0)
        untrained = store.version_origin(base)
        assert (untrained.own, untrained.all_steps, untrained.epoch, untrained.answered_calls) == (
            nothing,
            nothing,
            None,
            4,
        )
        assert store.version_calls(base) == []

        def taken(run: str, trained: int, excluded: int, *reasons: str) -> TrainedCall:
            return TrainedCall(
                call_id=f"call-{run}",
                run_id=run,
                role="answerer",
                model=MODEL,
                version_id=base,
                choices=1,
                trained_tokens=trained,
                excluded_tokens=excluded,
                reasons=reasons,
            )

        assert store.version_calls(first) == [taken("g1-0", 3, 0), taken("g1-1", 0, 3, "greedy")]
        assert store.version_calls(second, limit=1) == [taken("g2-0", 3, 0)]
        assert store.version_calls(second, limit=1, after="call-g2-0") == [taken("g2-1", 3, 0)]
        assert store.version_calls(second, after="call-g2-1") == []
        with pytest.raises(NotFound):
            store.version_calls(99)
        with pytest.raises(NotFound, match="start again"):
            store.version_calls(second, after="nobody")

    def test_a_version_is_found_by_checkpoint_or_step(self, store: Store) -> None:
        """The beginning of a hash is enough where it is one."""
        _, first, second = self.two_steps(store)
        assert store.find_versions(checkpoint="11") == store.find_versions(job_id=JOB, step=1) == {MODEL: first}
        assert store.find_versions(checkpoint="22-sha") == {MODEL: second}
        for nothing in ("%", "3"):
            with pytest.raises(NotFound, match="tracegrad versions"):
                store.find_versions(checkpoint=nothing)
        with pytest.raises(NotFound, match="step 3 of job"):
            store.find_versions(job_id=JOB, step=3)
        with pytest.raises(Conflict, match="more of its hash"):
            store.find_versions(checkpoint="")

    def test_what_became_of_a_call(self, store: Store) -> None:
        """Each step that took it, of every job and epoch; a call that came after the lease was taken by none."""
        _, first, _ = self.two_steps(store)
        store.append_calls([make_call("later", "g1-0", version=first_version(store))])
        lease = take(store, step=3, epoch=1)
        again = store.commit_step(lease, make_commit(account(store, lease), hash_="33-sha"))[MODEL].version_id
        assert store.call_uses("call-g1-1") == [
            CallUse(
                job_id=JOB, epoch=0, step=1, version_id=first, trained_tokens=0, excluded_tokens=3, reasons=("greedy",)
            ),
            CallUse(job_id=JOB, epoch=1, step=3, version_id=again, trained_tokens=3, excluded_tokens=0),
        ]
        assert [one.call_id for one in store.version_calls(first)] == ["call-g1-0", "call-g1-1"]
        assert [one.call_id for one in store.version_calls(again)] == ["call-g1-0", "later", "call-g1-1"]
        assert store.version_origin(again).epoch == 1
        assert store.call_uses("nobody") == []

    def test_deleted_calls_are_still_told(self, store: Store) -> None:
        """A checkpoint knows what made it whatever became of the content."""
        _, first, _ = self.two_steps(store)
        before = (store.version_calls(first), store.version_origin(first))
        store.delete_runs(["g1-0", "g1-1"])
        assert (store.version_calls(first), store.version_origin(first)) == before
        with pytest.raises(NotFound, match="content of call 'call-g1-0' was deleted"):
            store.get_call("call-g1-0")
