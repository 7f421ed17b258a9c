"""What every backend must do with the ledger, consumption and conservation."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from tracegrad.tracestore.errors import Abandoned, Conflict, InvalidRecord, LeaseLost
from tracegrad.tracestore.jobs import existing_job
from tracegrad.tracestore.records import PolicyVersion, Run
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
from tracegrad.tracestore.versions import abandon_newer

_LIKE_THE_NEWEST = """
    INSERT INTO policy_versions
    (model, kind, parent_id, checkpoint_path, checkpoint_hash, step, job_id, abandoned, created_at)
    SELECT model, kind, version_id, checkpoint_path, checkpoint_hash, step + 1, job_id, abandoned, created_at
    FROM policy_versions ORDER BY version_id DESC LIMIT 1
"""


class LedgerContract:
    """The commit of a step, and conservation."""

    def test_a_step_is_committed_as_one(self, store: Store, clock: Clock) -> None:
        """Checkpoint, version, ledger and acknowledgement together."""
        ready_group(store)
        base = live_version(store)
        lease = take(store, step=3)
        commit = make_commit(account(store, lease), parent=base.version_id)
        version = store.commit_step(lease, commit)[MODEL]
        assert (version.kind, version.step, version.job_id, version.parent_id) == ("step", 3, JOB, base.version_id)
        row = store.last_checkpoint(JOB)
        assert row is not None
        assert (row.step, row.hash, row.path) == (3, "sha", "/checkpoints/sha")
        assert row.versions == {MODEL: version.version_id}
        assert version.checkpoint_path == "/checkpoints/sha/main"
        assert (dict(row.metrics), row.created_at) == ({"loss": 0.25}, clock.now)
        assert store.reclaim(JOB, 10) is None
        backlog = store.backlog(JOB, make_rule())
        assert (backlog.ready_groups, backlog.leased_groups) == (0, 0)

    def test_committing_again_returns_the_version(self, store: Store) -> None:
        """A retry after an unknown outcome is safe; another checkpoint under the same lease is not a retry."""
        ready_group(store)
        lease = take(store)
        commit = make_commit(account(store, lease))
        assert store.commit_step(lease, commit) == store.commit_step(lease, commit)
        assert len(made_by_steps(store)) == 1
        with pytest.raises(LeaseLost, match="acknowledged"):
            store.commit_step(lease, replace(commit, checkpoint_hash="other"))

    def test_a_step_on_abandoned_weights_is_not_committed(self, store: Store) -> None:
        """The parent or the version that another model stays at; nothing is left of it, and the lease is still held."""
        ready_group(store)
        parent, other = live_version(store), live_version(store, model="other")
        lease = take(store)
        commit = make_commit(account(store, lease), parent=parent.version_id)
        store.abandon_version(other.version_id)
        with pytest.raises(Abandoned, match=f"version {other.version_id}, which it builds on, was abandoned"):
            store.commit_step(lease, replace(commit, unchanged=[other.version_id]))
        assert (made_by_steps(store), store.last_checkpoint(JOB)) == ([], None)
        store.commit_step(lease, commit)
        store.abandon_version(parent.version_id)
        assert len(store.commit_step(lease, commit)) == 1, "what was committed already is told again"

    @pytest.mark.parametrize("first", ["rollback", "commit"])
    def test_a_rollback_and_a_commit_wait_for_one_another(self, store: Store, first: str) -> None:
        """Whichever is first, nothing stands that is built on what was rolled back."""
        ready_group(store)
        base, parent = live_version(store, 0), live_version(store, 1)
        lease = take(store, step=2)
        sql(store, "UPDATE policy_versions SET job_id = :job", job=JOB)
        commit = make_commit(account(store, lease), parent=parent.version_id)
        back = store.request_publish(base.version_id).publish_id
        store.advance_publish(back, "draining")
        store.advance_publish(back, "swapping")
        with ThreadPoolExecutor(1) as pool:
            with store._db.write() as connection:
                if first == "rollback":
                    abandon_newer(connection, base)
                    waits: Future[Any] = pool.submit(store.commit_step, lease, commit)
                else:
                    existing_job(connection, JOB, lock=True)
                    connection.execute(text(_LIKE_THE_NEWEST))
                    waits = pool.submit(store.advance_publish, back, "live", goes_back=True)
                assert wait([waits], 0.1).not_done
            assert isinstance(waits.exception(), Abandoned if first == "rollback" else type(None))
        newer = [version for version in store.list_versions(MODEL) if version.version_id > base.version_id]
        assert [version.abandoned for version in newer] == [True] * (1 if first == "rollback" else 2)

    def test_each_run_once_per_job_and_epoch(self, store: Store) -> None:
        """Not leased again in the epoch, again in the next; the key refuses raw SQL too."""
        ready_group(store)
        train(store, step=1)
        assert store.lease(JOB, make_rule(), groups=1, lease_s=1, step=2, epoch=0, seed=0) is None
        with pytest.raises(Conflict):
            sql(store, "INSERT INTO ledger SELECT * FROM ledger")
        train(store, step=2, epoch=1)
        assert store.lease(JOB, make_rule(), groups=1, lease_s=1, step=3, epoch=1, seed=0) is None
        assert (store.consumption(JOB, 0).trained, store.consumption(JOB, 1).trained) == (6, 6)

    def test_a_step_is_committed_once(self, store: Store) -> None:
        """Two leases for one step: the second commit is refused and leaves nothing."""
        ready_group(store, "a")
        ready_group(store, "b")
        first, second = take(store, step=1), take(store, step=1)
        store.commit_step(first, make_commit(account(store, first), hash_="one"))
        with pytest.raises(Conflict, match="step 1 already"):
            store.commit_step(second, make_commit(account(store, second), hash_="two"))
        assert len(made_by_steps(store)) == 1

    def test_consumption_must_account_for_every_choice(self, store: Store) -> None:
        """Missing, double, foreign, wrong count, no reason, negative: nothing is committed."""
        ready_group(store)
        finish_run(store, "stranger")
        lease = take(store)
        entries = account(store, lease)
        one = entries[0]
        wrong = [
            (entries[1:], "leaves out 1 choices"),
            ([*entries, one], "twice"),
            ([*entries, replace(one, run_id="stranger")], "twice"),
            ([*entries, replace(one, run_id="stranger", call_id="call-stranger")], "does not hold"),
            ([*entries, replace(one, call_id="none")], "not stored"),
            ([replace(one, run_id=entries[1].run_id), *entries[1:]], "under run"),
            ([replace(one, trained_tokens=2), *entries[1:]], "has 3 sampled tokens"),
            ([replace(one, trained_tokens=4, excluded_tokens=-1), *entries[1:]], "has 3 sampled tokens"),
            ([replace(one, trained_tokens=2, excluded_tokens=1), *entries[1:]], "without a reason"),
        ]
        for consumption, message in wrong:
            with pytest.raises(InvalidRecord, match=message):
                store.commit_step(lease, make_commit(consumption))
        with pytest.raises(InvalidRecord, match="trains main"):
            store.commit_step(lease, make_commit(entries, model="other"))
        with pytest.raises(InvalidRecord, match="parent"):
            store.commit_step(lease, make_commit(entries, parent=99))
        assert (made_by_steps(store), store.last_checkpoint(JOB)) == ([], None)
        store.commit_step(lease, make_commit(entries))

    def test_the_schema_conserves_each_choice(self, store: Store) -> None:
        """Not even raw SQL accounts for more or fewer tokens than were sampled."""
        ready_group(store)
        train(store)
        for wrong in (
            "trained_tokens = 2",
            "trained_tokens = 2, n_tokens = 2",
            "excluded_tokens = 1, trained_tokens = 2",
        ):
            with pytest.raises(InvalidRecord):
                sql(store, f"UPDATE consumption SET {wrong}")
        with pytest.raises(InvalidRecord):
            sql(store, "UPDATE ledger SET checkpoint_hash = 'forged'")

    def test_late_rewards_are_kept_for_the_next_job(self, store: Store) -> None:
        """Late for the job that read the run before it came, by arrival, not by commit; the next job sees it."""
        run, last = ready_group(store)
        lease = take(store)
        (between,) = store.add_rewards([make_reward("between", run, 2.0)])
        assert between.late_for == ()
        store.commit_step(lease, make_commit(account(store, lease)))
        assert [reward.late_for for reward in store.trace(run).rewards] == [(JOB,)]
        assert [reward.late_for for reward in store.trace(last).rewards] == [()]
        (late,) = store.add_rewards([make_reward("late", run, 3.0)])
        assert late.late_for == (JOB,)
        assert store.add_rewards([make_reward(f"reward-{run}", run, 1.0)])[0].late_for == ()
        store.register_job("next", [MODEL], {})
        following = store.lease("next", make_rule(), groups=1, lease_s=1, step=1, epoch=0, seed=0)
        assert following is not None
        assert store.lease_traces(following)[0].rewards[0].value == 3.0

    def test_a_late_call_is_counted_not_lost(self, store: Store) -> None:
        """A call after the lease need not be accounted for; it may be; either way the sums hold."""
        run, other = ready_group(store)
        lease = take(store)
        entries = account(store, lease)
        store.append_calls(
            [make_call("late", run, tokens=[(1, 2)]), make_call("late-too", other, tokens=[(1,), range(4)])]
        )
        read = replace(entries[0], run_id=other, call_id="late-too", trained_tokens=1)
        store.commit_step(lease, make_commit([*entries, read]))
        report = store.consumption(JOB)
        assert (report.stored, report.trained, dict(report.excluded)) == (13, 7, {"arrived after the lease": 6})
        assert report.conserved

    def test_conservation_over_the_whole_store(self, store: Store) -> None:
        """One choice of every fate, each of another size, so that a wrong reason shows in the numbers."""
        sizes = every_fate(store)
        report = store.consumption(JOB)
        assert dict(report.excluded) == sizes
        assert report.trained == 1
        assert report.stored == 1 + sum(sizes.values())
        assert report.conserved

    def test_conservation_inside_groups(self, store: Store) -> None:
        """A member of a group that is too small, and one whose reward came when its group was trained already."""
        small, failed = add_group(store, "small")
        finish_run(store, small)
        store.append_calls([make_call("f", failed, tokens=[range(2)])])
        store.end_run(failed, status="failed", ended_by="hook")
        _, _, late = add_group(store, "g", size=3)
        for run_id in ("g-0", "g-1"):
            finish_run(store, run_id)
        finish_run(store, late, reward=None)
        train(store)
        report = store.consumption(JOB)
        assert dict(report.excluded) == {"group too small": 3, "run failed": 2, "no reward": 3}
        store.add_rewards([make_reward("late", late)])
        report = store.consumption(JOB)
        assert dict(report.excluded) == {"group too small": 3, "run failed": 2, "group trained without it": 3}
        assert (report.stored, report.trained, report.conserved) == (14, 6, True)

    def test_conservation_before_anything_happened(self, store: Store) -> None:
        """An unknown job has consumed nothing, and that adds up too."""
        assert store.consumption(JOB).conserved
        ready_group(store)
        report = store.consumption(JOB)
        assert (report.stored, report.trained, dict(report.excluded)) == (6, 0, {"not leased": 6})


def made_by_steps(store: Store) -> list[PolicyVersion]:
    """Return the versions that committed steps wrote."""
    return [version for version in store.list_versions() if version.kind == "step"]


def every_fate(store: Store) -> dict[str, int]:
    """Fill the store with choices of every reason; return reason -> sampled tokens. One trained token besides."""
    old = live_version(store, step=0)
    live_version(store, step=5, model="other")
    fates = _Fates(store)
    fates.closed("trained", tokens=1)
    fates.closed("excluded", tokens=2)
    rule: dict[str, Any] = {"min_group": 1, "purposes": ("live",), "roles": ("answerer",), "max_staleness": 0}
    lease = take(store, groups=2, **rule)
    store.commit_step(lease, make_commit(account(store, lease, excluded={"call-excluded": "greedy"})))
    store.append_calls([make_call("after", "trained", tokens=[range(3)])])
    fates.closed("held", tokens=4)
    take(store, step=2, **rule)
    store.append_calls([make_call("free", None, tokens=[range(5)])])
    store.open_run(Run(run_id="e", purpose="eval"))
    fates.closed("e", tokens=6)
    fates.closed("o", tokens=7, model="other")
    store.append_calls([make_call("open", "open", tokens=[range(8)])])
    store.append_calls([make_call("failed", "failed", tokens=[range(9)])])
    store.end_run("failed", status="failed", ended_by="hook")
    fates.closed("q", tokens=10, quarantine="version changed")
    fates.closed("n", tokens=11, reward=False)
    store.open_run(Run(run_id="p", purpose="train"))
    fates.closed("p", tokens=12)
    fates.closed("role", tokens=13, role="rewriter")
    fates.closed("nobody", tokens=18, role=None)
    fates.closed(add_group(store, "open", size=2, purpose="live")[0], tokens=14)
    fates.closed("stale", tokens=16, version=old.version_id)
    newest = live_version(store, step=1)
    fates.closed("ready", tokens=17, version=newest.version_id)
    return fates.expected()


class _Fates:
    def __init__(self, store: Store) -> None:
        self.store = store

    def closed(self, run_id: str, *, tokens: int, reward: bool = True, **call: Any) -> None:
        call.setdefault("version", first_version(self.store, call.get("model", MODEL)))
        self.store.append_calls([make_call(f"call-{run_id}", run_id, tokens=[range(tokens)], **call)])
        if reward:
            self.store.add_rewards([make_reward(f"reward-{run_id}", run_id)])
        self.store.end_run(run_id, status="closed", ended_by="explicit")

    def expected(self) -> dict[str, int]:
        return {
            "greedy": 2,
            "arrived after the lease": 3,
            "leased": 4,
            "no run": 5,
            "eval": 6,
            "other model": 7,
            "open": 8,
            "run failed": 9,
            "quarantined: version changed": 10,
            "no reward": 11,
            "other purpose": 12,
            "other role": 13,
            "no role": 18,
            "group open": 14,
            "too stale": 16,
            "not leased": 17,
        }
