"""What every backend must show of the queue: where everything stands, dead letters, what a job refused."""

import random
from typing import Any

import pytest

from tracegrad.tracestore.diagnosis_records import Extent
from tracegrad.tracestore.errors import InvalidRecord, LeaseLost, NotFound
from tracegrad.tracestore.queue_records import GroupStanding, Queue
from tracegrad.tracestore.records import LateAttribution, Run
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
)


def stages(queue: Queue) -> dict[str, dict[str, int]]:
    """Stage -> reason -> tokens."""
    found: dict[str, dict[str, int]] = {}
    for one in queue.reasons:
        found.setdefault(one.stage, {})[one.reason] = one.tokens
    return found


class QueueViewContract:
    """Where everything stands for a job."""

    def furnish(self, store: Store) -> None:
        """One of everything: trained in part, held, ready, waiting for this and that, dead, and not for the job."""
        version = live_version(store).version_id
        ready_group(store, "trained")
        lease = take(store, roles=("answerer",))
        store.commit_step(lease, make_commit(account(store, lease, excluded={"call-trained-1": "greedy"})))
        ready_group(store, "held")
        take(store, step=2, lease_s=90, roles=("answerer",))
        ready_group(store, "ready")
        finish_run(store, add_group(store, "unfinished")[0])
        for run_id in add_group(store, "silent"):
            finish_run(store, run_id, reward=None)
        for run_id in add_group(store, "flawed"):
            store.append_calls([make_call(f"call-{run_id}", run_id, version=version, quarantine="no logprobs")])
            store.add_rewards([make_reward(run_id, run_id)])
            store.end_run(run_id, status="closed", ended_by="explicit")
        store.open_run(Run(run_id="mute", purpose="train"))
        store.end_run("mute", status="closed", ended_by="explicit")
        store.open_run(Run(run_id="broken", purpose="train"))
        store.end_run("broken", status="failed", ended_by="hook", error="x")
        store.append_calls([make_call("loose", None, version=version)])
        first_version(store, "other")
        store.append_calls([make_call("elsewhere", "ready-0", model="other")])
        store.append_calls([make_call("judged", "ready-0", role="judge", version=version)])
        store.open_run(Run(run_id="measured", purpose="eval"))
        finish_run(store, "measured")

    def test_everything_stands_somewhere_and_adds_up(self, store: Store, clock: Clock) -> None:
        """Tokens by stage and reason are those of conservation; groups and leases are beside them."""
        self.furnish(store)
        queue = store.queue(JOB)
        assert stages(queue) == {
            "trained": {"trained": 3},
            "held": {"leased": 6},
            "ready": {"not leased": 6},
            "waiting": {"no reward": 6, "group open": 3, "open": 0},
            "dead": {"greedy": 3, "quarantined: no logprobs": 6, "no run": 3, "no call": 0, "run failed": 0},
            "elsewhere": {"eval": 3, "other model": 3, "other role": 3},
        }
        report = store.consumption(JOB)
        assert queue.conserved and report.conserved
        assert {one.reason: one.tokens for one in queue.reasons if one.tokens} == {
            "trained": report.trained,
            **report.excluded,
        }
        runs = {one.reason: (one.runs, one.choices) for one in queue.reasons}
        assert (runs["not leased"], runs["no call"], runs["no run"]) == ((2, 2), (1, 0), (0, 1))
        assert queue.groups == {
            "trained": 1,
            "leased": 1,
            "not leased": 1,
            "group open": 1,
            "group awaits rewards": 1,
        }
        assert [(one.step, one.runs, one.expires_at) for one in queue.leases] == [(2, 2, clock.now + 90)]
        assert (queue.models, queue.epoch) == ((MODEL,), 0)
        later = store.queue(JOB, epoch=1)
        assert later.conserved and later.tokens("trained") == 0 and later.tokens("ready") == 6 + 6

    def test_a_job_that_never_leased_is_judged_without_a_rule(self, store: Store) -> None:
        """What needs none is said; an unknown job is NotFound."""
        with pytest.raises(NotFound, match="no training job"):
            store.queue(JOB)
        store.register_job(JOB, [MODEL], {})
        finish_run(store, "silent", reward=None)
        finish_run(store, "good")
        queue = store.queue(JOB)
        assert (stages(queue), queue.groups, queue.rule) == (
            {"waiting": {"no reward": 3}, "ready": {"not leased": 3}},
            {},
            None,
        )

    def test_dead_letters_come_in_pages(self, store: Store, clock: Clock) -> None:
        """Newest first, each run once, with its reasons and what of it was trained; what waits is not among them."""
        self.furnish(store)
        clock.advance(5)
        for number in range(4):
            store.open_run(Run(run_id=f"later-{number}", purpose="train"))
            clock.advance(1)
            store.end_run(f"later-{number}", status="failed", ended_by="hook")
        whole = store.dead_runs(JOB, limit=100)
        assert [one.run.run_id for one in whole[:4]] == [f"later-{number}" for number in (3, 2, 1, 0)]
        assert {one.run.run_id: (one.reasons, one.trained) for one in whole[4:]} == {
            "trained-1": ({"greedy": 3}, 0),
            "flawed-0": ({"quarantined: no logprobs": 3}, 0),
            "flawed-1": ({"quarantined: no logprobs": 3}, 0),
            "mute": ({"no call": 0}, 0),
            "broken": ({"run failed": 0}, 0),
        }
        found, before = [], None
        while page := store.dead_runs(JOB, limit=2, before=before):
            found += page
            before = page[-1].run.run_id
        assert found == whole
        assert [one.run.run_id for one in store.dead_runs(JOB, extent=Extent(run_id="mute"))] == ["mute"]
        with pytest.raises(NotFound, match="start again"):
            store.dead_runs(JOB, before="nobody")

    def test_a_run_says_what_it_waits_for(self, store: Store, clock: Clock) -> None:
        """Rewards by name, the end of its grace time, members of its group, the lease that holds it."""
        first, second = add_group(store)
        finish_run(store, first)
        asked = make_rule(reward_names=("f1", "em"), grace_s=60)
        store.register_job(JOB, [MODEL], {})
        assert store.lease(JOB, asked, groups=1, lease_s=9, step=1, epoch=0, seed=0) is None
        waits = store.run_standing(JOB, first)
        assert (waits.wants, waits.grace_until) == (["em"], clock.now + 60)
        assert waits.group == GroupStanding(planned=2, settled=0, trainable=0, eligible=0)
        assert [(one.reason, one.stage, one.tokens) for one in waits.choices] == [("in grace time", "waiting", 3)]
        finish_run(store, second)
        store.add_rewards([make_reward(f"em-{run}", run, name="em") for run in (first, second)])
        clock.advance(60)
        take(store, reward_names=("f1", "em"), grace_s=60)
        held = store.run_standing(JOB, first)
        assert (held.wants, held.grace_until, [one.stage for one in held.choices]) == ([], None, ["held"])
        assert held.lease is not None and held.lease.expires_at == clock.now + 60
        with pytest.raises(NotFound, match="no run"):
            store.run_standing(JOB, "nobody")

    def test_the_view_and_conservation_agree_over_any_mixture(self, store: Store) -> None:
        """Runs of every kind, for several rules: the same tokens for the same reasons."""
        chance = random.Random(11)
        versions = [live_version(store, step).version_id for step in range(3)]
        for number in range(25):
            for run_id in add_group(store, f"g{number}", size=chance.randint(1, 3)):
                for call in range(chance.randint(0, 2)):
                    flaw: dict[str, Any] = chance.choice(
                        [{}, {}, {"quarantine": "echo"}, {"status": "aborted"}, {"role": None}]
                    )
                    version = chance.choice([*versions, None])
                    store.append_calls([make_call(f"{run_id}-{call}", run_id, version=version, **flaw)])
                if chance.random() < 0.7:
                    store.add_rewards([make_reward(run_id, run_id, source=chance.choice(["t", "human"]))])
                if chance.random() < 0.9:
                    store.end_run(run_id, status=chance.choice(["closed", "failed"]), ended_by="explicit")
        store.register_job(JOB, [MODEL], {})
        for rule in (
            make_rule(min_group=1),
            make_rule(min_group=2, roles=("answerer",), max_staleness=0),
            make_rule(min_group=1, reward_sources=("human",), grace_s=10, until=2_000.0),
        ):
            store.lease(JOB, rule, groups=1, lease_s=60, step=1, epoch=0, seed=0)
            queue, report = store.queue(JOB), store.consumption(JOB)
            assert queue.conserved
            told: dict[str, int] = {}
            for one in queue.reasons:
                if one.tokens:
                    told[one.reason] = told.get(one.reason, 0) + one.tokens
            assert told == {**report.excluded, **({"trained": report.trained} if report.trained else {})}
            dead = store.dead_runs(JOB, limit=1_000)
            with_run = sum(one.tokens for one in queue.reasons if one.stage == "dead")
            assert sum(sum(one.reasons.values()) for one in dead) == with_run


