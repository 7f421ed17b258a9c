"""What every backend must show of staleness: how old what a version sampled is."""

from tracegrad.tracestore.branches import Live
from tracegrad.tracestore.records import VersionKind
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import JOB, MODEL, add_group, finish_run, go_live, live_version, make_rule


def ready_within(store: Store, bound: int) -> int:
    """Return how many groups are ready for the tests' job under this bound."""
    return store.backlog(JOB, make_rule(max_staleness=bound)).ready_groups


class StalenessContract:
    """Law 8: staleness is bounded."""

    def test_stale_groups_are_not_leased(self, store: Store) -> None:
        """Updates of what is live - of the oldest that sampled <= max_staleness; what is not live is no measure."""
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
        """Of two updates after the fifth, it counts as the third; a branch that has no kept ancestor, by its own."""
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
        assert [ready_within(store, bound) for bound in (1, 2)] == [0, 1]
        assert store.live([MODEL]) == Live({MODEL: 5}, {MODEL: base.line}, {branch[1]: 4, branch[2]: 3})
        assert store.live(["other"]) == Live({})
        store.abandon_version(base.version_id)
        assert store.live([MODEL]).abandoned == {}

    def test_steps_that_trained_other_models_make_nothing_older(self, store: Store) -> None:
        """The model's first update is made by step 7 of its job: what the weights before it sampled is one update old.

        A canary is no update.
        """
        first = live_version(store)
        runs = add_group(store)
        finish_run(store, runs[0], version=first.version_id)
        made = [first]
        kinds: tuple[tuple[VersionKind, int], ...] = (("canary", 0), ("step", 7), ("step", 9))
        for kind, step in kinds:
            version = store.add_version(
                model=MODEL,
                kind=kind,
                parent_id=made[-1].version_id,
                checkpoint_path="",
                checkpoint_hash=f"{kind}-{step}",
                step=step,
                job_id=None,
            )
            made.append(version)
        assert [version.updates for version in made] == [0, 0, 1, 2]
        go_live(store, made[2])
        finish_run(store, runs[1], version=made[2].version_id)
        assert [ready_within(store, bound) for bound in (0, 1)] == [0, 1]
        go_live(store, made[3])
        assert [ready_within(store, bound) for bound in (1, 2)] == [0, 1]

    def test_what_another_line_of_versions_sampled_is_as_old_as_both_are_long(self, store: Store) -> None:
        """A new job that begins anew with the base weights: what 3 updates of another line sampled is 3 old, then 4.

        By its number it would be fresher than what is live. Online and at the step alike.
        """
        other = [live_version(store, step).version_id for step in (0, 3)]
        for name, version_id in zip(("base", "trained"), other, strict=True):
            for run_id in add_group(store, name):
                finish_run(store, run_id, version=version_id)
        anew = live_version(store)
        assert anew.line == anew.version_id
        assert [ready_within(store, bound) for bound in (0, 2, 3)] == [1, 1, 2]
        live = store.live([MODEL])
        assert [live.counted(store.get_version(one)) for one in (*other, anew.version_id)] == [0, -3, 0]
        made = store.add_version(
            model=MODEL,
            kind="step",
            parent_id=anew.version_id,
            checkpoint_path="",
            checkpoint_hash="",
            step=1,
            job_id=None,
        )
        go_live(store, made)
        assert made.line == anew.version_id
        assert [ready_within(store, bound) for bound in (0, 1, 3, 4)] == [0, 1, 1, 2]
