"""What every backend must do with jobs and leases."""

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from tracegrad.tracestore.branches import Live
from tracegrad.tracestore.errors import Conflict, InvalidRecord, LeaseLost, NotFound
from tracegrad.tracestore.readiness import calls_that_count, in_reach, is_ready, members, units
from tracegrad.tracestore.records import Lease, ModelCalls, Purpose, Run, RunStatus
from tracegrad.tracestore.rewards import current_rewards
from tracegrad.tracestore.rules import reward_counts, wrong_owner
from tracegrad.tracestore.schema import calls
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    Clock,
    account,
    add_group,
    finish_run,
    first_version,
    live_version,
    make_call,
    make_commit,
    make_reward,
    make_rule,
    ready_group,
    sql,
    take,
    train,
)


class ReadinessContract:
    """Which groups may be leased."""

    def ready(self, store: Store, **rule: Any) -> int:
        """Return the number of groups ready under the tests' rule with changes."""
        return store.backlog(JOB, make_rule(**rule)).ready_groups

    def test_a_group_waits_for_every_planned_member(self, store: Store) -> None:
        """Open and never-opened members hold it back."""
        first, second, third = add_group(store, size=3)
        finish_run(store, first)
        finish_run(store, second)
        assert self.ready(store) == 0
        finish_run(store, third)
        assert self.ready(store) == 1

    def test_looking_among_recent_runs_misses_none(self, store: Store) -> None:
        """Groups of every mixture of old, recent, failed and open members: as many are ready as among all runs."""
        chance, two = random.Random(4), tuple(ModelCalls(model=model) for model in (MODEL, "other"))
        rule = make_rule(min_group=1, trained=two)
        made = {model: [live_version(store, step, model) for step in (0, 1, 0, 1, 2, 3)] for model in rule.models}
        versions = {model: [version.version_id for version in line] for model, line in made.items()}
        lines = [{model: line[which].line for model, line in made.items()} for which in (0, -1)]
        for number in range(40):
            for run_id in add_group(store, f"g{number}", size=chance.randint(1, 3)):
                for call in range(chance.randint(0, 2)):
                    model = chance.choice(rule.models)
                    version = chance.choice([*versions[model], None])
                    store.append_calls([make_call(f"{run_id}-{call}", run_id, model=model, version=version)])
                if chance.random() < 0.8:
                    store.add_rewards([make_reward(run_id, run_id)])
                if chance.random() < 0.9:
                    status: RunStatus = chance.choice(["closed", "closed", "failed"])
                    store.end_run(run_id, status=status, ended_by="explicit")
            finish_run(store, f"alone{number}", version=chance.choice(versions[MODEL]))
        store.register_job(JOB, rule.models, {})
        held = store.lease(JOB, rule, groups=5, lease_s=60, step=1, epoch=0, seed=0)
        assert held is not None
        for step in (None, 1, 2, 3, 4, 6):
            for bound, other in ((0, 0), (1, 3), (2, 6), (0, None)):
                known = {MODEL: step, "other": other}
                live = Live({m: each for m, each in known.items() if each is not None}, chance.choice(lines))
                chosen = replace(rule, max_staleness=bound)
                with store._db.read() as connection:
                    near, everything = (
                        connection.execute(
                            select(unit.c.unit).where(is_ready(unit, chosen) | (unit.c.held == 1))
                        ).scalars()
                        for unit in (
                            units(members(JOB, chosen, store.now(), live, in_reach(connection, JOB, chosen, live))),
                            units(members(JOB, chosen, store.now(), live)),
                        )
                    )
                    assert sorted(near) == sorted(everything)
        assert store.backlog(JOB, rule).leased_groups == 5

    def test_failed_and_unrewarded_members_are_absent(self, store: Store) -> None:
        """They count as ended, not as members; the plan leaves them out; too few members are not leased."""
        runs = add_group(store, size=4)
        finish_run(store, runs[0])
        finish_run(store, runs[1], reward=None)
        store.append_calls([make_call("f", runs[2])])
        store.add_rewards([make_reward("f", runs[2])])
        store.end_run(runs[2], status="failed", ended_by="hook")
        finish_run(store, runs[3])
        assert (self.ready(store), self.ready(store, min_group=3)) == (1, 0)
        assert take(store).plan.run_ids == (runs[0], runs[3])

    def test_a_member_needs_a_call_that_counts(self, store: Store) -> None:
        """To the model, by one of the roles."""
        ready_group(store, "g")
        assert self.ready(store, roles=("answerer", "x")) == 1
        assert self.ready(store, roles=("rewriter",)) == 0
        assert self.ready(store, model="other") == 0

    def test_a_member_needs_a_call_that_is_exact(self, store: Store) -> None:
        """A failed, aborted or quarantined call, one by unknown weights, or an embedding is nothing to train on."""
        version = first_version(store)
        flaws: list[dict[str, Any]] = [
            {"status": "failed"},
            {"status": "aborted"},
            {"quarantine": "no logprobs"},
            {"version": None},
            {"endpoint": "embeddings", "tokens": ()},
        ]
        for number, flaw in enumerate(flaws):
            for run_id in add_group(store, f"flawed-{number}", size=2):
                store.append_calls([make_call(f"call-{run_id}", run_id, **{"version": version, **flaw})])
                store.add_rewards([make_reward(f"reward-{run_id}", run_id)])
                store.end_run(run_id, status="closed", ended_by="explicit")
        assert self.ready(store) == 0
        ready_group(store, "good")
        train(store)
        excluded = store.consumption(JOB).excluded
        assert excluded == {"failed call": 6, "aborted": 6, "quarantined: no logprobs": 6, "no version": 6}

    def test_the_named_rewards_are_needed(self, store: Store) -> None:
        """Every one of them; without names any reward does, on whatever target."""
        runs = ready_group(store)
        assert self.ready(store, reward_names=("f1",)) == 1
        assert self.ready(store, reward_names=("f1", "em")) == 0
        store.add_rewards([make_reward(f"em-{run}", run, name="em", call_id=f"call-{run}") for run in runs])
        assert self.ready(store, reward_names=("f1", "em")) == 1

    def test_runs_without_a_group_are_groups_of_one(self, store: Store) -> None:
        """Live runs and train runs, where one member is enough."""
        finish_run(store, "live")
        store.open_run(Run(run_id="train", purpose="train"))
        finish_run(store, "train")
        assert (self.ready(store), self.ready(store, min_group=1)) == (0, 2)
        assert self.ready(store, min_group=1, purposes=("live",)) == 1
        assert take(store, min_group=1, purposes=("live",)).plan.run_ids == ("live",)

    def test_projects_can_be_kept_apart(self, store: Store) -> None:
        """A rule may name one project."""
        finish_run(store, "r")
        assert self.ready(store, min_group=1, project="default") == 1
        assert self.ready(store, min_group=1, project="other") == 0

    def test_late_rewards_come_within_the_grace_time(self, store: Store, clock: Clock) -> None:
        """Until it is over a closed run is waited for, rewarded or not; a failed one is not."""
        rewarded, late, failed = add_group(store, size=3)
        finish_run(store, rewarded)
        finish_run(store, late, reward=None)
        store.end_run(failed, status="failed", ended_by="hook")
        assert (self.ready(store, min_group=1), self.ready(store, min_group=1, grace_s=60)) == (1, 0)
        store.register_job(JOB, [MODEL], {})
        asked = make_rule(min_group=1, grace_s=60)
        assert store.lease(JOB, asked, groups=1, lease_s=9, step=1, epoch=0, seed=0) is None
        assert store.consumption(JOB).excluded == {"in grace time": 6}
        clock.advance(59)
        store.add_rewards([make_reward("late", late)])
        assert self.ready(store, grace_s=60) == 0
        clock.advance(1)
        assert take(store, grace_s=60).plan.run_ids == (rewarded, late)

    def test_the_grace_time_is_each_runs_own(self, store: Store, clock: Clock) -> None:
        """The last to end is waited for; a run without a group waits alone; named rewards that are there change it not:
        a newer one may still come, and is the one that counts."""
        first, second = add_group(store)
        finish_run(store, first)
        clock.advance(50)
        finish_run(store, second)
        finish_run(store, "alone")
        clock.advance(10)
        assert self.ready(store, grace_s=60, min_group=1, reward_names=("f1",)) == 0
        clock.advance(50)
        assert self.ready(store, grace_s=60, min_group=1, reward_names=("f1",)) == 2

    def test_only_a_humans_reward(self, store: Store) -> None:
        """Rewards of other sources make nothing ready and are no credit, also where they are newer."""
        runs = ready_group(store)
        human = make_rule(reward_sources=("human", "langsmith"))
        assert store.backlog(JOB, human).ready_groups == 0
        store.add_rewards([make_reward(f"h-{run}", run, 0.25, source="human") for run in runs])
        store.add_rewards([make_reward(f"newer-{run}", run, 0.75) for run in runs])
        lease = take(store, reward_sources=human.reward_sources)
        counted = [trace.rewards for trace in store.lease_traces(lease, human)]
        assert [[(one.value, one.source) for one in given] for given in counted] == [[(0.25, "human")]] * 2
        assert [[one.value for one in trace.rewards] for trace in store.lease_traces(lease)] == [[0.75]] * 2
        both = {"reward_names": ("f1", "em"), "reward_sources": ("human",)}
        store.release(lease)
        store.add_rewards([make_reward(f"em-{run}", run, name="em") for run in runs])
        assert self.ready(store, **both) == 0
        store.add_rewards([make_reward(f"hem-{run}", run, name="em", source="human") for run in runs])
        assert self.ready(store, **both) == 1

    def test_runs_of_a_time(self, store: Store, clock: Clock) -> None:
        """Opened from `since` on and before `until`; the rest is outside the window."""
        for name in ("early", "within", "late"):
            finish_run(store, name)
            clock.advance(10)
        assert self.ready(store, min_group=1) == 3
        assert self.ready(store, min_group=1, since=1_010.0, until=1_020.0) == 1
        assert take(store, min_group=1, since=1_010.0, until=1_020.0).plan.run_ids == ("within",)
        assert store.consumption(JOB).excluded == {"leased": 3, "outside the window": 6}

    def test_purposes_and_sizes_mix(self, store: Store) -> None:
        """Single live runs beside groups: units of one and whole groups, as the rule asks."""
        ready_group(store, "g")
        finish_run(store, "live")
        assert [self.ready(store, min_group=n) for n in (1, 2)] == [2, 1]
        assert self.ready(store, min_group=1, purposes=("live",)) == 1
        assert take(store, min_group=1, groups=2).plan.run_ids == ("g-0", "g-1", "live")
        store.register_job("grouped", [MODEL], {})
        asked = make_rule(min_group=2)
        assert store.lease("grouped", asked, groups=2, lease_s=9, step=1, epoch=0, seed=0) is None
        assert store.consumption("grouped").excluded == {"no group": 3, "not leased": 6}

    def test_calls_recorded_for_another_model(self, store: Store) -> None:
        """The roles choose them, where the rule names that model; a role of yet another model stays out."""
        ready_group(store)
        other = {"model": "new", "roles": ("answerer",)}
        assert self.ready(store, **other) == 0
        assert self.ready(store, **other, recorded_models=(MODEL,)) == 1
        assert self.ready(store, model="new", recorded_models=(MODEL,), other_roles=("answerer",)) == 0
        assert self.ready(store, model="new", recorded_models=(MODEL,), roles=("writer",)) == 0

    def test_runs_that_other_models_answered_are_counted(self, store: Store) -> None:
        """Closed ones that the rule allows, with exact calls by its roles: what naming the model would bring."""
        ready_group(store)
        finish_run(store, "theirs")
        store.append_calls([make_call("judged", "theirs", role="judge", version=first_version(store))])
        assert store.recorded_elsewhere(make_rule(model="new")) == {MODEL: 3}
        assert store.recorded_elsewhere(make_rule(model="new", roles=("judge",))) == {MODEL: 1}
        assert store.recorded_elsewhere(make_rule(model="new", purposes=("train",))) == {MODEL: 2}
        assert store.recorded_elsewhere(make_rule(model="new", other_roles=("answerer", "judge"))) == {}
        assert store.recorded_elsewhere(make_rule()) == {}

    def test_python_and_sql_mean_the_same(self, store: Store) -> None:
        """Which calls and which rewards a rule counts: `rules` and `readiness`, over all there are."""
        roles, models, names = ("a", "b", None), (MODEL, "other"), ("f1", "em")
        store.append_calls([make_call(f"{m}-{r}", "r", model=m, role=r) for m in models for r in roles])
        given = [make_reward(f"{n}-{s}", "r", name=n, source=s, role=s) for n in names for s in ("t", "human")]
        store.add_rewards(given)
        rules = [
            make_rule(roles=only, other_roles=others, recorded_models=more, reward_names=named, reward_sources=sources)
            for only in (None, ("a",))
            for others in ((), ("b",))
            for more in ((), ("other",))
            for named in ((), ("f1",))
            for sources in ((), ("human",))
        ]
        trace = store.trace("r")
        for rule in rules:
            with store._db.read() as connection:
                found = set(connection.execute(select(calls.c.call_id).where(calls_that_count(rule))).scalars())
                credit = {one.reward_id for one in current_rewards(connection, ["r"], rule=rule)}
            assert found == {one.call_id for one in trace.calls if wrong_owner(rule, one) is None}
            assert credit == {one.reward_id for one in trace.rewards if reward_counts(rule, one)}

    def test_what_a_group_waits_for(self, store: Store) -> None:
        """Rewards that may come, or members that never will count."""
        for run_id in add_group(store, "silent"):
            finish_run(store, run_id, reward=None if run_id.endswith("1") else 1.0)
        for run_id in add_group(store, "short"):
            finish_run(store, run_id)
        first, second = add_group(store, "failing")
        finish_run(store, first)
        store.end_run(second, status="failed", ended_by="hook")
        finish_run(store, "other-role")
        store.append_calls([make_call("bare", "short-0", role=None, version=first_version(store))])
        take(store, roles=("answerer",))
        assert store.consumption(JOB).excluded == {
            "group awaits rewards": 3,
            "no reward": 3,
            "group too small": 3,
            "leased": 6 + 3,
            "no group": 3,
        }

    def test_an_eval_run_is_never_ready(self, store: Store) -> None:
        """Not even where the rule asks for it."""
        for run_id in add_group(store, purpose="eval"):
            finish_run(store, run_id)
        purposes: tuple[Purpose, ...] = ("train", "eval", "live")
        assert self.ready(store, purposes=purposes) == 0

    def test_an_eval_run_cannot_be_held_by_sql_either(self, store: Store) -> None:
        """The composite key makes the purpose true, the CHECK refuses it: in holds and in the ledger."""
        ready_group(store)
        train(store)
        ready_group(store, "more")
        lease = take(store, step=2)
        store.open_run(Run(run_id="e", purpose="eval"))
        for purpose in ("eval", "train", "live"):
            with pytest.raises(InvalidRecord):
                sql(
                    store,
                    "INSERT INTO holds (job_id, run_id, lease_id, purpose) VALUES (:job, 'e', :lease, :purpose)",
                    job=JOB,
                    lease=lease.lease_id,
                    purpose=purpose,
                )
            with pytest.raises(InvalidRecord):
                sql(
                    store,
                    "INSERT INTO ledger (job_id, run_id, epoch, purpose, step, checkpoint_hash, rewards_through) "
                    "VALUES (:job, 'e', 0, :purpose, 1, 'sha-1', 0)",
                    job=JOB,
                    purpose=purpose,
                )
        with pytest.raises(InvalidRecord):
            sql(store, "UPDATE runs SET purpose = 'eval' WHERE run_id = :run", run=lease.plan.run_ids[0])


