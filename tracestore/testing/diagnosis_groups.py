"""What every backend must find of groups for the doctor: what they lack, and whose members earned the same."""

from tracegrad.tracestore.diagnosis_records import Extent, FlatGroups, GroupCounts
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    MODEL,
    add_group,
    finish_run,
    first_version,
    make_call,
    make_reward,
    make_rule,
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
        by_f1 = store.count_flat_groups(
            ALL, make_rule(reward_names=("f1",))
        )  # the reward on the role is of the name f1 too
        assert by_f1 == FlatGroups(compared=5, flat=3, example="outdated")
        assert store.count_flat_groups(Extent(run_id="mended-1")) == FlatGroups(compared=1)
        human = [make_reward(f"human-{run}", run, 0.5, source="human") for run in ("mended-0", "mended-1")]
        store.add_rewards(human)
        assert store.count_flat_groups(ALL, make_rule(reward_sources=("human",))) == FlatGroups(
            compared=1, flat=1, example="mended"
        )
        assert store.count_flat_groups(ALL, make_rule(reward_sources=("t",))) == FlatGroups(
            compared=5, flat=2, example="outdated"
        )

    def test_rewards_are_compared_as_they_are_weighed(self, store: Store) -> None:
        """By their sum; what has no weight, or is not named, makes no difference."""
        first, second = ready_group(store, "traded")  # f1 is 1 in both
        store.add_rewards([make_reward("em", first, 1.0, name="em"), make_reward("style", second, 1.0, name="style")])
        store.add_rewards([make_reward("no em", second, 0.0, name="em"), make_reward("no style", first, 0.0, "style")])
        one, none = FlatGroups(compared=1, flat=1, example="traded"), FlatGroups(compared=1)
        for weights, found in (
            ({}, one),
            ({"em": 2.0, "style": 2.0}, one),
            ({"em": 1.0, "style": 2.0}, none),
            ({"em": 1.0, "f1": 1.0}, none),
            ({"em": 0.0, "f1": 1.0}, one),
            ({"f1": 3.0}, one),
            ({"style": 0.0}, one),
        ):
            rule = make_rule(reward_names=tuple(sorted(weights)))
            assert store.count_flat_groups(ALL, rule, weights=weights) == found, weights

    def test_sums_that_differ_by_rounding_alone_are_equal(self, store: Store) -> None:
        """The order in which rewards arrived decides nothing."""
        given = {"a": 0.1, "b": 0.2, "c": 0.3}
        for run_id, names in zip(add_group(store), ("abc", "cba"), strict=True):
            finish_run(store, run_id, reward=None)
            store.add_rewards([make_reward(f"{run_id} {name}", run_id, given[name], name=name) for name in names])
        assert store.count_flat_groups(ALL, make_rule()).flat == 1

    def test_only_what_reaches_the_calls_of_the_job_is_compared(self, store: Store) -> None:
        """Rewards on roles and calls of other models reach its own in the scope `graph` alone."""
        for member, run_id in enumerate(ready_group(store)):
            version = first_version(store, "other")
            store.append_calls([make_call(f"w-{run_id}", run_id, role="writer", model="other", version=version)])
            store.add_rewards([make_reward(f"r-{run_id}", run_id, float(member), role="writer")])
            store.add_rewards([make_reward(f"c-{run_id}", run_id, float(member), call_id=f"w-{run_id}")])
        assert store.count_flat_groups(ALL, make_rule()).flat == 1
        assert store.count_flat_groups(ALL, make_rule(), scope="graph") == FlatGroups(compared=1)
        assert store.count_flat_groups(ALL, make_rule(model="other")) == FlatGroups(compared=1)
        assert store.count_flat_groups(ALL) == FlatGroups(compared=1)
        assert store.count_flat_groups(ALL, make_rule(purposes=("live",))) == FlatGroups()
