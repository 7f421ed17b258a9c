"""What every backend must show of staleness: how old what a version sampled is."""

from tracegrad.tracestore.branches import Live
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import JOB, MODEL, add_group, finish_run, live_version, make_rule


def ready_within(store: Store, bound: int) -> int:
    """Return how many groups are ready for the tests' job under this bound."""
    return store.backlog(JOB, make_rule(max_staleness=bound)).ready_groups


class StalenessContract:
    """Law 8: staleness is bounded."""

    def test_stale_groups_are_not_leased(self, store: Store) -> None:
        """live step - oldest step that sampled the group <= max_staleness; a version that is not live is no measure."""
        old = live_version(store, step=0)
        runs = add_group(store)
        finish_run(store, runs[0], version=old.version_id)
        live_version(store, step=2)
        newer = live_version(store, step=3)
        finish_run(store, runs[1], version=newer.version_id)
        assert [ready_within(store, bound) for bound in (2, 3)] == [0, 1]
        store.add_version(
            model=MODEL, kind="step", parent_id=None, checkpoint_path="", checkpoint_hash="", step=9, job_id=None
        )
        assert ready_within(store, 3) == 1

    def test_what_abandoned_weights_sampled_is_as_old_as_they_are_far_from_what_is_live(self, store: Store) -> None:
        """Step 8 that left the line at step 5 counts as step 2; a branch that has no kept ancestor, by its own."""
        base = live_version(store, step=5)
        branch = [base.version_id]
        for step in (6, 8):
            made = store.add_version(
                model=MODEL,
                kind="step",
                parent_id=branch[-1],
                checkpoint_path="",
                checkpoint_hash=f"b{step}",
                step=step,
                job_id=None,
            )
            branch.append(made.version_id)
        for run_id in add_group(store):
            finish_run(store, run_id, version=branch[-1])
        assert ready_within(store, 0) == 1
        for version_id in branch[1:]:
            store.abandon_version(version_id)
        assert [ready_within(store, bound) for bound in (2, 3)] == [0, 1]
        assert store.live([MODEL]) == Live({MODEL: 5}, {branch[1]: 4, branch[2]: 2})
        assert store.live(["other"]) == Live({})
        store.abandon_version(base.version_id)
        assert store.live([MODEL]).abandoned == {}