class UnplacedContract:
    """Calls that belong to no run."""

    def test_they_are_listed_newest_first(self, store: Store) -> None:
        """In pages, of a project or of all; a call that is placed late leaves the list."""
        store.append_calls([make_call(f"c{number}", None) for number in range(4)])
        store.append_calls([make_call("theirs", None, project="p"), make_call("placed", "r")])
        assert [one.call_id for one in store.list_unplaced_calls(project="default", limit=2)] == ["c3", "c2"]
        assert [one.call_id for one in store.list_unplaced_calls(before="c2")] == ["c1", "c0"]
        assert [one.call_id for one in store.list_unplaced_calls(project="p")] == ["theirs"]
        store.attribute_late([LateAttribution(source="langsmith", call_id="c1", run_id="r")])
        found = store.list_unplaced_calls()
        assert [one.call_id for one in found] == ["theirs", "c3", "c2", "c0"]
        assert (found[1].role, found[1].n_sampled_tokens) == ("answerer", 3)
        with pytest.raises(NotFound, match="start again"):
            store.list_unplaced_calls(before="nobody")


class RefusalContract:
    """A batch with nothing to train is put aside, once and for the epoch."""

    def refused(self, store: Store) -> tuple[str, str]:
        """Lease a group and refuse it; return its runs."""
        first, second = ready_group(store)
        lease = take(store)
        store.refuse(lease, account(store, lease, excluded={f"call-{first}": "greedy", f"call-{second}": "no reward"}))
        with pytest.raises(LeaseLost, match="released"):
            store.refuse(lease, ())
        return first, second

    def test_it_is_not_leased_again(self, store: Store) -> None:
        """Neither by asking nor by reclaiming; other jobs and the next epoch take it."""
        self.refused(store)
        assert store.lease(JOB, make_rule(), groups=1, lease_s=9, step=1, epoch=0, seed=0) is None
        assert (store.reclaim(JOB, 9), store.backlog(JOB, make_rule()).ready_groups) == (None, 0)
        store.register_job("second", [MODEL], {})
        assert store.lease("second", make_rule(), groups=1, lease_s=9, step=1, epoch=0, seed=0) is not None
        assert take(store, epoch=1).plan.run_ids == ("g-0", "g-1")

    def test_it_is_a_dead_letter_with_the_trainers_reasons(self, store: Store) -> None:
        """Conservation counts it; the ledger knows nothing of it."""
        first, second = self.refused(store)
        assert store.consumption(JOB).excluded == {"refused": 6}
        assert store.queue(JOB).groups == {"refused": 1}
        assert [(one.run.run_id, one.reasons, one.refused) for one in store.dead_runs(JOB)] == [
            (second, {"refused": 3}, {"no reward": 3}),
            (first, {"refused": 3}, {"greedy": 3}),
        ]
        assert store.run_standing(JOB, first).refused == {"greedy": 3}
        assert (store.trained_by(first), store.last_checkpoint(JOB)) == ([], None)

    def test_what_would_train_is_not_refused(self, store: Store) -> None:
        """All or nothing: nor are choices left out."""
        ready_group(store)
        lease = take(store)
        with pytest.raises(InvalidRecord, match="commit its step instead"):
            store.refuse(lease, account(store, lease))
        with pytest.raises(InvalidRecord, match="leaves out"):
            store.refuse(lease, ())
        store.release(lease)

    def test_it_goes_with_its_run(self, store: Store) -> None:
        """Deleting the runs deletes what was refused of them."""
        store.delete_runs(self.refused(store))
        assert sql(store, "DELETE FROM refusals") == 0
