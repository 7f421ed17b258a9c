"""What every backend must do for a job of several models: one lease, one step, one account over all of them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tracegrad.tracestore.diagnosis_records import Extent
from tracegrad.tracestore.errors import Conflict, InvalidRecord
from tracegrad.tracestore.provenance import MadeFrom
from tracegrad.tracestore.records import Consumption, Lease, LeaseRule, ModelCalls
from tracegrad.tracestore.step_records import NewVersion, StepCommit
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import (
    JOB,
    account,
    add_group,
    first_version,
    live_version,
    make_call,
    make_reward,
    make_rule,
)

PLANNER = ModelCalls(model="p", roles=("planner",), other_roles=("critic", "writer"))
WRITER = ModelCalls(model="w", roles=("writer",), other_roles=("critic", "planner"))
RULE = make_rule(trained=(PLANNER, WRITER), min_group=1)
FROZEN = "base"
"""The model of the role `critic`, which nobody trains."""


class SeveralModelsContract:
    """A job that trains two models, beside a role whose model is frozen."""

    def test_a_run_is_leased_once_for_all_models(self, store: Store) -> None:
        """A call of any of them makes it ready; what only a frozen role said is for nobody."""
        self._run(store, "both", planner=2, writer=3, critic=4)
        self._run(store, "one", writer=5)
        self._run(store, "none", critic=6)
        lease = self._lease(store, groups=2)
        assert lease is not None and set(lease.plan.run_ids) == {"both-0", "one-0"}
        assert self._lease(store) is None
        report = store.consumption(JOB)
        assert (report.stored, dict(report.excluded)) == (20, {"leased": 14, "other model": 6})

    def test_a_step_makes_a_version_of_each_model_it_trained(self, store: Store) -> None:
        """In one commit; the account over all of them adds up, and each version knows its own calls."""
        bases = {model: first_version(store, model) for model in ("p", "w")}
        self._run(store, "a", planner=2, writer=3, critic=4)
        lease = self._lease(store)
        assert lease is not None
        entries = self._account(store, lease)
        commit = self._commit(entries, *(NewVersion(model=m, path=f"/s-1/{m}", parent_id=bases[m]) for m in bases))
        made = store.commit_step(lease, commit)
        assert store.commit_step(lease, commit) == made
        assert {m: (v.checkpoint_path, v.checkpoint_hash, v.step, v.parent_id) for m, v in made.items()} == {
            m: (f"/s-1/{m}", "sha", 1, bases[m]) for m in ("p", "w")
        }
        ids = {model: version.version_id for model, version in made.items()}
        row = store.last_checkpoint(JOB)
        assert row is not None and row.versions == store.find_versions(job_id=JOB, step=1) == ids
        assert store.find_versions(checkpoint="sha") == ids
        assert [one.versions for one in store.last_steps(JOB)] == [one.versions for one in store.trained_by("a-0")]
        report = store.consumption(JOB)
        assert (report.stored, report.trained, dict(report.excluded)) == (9, 5, {"other model": 4})
        assert store.version_origin(ids["w"]).own == MadeFrom(
            steps=1, runs=1, choices=1, trained_tokens=3, excluded_tokens=0
        )
        assert [call.call_id for call in store.version_calls(ids["p"])] == ["a-0-planner"]
        uses = {role: store.call_uses(f"a-0-{role}")[0].version_id for role in ("planner", "writer", "critic")}
        assert uses == {"planner": ids["p"], "writer": ids["w"], "critic": None}

    def test_a_model_without_anything_to_train_gets_no_version(self, store: Store) -> None:
        """Its age stands still: what its version sampled does not grow stale by the others' steps."""
        for model in ("p", "w"):
            live_version(store, 0, model)
        self._run(store, "a", writer=3)
        lease = self._lease(store)
        assert lease is not None
        made = store.commit_step(
            lease, self._commit(self._account(store, lease), NewVersion(model="w", path="/w", parent_id=None))
        )
        assert set(made) == {"w"}
        live_version(store, 3, "w")
        self._run(store, "old", planner=2)
        self._run(store, "stale", planner=2, writer=1)
        lease = self._lease(store, step=2)
        assert lease is not None and lease.plan.run_ids == ("old-0",)
        waits = store.waiting_groups(JOB, Extent())
        assert waits is not None
        assert waits.by_lag == {3: 1}

    def test_a_job_trains_the_same_models_always(self, store: Store) -> None:
        """Neither another registration, nor a lease, nor a commit is of other models."""
        self._run(store, "a", planner=2, writer=3)
        lease = self._lease(store)
        assert lease is not None
        with pytest.raises(Conflict, match="trains p, w, not p"):
            store.register_job(JOB, ["p"], {})
        with pytest.raises(InvalidRecord, match="trains p, w, its lease rule says w"):
            store.lease(JOB, RULE.of("w"), groups=1, lease_s=1, step=2, epoch=0, seed=0)
        entries = self._account(store, lease)
        new = NewVersion(model="p", path="/p", parent_id=None)
        for wrong in ((), (new, new), (new, replace(new, model="base"))):
            with pytest.raises(InvalidRecord, match="one version of each model"):
                store.commit_step(lease, self._commit(entries, *wrong))
        with pytest.raises(InvalidRecord, match="parent"):
            store.commit_step(lease, self._commit(entries, replace(new, parent_id=first_version(store, "w"))))
        assert store.last_checkpoint(JOB) is None

    def test_calls_that_another_model_recorded_make_the_version_they_trained(self, store: Store) -> None:
        """Offline, under another role map: each by its role."""
        self._run(store, "a", as_model="old", planner=2, writer=3)
        rule = replace(RULE, recorded_models=("old",))
        assert store.recorded_elsewhere(RULE) == {"old": 1}
        assert store.recorded_elsewhere(rule) == {}
        lease = self._lease(store, rule=rule)
        assert lease is not None
        entries = [replace(one, model="p" if one.call_id == "a-0-planner" else "w") for one in account(store, lease)]
        new = [NewVersion(model=model, path=f"/{model}", parent_id=None) for model in ("p", "w")]
        made = store.commit_step(lease, self._commit(entries, *new))
        assert store.version_origin(made["p"].version_id).own.trained_tokens == 2
        assert [one.call_id for one in store.version_calls(made["w"].version_id)] == ["a-0-writer"]

    def test_any_publish_is_a_publish(self, store: Store) -> None:
        """The backlog says so of every model of the job."""
        version = first_version(store, "w")
        store.register_job(JOB, ["p", "w"], {})
        assert not store.backlog(JOB, RULE).publishing
        store.request_publish(version)
        assert store.backlog(JOB, RULE).publishing

    # -- inside

    def _run(self, store: Store, name: str, *, as_model: str | None = None, **tokens: int) -> None:
        """A run of a group of one: a call of each role with so many tokens."""
        (run_id,) = add_group(store, name, size=1)
        for role, size in tokens.items():
            model = as_model or {"planner": "p", "writer": "w", "critic": FROZEN}[role]
            version = first_version(store, model)
            call = make_call(f"{run_id}-{role}", run_id, role=role, model=model, version=version, tokens=[range(size)])
            store.append_calls([call])
        store.add_rewards([make_reward(f"reward-{run_id}", run_id)])
        store.end_run(run_id, status="closed", ended_by="explicit")

    def _lease(self, store: Store, *, groups: int = 1, step: int = 1, rule: LeaseRule = RULE) -> Lease | None:
        store.register_job(JOB, ["p", "w"], {})
        return store.lease(JOB, rule, groups=groups, lease_s=60.0, step=step, epoch=0, seed=7)

    def _account(self, store: Store, lease: Lease) -> list[Consumption]:
        frozen = {call.call_id for trace in store.lease_traces(lease) for call in trace.calls if call.model == FROZEN}
        return account(store, lease, excluded=dict.fromkeys(frozen, "other model"))

    def _commit(self, entries: Sequence[Consumption], *versions: NewVersion) -> StepCommit:
        return StepCommit(
            checkpoint_path="/s-1", checkpoint_hash="sha", versions=versions, consumption=entries, metrics={}
        )