class LeaseContract:
    """Leases and their fencing."""

    def test_whole_groups_in_order_of_opening(self, store: Store, clock: Clock) -> None:
        """The plan lists members group by group, oldest group first, and is committed with the lease."""
        for group_id in ("b", "a", "c"):
            ready_group(store, group_id)
            clock.advance(1)
        lease = take(store, groups=2, step=4, epoch=0, lease_s=60)
        assert lease.plan.run_ids == ("b-0", "b-1", "a-0", "a-1")
        assert (lease.plan.step, lease.plan.epoch, lease.plan.seed) == (4, 0, 7)
        assert (lease.token, lease.state, lease.expires_at) == (1, "held", clock.now + 60)
        backlog = store.backlog(JOB, make_rule())
        assert (backlog.ready_groups, backlog.leased_groups, backlog.publishing) == (1, 1 + 1, False)

    def test_all_or_nothing(self, store: Store) -> None:
        """Fewer ready groups than asked for: no lease, nothing held. Unknown job, wrong model, no groups: errors."""
        ready_group(store)
        with pytest.raises(NotFound, match=r"no training job 'job'.*registers"):
            store.lease(JOB, make_rule(), groups=1, lease_s=1, step=1, epoch=0, seed=0)
        store.register_job(JOB, [MODEL], {})
        assert store.lease(JOB, make_rule(), groups=2, lease_s=1, step=1, epoch=0, seed=0) is None
        assert store.backlog(JOB, make_rule()).ready_groups == 1
        with pytest.raises(InvalidRecord, match="trains main"):
            store.lease(JOB, make_rule(model="other"), groups=1, lease_s=1, step=1, epoch=0, seed=0)
        with pytest.raises(InvalidRecord, match="at least 1"):
            store.lease(JOB, make_rule(), groups=0, lease_s=1, step=1, epoch=0, seed=0)

    def test_jobs_are_registered_once(self, store: Store) -> None:
        """Again is a no-op that takes the new configuration; another model is a Conflict."""
        store.register_job(JOB, [MODEL], {"steps": 1})
        store.register_job(JOB, [MODEL], {"steps": 2})
        with pytest.raises(Conflict, match="trains main"):
            store.register_job(JOB, ["other"], {})

    def test_two_jobs_read_the_same_runs(self, store: Store) -> None:
        """Each consumes for itself."""
        ready_group(store)
        first = take(store)
        store.register_job("second", [MODEL], {})
        second = store.lease("second", make_rule(), groups=1, lease_s=60, step=1, epoch=0, seed=0)
        assert second is not None
        assert second.plan.run_ids == first.plan.run_ids

    def test_an_expired_lease_is_kept_for_its_job(self, store: Store, clock: Clock) -> None:
        """Its groups are not handed out again; reclaiming gives the same plan under a new token."""
        ready_group(store)
        lease = take(store, lease_s=10)
        clock.advance(11)
        assert store.lease(JOB, make_rule(), groups=1, lease_s=10, step=2, epoch=0, seed=0) is None
        again = store.reclaim(JOB, 20)
        assert again is not None
        assert (again.lease_id, again.token, again.plan) == (lease.lease_id, 2, lease.plan)
        assert again.expires_at == clock.now + 20
        for late in (store.release, lambda old: store.renew(old, 5)):
            with pytest.raises(LeaseLost, match="token 2, yours is 1"):
                late(lease)
        with pytest.raises(LeaseLost):
            store.commit_step(lease, make_commit(account(store, lease)))
        assert store.last_checkpoint(JOB) is None
        assert store.commit_step(again, make_commit(account(store, again)))[MODEL].step == 1

    def test_renewing_and_releasing(self, store: Store, clock: Clock) -> None:
        """Renewing keeps the token; a released lease is over and its groups are free."""
        ready_group(store)
        lease = take(store, lease_s=10)
        clock.advance(5)
        renewed = store.renew(lease, 10)
        assert (renewed.expires_at, renewed.token) == (clock.now + 10, lease.token)
        store.release(renewed)
        assert store.backlog(JOB, make_rule()).ready_groups == 1
        assert store.reclaim(JOB, 10) is None
        with pytest.raises(LeaseLost, match="released"):
            store.release(renewed)
        with pytest.raises(LeaseLost, match="does not exist"):
            store.renew(replace(lease, lease_id=99), 10)

    def test_lease_ids_are_never_reused(self, store: Store) -> None:
        """Also after the rows are gone."""
        ready_group(store)
        lease = take(store)
        store.release(lease)
        sql(store, "DELETE FROM leases")
        assert take(store).lease_id > lease.lease_id

    def test_a_lease_sees_what_stood_when_it_was_made(self, store: Store) -> None:
        """Later calls and rewards are not in `lease_traces`; `traces` shows them."""
        run, _ = ready_group(store)
        lease = take(store)
        store.append_calls([make_call("later", run)])
        store.add_rewards([make_reward("later", run, 5.0)])
        frozen = store.lease_traces(lease)[0]
        assert [call.call_id for call in frozen.calls] == [f"call-{run}"]
        assert [reward.value for reward in frozen.rewards] == [1.0]
        assert [reward.value for reward in store.trace(run).rewards] == [5.0]
        with pytest.raises(NotFound):
            store.lease_traces(replace(lease, lease_id=99))

    def test_threads_never_share_a_run(self, store: Store) -> None:
        """Eight leases at once of one job: disjoint, and together everything."""
        for index in range(8):
            ready_group(store, f"g{index}")
        store.register_job(JOB, [MODEL], {})
        taken: list[Lease | None] = []

        def one(step: int) -> None:
            lease = None
            while lease is None:
                lease = store.lease(JOB, make_rule(), groups=2, lease_s=60, step=step, epoch=0, seed=0)
            taken.append(lease)

        threads = [threading.Thread(target=one, args=(step,)) for step in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        runs = [run_id for lease in taken if lease is not None for run_id in lease.plan.run_ids]
        assert (len(runs), len(set(runs))) == (16, 16)
