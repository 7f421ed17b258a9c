"""What every backend must find of groups for the doctor: what they lack, and whose members earned the same."""

from tracegrad.tracestore.diagnosis_records import Extent, FlatGroups, GroupCounts
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    MODEL,
    add_group,
    finish_run,
    make_reward,
    ready_group,
    sql,
)

ALL = Extent()


class GroupDiagnosisContract:
    """Counts of groups."""

    def test_groups_are_counted_once_by_what_they_lack(self, store: Store) -> None:
        """Whole ones lack nothing."""
        ready_group(store, "whole")
        first, second = add_group(store, "running")
        finish_run(store, first)
        first, second = add_group(store, "failed")
        finish_run(store, first)
        store.end_run(second, status="failed", ended_by="explicit")
        for run_id in add_group(store, "unrewarded"):
            finish_run(store, run_id, reward=None)
        ready_group(store, "short")
        sql(store, "UPDATE groups SET planned_size = 4 WHERE group_id = 'short'")
        assert store.count_groups(ALL) == GroupCounts(
            groups=5,
            missing=1,
            missing_example="short",
            running=1,
            failed=1,
            failed_example="failed",
            unrewarded=1,
            unrewarded_example="unrewarded",
        )
        assert store.count_groups(Extent(run_id="short-0")).missing == 1
        assert store.count_groups(Extent(run_id="whole-0")) == GroupCounts(groups=1)
        assert store.count_groups(Extent(project="default", models=(MODEL,), since=0.0)).groups == 5
        assert store.count_groups(Extent(project="elsewhere")).groups == 0

    def test_eval_groups_are_judged_by_nobody(self, store: Store) -> None:
        """They are never leased: what they lack, and that all of them earned the same, keeps nothing from training."""
        for number in range(2):
            for run_id in add_group(store, f"measured-{number}", purpose="eval"):
                finish_run(store, run_id)
        add_group(store, "unfinished", purpose="eval")
        add_group(store, "short", purpose="eval")
        sql(store, "UPDATE groups SET planned_size = 4 WHERE group_id = 'short'")
        ready_group(store, "trains")
        assert store.count_groups(ALL) == GroupCounts(groups=1)
        assert store.count_flat_groups(ALL) == FlatGroups(compared=1, flat=1, example="trains")
        assert store.count_groups(Extent(run_id="short-0")) == GroupCounts()

    def test_flat_groups_are_those_with_equal_rewards(self, store: Store) -> None:
        """By name and target, the current value of each; a lone member has nobody to be compared with."""
        ready_group(store, "flat")
        ready_group(store, "mended")
        store.add_rewards([make_reward("newer", "mended-0", 0.5)])
        ready_group(store, "outdated")
        store.add_rewards([make_reward("was", "outdated-0", 0.5), make_reward("is", "outdated-0", 1.0)])
        ready_group(store, "by role")
        store.add_rewards([make_reward(f"rr{n}", f"by role-{n}", float(n), role="answerer") for n in (0, 1)])
        ready_group(store, "by style")
        store.add_rewards([make_reward(f"rs{n}", f"by style-{n}", float(n), name="style") for n in (0, 1)])
        first, second = add_group(store, "lone")
        finish_run(store, first)
        finish_run(store, second, reward=None)
        assert store.count_flat_groups(ALL) == FlatGroups(compared=5, flat=2, example="outdated")
        by_f1 = store.count_flat_groups(ALL, ("f1",))  # the reward on the role is of the name f1 too
        assert by_f1 == FlatGroups(compared=5, flat=3, example="outdated")
        assert store.count_flat_groups(Extent(run_id="mended-1")) == FlatGroups(compared=1)
        human = [make_reward(f"human-{run}", run, 0.5, source="human") for run in ("mended-0", "mended-1")]
        store.add_rewards(human)
        assert store.count_flat_groups(ALL, (), ("human",)) == FlatGroups(compared=1, flat=1, example="mended")
        assert store.count_flat_groups(ALL, (), ("t",)) == FlatGroups(compared=5, flat=2, example="outdated")
