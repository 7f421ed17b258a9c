"""What trainers do to a store and to the model beside it: leases, what they see, commits; fenced ones never do.

Each act compares what the store answers with what the model says. Chosen among by the rules of `store_machine`.
"""

from dataclasses import replace

from store_lives import RULES, Cut, Lives, refused, same
from store_model import ALease

from tracegrad.tracestore.errors import Conflict, LeaseLost
from tracegrad.tracestore.records import Consumption, Lease
from tracegrad.tracestore.testing.rows import MODEL, make_commit


class Leasing(Lives):
    """The acts of those who train on what a store holds."""

    def _lease(self, job: str, fate: str, *, groups: int, epoch: int, ahead: int) -> None:
        step = self.model.jobs[job].last_step + ahead
        lease = self.do(
            fate, lambda: self.store.lease(job, RULES[job], groups=groups, lease_s=60, step=step, epoch=epoch, seed=7)
        )
        if lease is Cut:
            return
        wanted = replace(RULES[job], epoch=epoch)
        self.model.jobs[job].rule = wanted
        ready = self.model.ready(job, wanted, self.clock.now)
        if len(ready) < groups:
            assert lease is None, f"{lease} of {ready}"
            return
        assert lease is not None, f"{ready} were ready"
        plan = self.model.plan(ready[:groups], wanted, self.clock.now)
        same(lease.plan.run_ids, plan)
        saw = {**self.model.seen(plan), "": self.model.newest_rewards(plan)}
        self.model.leases[lease.lease_id] = ALease(lease.lease_id, job, plan, step, epoch, saw)
        self._hears(lease, fate)

    def _reclaim(self, job: str, fate: str) -> None:
        lease = self.do(fate, lambda: self.store.reclaim(job, 60))
        if lease is Cut:
            return
        held = [one for one in self.model.leases.values() if (one.job_id, one.state) == (job, "held")]
        if not held:
            assert lease is None
            return
        first = min(held, key=lambda one: one.lease_id)
        first.token += 1
        assert (lease.lease_id, lease.token, lease.plan.run_ids) == (first.lease_id, first.token, first.run_ids)
        assert (lease.plan.step, lease.plan.epoch) == (first.step, first.epoch)
        self._hears(lease, fate)

    def _hears(self, lease: Lease, fate: str) -> None:
        self._sees_what_it_saw(lease)
        if fate == "heard":
            self.handles.append(lease)

    def _sees_what_it_saw(self, lease: Lease) -> None:
        """The data of a lease are those of the moment it was made in, whoever reads them, and when."""
        seen: dict[str, object] = {}
        rewards = {}
        known = self.model.leases[lease.lease_id]
        traces = self.store.lease_traces(lease)
        if known.state == "held":  # the model knows no spans: the first look is the measure
            spans = [(trace.spans, [call.attribution.span for call in trace.calls]) for trace in traces]
            known.spans = spans if known.spans is None else known.spans
            same(spans, known.spans)
        for trace in traces:
            seen |= {call.call_id: (trace.run.run_id, call.attribution.role) for call in trace.calls}
            for reward in trace.rewards:
                rewards[trace.run.run_id, reward.name, reward.role, reward.call_id] = reward.value
        same({**seen, "": rewards}, known.saw)

    def _renew(self, lease: Lease) -> None:
        known = self.model.leases[lease.lease_id]
        if (known.token, known.state) == (lease.token, "held"):
            assert self.store.renew(lease, 60).expires_at == self.clock.now + 60
            self._sees_what_it_saw(lease)
        else:
            refused(LeaseLost, lambda: self.store.renew(lease, 60))

    def _release(self, lease: Lease, fate: str) -> None:
        known = self.model.leases[lease.lease_id]
        if (known.token, known.state) != (lease.token, "held"):
            refused(LeaseLost, lambda: self.store.release(lease))
        elif self.do(fate, lambda: self.store.release(lease)) is not Cut:
            known.state = "released"

    def _refuse(self, lease: Lease, fate: str) -> None:
        """Nothing of it trains: its runs are put aside for the epoch."""
        known = self.model.leases[lease.lease_id]
        entries = self._consumption(known, dict.fromkeys(known.saw, "greedy"))
        if (known.token, known.state) != (lease.token, "held"):
            refused(LeaseLost, lambda: self.store.refuse(lease, entries))
        elif self.do(fate, lambda: self.store.refuse(lease, entries)) is not Cut:
            known.state = "released"
            self.model.refusals |= {(lease.job_id, run_id, known.epoch) for run_id in known.run_ids}

    def _commit_step(self, lease: Lease, excluded: str | None, fate: str) -> None:
        """Of any lease that anybody ever had: the fenced, released and acknowledged are refused."""
        known = self.model.leases[lease.lease_id]
        key = (lease.lease_id, lease.token)
        reasons = {} if excluded is None else dict.fromkeys(sorted(known.saw)[1:2], excluded)
        commit = self.commits.setdefault(key, make_commit(self._consumption(known, reasons), hash_=f"sha-{key}"))
        if known.token != lease.token or known.state == "released":
            refused(LeaseLost, lambda: self.store.commit_step(lease, commit))
            return
        if known.state == "acknowledged":
            assert self.store.commit_step(lease, commit)[MODEL].version_id == known.version_id
            return
        if known.step in self._steps(lease.job_id):
            refused(Conflict, lambda: self.store.commit_step(lease, commit))
            return
        self._sees_what_it_saw(lease)
        versions = self.do(fate, lambda: self.store.commit_step(lease, commit))
        if versions is Cut:
            return
        known.version_id = versions[MODEL].version_id
        self.model.commit(known, {entry.call_id: entry.reason for entry in commit.consumption if entry.reason})
        last = self.store.last_checkpoint(lease.job_id)
        assert last is not None
        assert last.step == max(self._steps(lease.job_id))

    def _steps(self, job_id: str) -> set[int]:
        return {one.step for one in self.model.leases.values() if (one.job_id, one.state) == (job_id, "acknowledged")}

    def _consumption(self, lease: ALease, reasons: dict[str, str]) -> list[Consumption]:
        """Account for what the lease saw (of calls that were deleted since there is nothing to say)."""
        calls = [self.model.calls[call_id] for call_id in lease.saw if call_id in self.model.calls]
        return [
            Consumption(
                run_id=str(call.run_id),
                call_id=call.call_id,
                choice_index=index,
                trained_tokens=0 if call.call_id in reasons else tokens,
                excluded_tokens=tokens if call.call_id in reasons else 0,
                reason=reasons.get(call.call_id),
            )
            for call in calls
            for index, tokens in call.tokens.items()
        ]
