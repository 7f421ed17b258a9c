"""What a store should say, kept in plain Python: the model beside the state machine of `test_interleavings`.

It knows runs, calls, rewards, late facts, leases, ledger and deletions, and answers the same questions as the store:
which units are ready, what a lease saw, why a sampled token is not trained. Written from what the docstrings of the
store promise, without SQL.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tracegrad.tracestore.records import LeaseRule, ModelCalls

DELETED = "content deleted"


@dataclass
class ARun:
    run_id: str
    purpose: str
    group_id: str | None
    member: int | None
    opened_at: float
    active_at: float
    status: str = "open"
    ended_at: float = 0.0
    deleted: bool = False


@dataclass
class ACall:
    call_id: str
    run_id: str | None
    role: str | None
    model: str
    version: int | None
    status: str
    quarantine: str | None
    tokens: dict[int, int]
    completion_id: str | None


@dataclass
class AReward:
    reward_id: str
    name: str
    value: float
    role: str | None
    call_id: str | None


@dataclass
class AFact:
    source: str
    completion_id: str
    run_id: str | None
    role: str | None


@dataclass
class ALease:
    lease_id: int
    job_id: str
    run_ids: tuple[str, ...]
    step: int
    epoch: int
    saw: dict[str, object]
    spans: object = None
    token: int = 1
    state: str = "held"
    version_id: int | None = None


@dataclass
class AJob:
    model: str
    rule: LeaseRule | None = None
    last_step: int = 0


@dataclass
class StoreModel:
    sizes: dict[str, int]
    """Group -> planned size: of every group there may ever be."""
    runs: dict[str, ARun] = field(default_factory=dict)
    calls: dict[str, ACall] = field(default_factory=dict)
    rewards: dict[str, list[AReward]] = field(default_factory=dict)
    facts: list[AFact] = field(default_factory=list)
    leases: dict[int, ALease] = field(default_factory=dict)
    jobs: dict[str, AJob] = field(default_factory=dict)
    ledger: set[tuple[str, str, int]] = field(default_factory=set)
    refusals: set[tuple[str, str, int]] = field(default_factory=set)
    consumed: dict[tuple[str, int, str, int], tuple[int, str | None]] = field(default_factory=dict)
    """(job, epoch, call, choice) -> trained tokens, and why the rest was not."""
    steps: dict[int, int] = field(default_factory=dict)
    """Version -> step."""
    live_step: int | None = None

    # -- what happens

    def end(self, run: ARun, status: str, now: float) -> None:
        if run.status == "open":
            run.status, run.ended_at = status, now

    def touch(self, run_id: str, now: float) -> None:
        run = self.runs.setdefault(run_id, ARun(run_id, "live", None, None, now, now))
        run.active_at = max(run.active_at, now)

    def append(self, call: ACall, now: float) -> None:
        if call.run_id is not None:
            self.touch(call.run_id, now)
        self.calls[call.call_id] = call

    def tell(self, fact: AFact, now: float) -> None:
        if fact.run_id is not None:
            self.touch(fact.run_id, now)
        if any((known.source, known.completion_id) == (fact.source, fact.completion_id) for known in self.facts):
            return
        self.facts.append(fact)
        self._apply(fact)

    def resolve(self) -> None:
        for fact in self.facts:
            self._apply(fact)

    def _apply(self, fact: AFact) -> None:
        for call in self.calls.values():
            if call.completion_id == fact.completion_id:
                call.run_id = fact.run_id if call.run_id is None else call.run_id
                call.role = fact.role if call.role is None else call.role

    def close_idle(self, before: float, now: float) -> int:
        idle = [
            run
            for run in self.runs.values()
            if (run.purpose, run.status) == ("live", "open") and run.active_at < before
        ]
        for run in idle:
            self.end(run, "closed", now)
        return len(idle)

    def hold(self, lease: ALease) -> None:
        self.leases[lease.lease_id] = lease

    def commit(self, lease: ALease, reasons: dict[str, str]) -> None:
        """Enter a step: every choice that the lease saw is trained, but for the calls in `reasons`."""
        lease.state = "acknowledged"
        self.jobs[lease.job_id].last_step = lease.step
        for run_id in lease.run_ids:
            self.ledger.add((lease.job_id, run_id, lease.epoch))
        for call_id in lease.saw:
            if call_id not in self.calls:
                continue
            for index, tokens in self.calls[call_id].tokens.items():
                reason = reasons.get(call_id)
                entry = (0 if reason else tokens, reason if tokens else None)
                self.consumed[lease.job_id, lease.epoch, call_id, index] = entry

    def delete(self, some: Sequence[str], now: float) -> set[str]:
        """Delete runs; return those of which a stub stays."""
        trained = {run_id for _, run_id, _ in self.ledger if run_id in some}
        self.refusals = {one for one in self.refusals if one[1] not in some}
        mine = [call for call in self.calls.values() if call.run_id in some]
        names = {call.completion_id for call in mine if call.completion_id is not None}
        self.facts = [one for one in self.facts if one.run_id not in some and one.completion_id not in names]
        entered = {(call_id, index) for _, _, call_id, index in self.consumed}
        for call in mine:
            call.tokens = {i: n for i, n in call.tokens.items() if (call.call_id, i) in entered}
            if call.tokens:
                call.quarantine = call.quarantine or "deleted"
                call.completion_id = None
            else:
                del self.calls[call.call_id]
        for run_id in some:
            self.rewards.pop(run_id, None)
        untrained = [run_id for run_id in some if run_id not in trained]
        stubs = trained | {run_id for run_id in untrained if self._is_awaited(run_id, untrained)}
        for run_id in stubs:
            run = self.runs[run_id]
            self.end(run, "failed", now)
            run.deleted = True
        gone = [run_id for run_id in some if run_id not in stubs]
        groups = {self.runs.pop(run_id).group_id for run_id in gone} - {None}
        for group_id in groups:
            self._drop_bare(group_id)
        return stubs

    def _is_awaited(self, run_id: str, untrained: Iterable[str]) -> bool:
        group_id = self.runs[run_id].group_id
        return group_id is not None and any(
            other.group_id == group_id and other.run_id not in untrained and not other.deleted
            for other in self.runs.values()
        )

    def _drop_bare(self, group_id: str | None) -> None:
        members = [run for run in self.runs.values() if run.group_id == group_id]
        if any(not run.deleted for run in members):
            return
        for run in members:
            named = any(run_id == run.run_id for _, run_id, _ in self.ledger)
            used = any(call.run_id == run.run_id for call in self.calls.values())
            told = any(fact.run_id == run.run_id for fact in self.facts)
            if not named and not used and not told and run.run_id not in self.rewards:
                del self.runs[run.run_id]

    # -- what is asked

    def unit_of(self, run: ARun) -> str:
        return f"run:{run.run_id}" if run.group_id is None else f"group:{run.group_id}"

    def members(self, unit: str) -> list[ARun]:
        found = [run for run in self.runs.values() if self.unit_of(run) == unit]
        return sorted(found, key=lambda run: (run.member or 0, run.run_id))

    def is_held(self, job_id: str, run_id: str) -> bool:
        mine = (lease for lease in self.leases.values() if lease.job_id == job_id and lease.state == "held")
        return any(run_id in lease.run_ids for lease in mine)

    def is_rewarded(self, run_id: str, names: Sequence[str]) -> bool:
        given = {reward.name for reward in self.rewards.get(run_id, ())}
        return given.issuperset(names) if names else bool(given)

    def counts(self, call: ACall, rule: LeaseRule) -> bool:
        return call.model == _of(rule).model and (_of(rule).roles is None or call.role in _of(rule).roles)

    def is_settled(self, run: ARun, rule: LeaseRule, now: float) -> bool:
        return run.status == "failed" or (run.status == "closed" and run.ended_at <= now - rule.grace_s)

    def is_trainable(self, run: ARun, rule: LeaseRule, now: float) -> bool:
        exact = any(
            call.run_id == run.run_id
            and self.counts(call, rule)
            and (call.status, call.quarantine) == ("complete", None)
            and call.version is not None
            for call in self.calls.values()
        )
        return run.status == "closed" and not run.deleted and exact and self.is_settled(run, rule, now)

    def is_eligible(self, run: ARun, rule: LeaseRule, now: float) -> bool:
        return self.is_trainable(run, rule, now) and self.is_rewarded(run.run_id, rule.reward_names)

    def flaw(self, job_id: str, unit: str, rule: LeaseRule, now: float) -> str | None:
        """Why the unit is not ready for the job, or None: it is."""
        members = self.members(unit)
        eligible = [run for run in members if self.is_eligible(run, rule, now)]
        group_id = members[0].group_id
        taken = self.ledger | self.refusals
        if any((job_id, run.run_id, rule.epoch) in taken or self.is_held(job_id, run.run_id) for run in members):
            return "group trained without it"
        planned = 1 if group_id is None else self.sizes[group_id]
        if sum(self.is_settled(run, rule, now) for run in members) < planned:
            return "group open"
        if len(eligible) < rule.min_group:
            if group_id is None:
                return "no group"
            trainable = sum(self.is_trainable(run, rule, now) for run in members)
            return "group awaits rewards" if trainable >= rule.min_group else "group too small"
        if self._is_stale({run.run_id for run in eligible}, rule):
            return "too stale"
        return None

    def _is_stale(self, run_ids: set[str], rule: LeaseRule) -> bool:
        sampled = [call for call in self.calls.values() if call.run_id in run_ids and self.counts(call, rule)]
        steps = [self.steps[call.version] for call in sampled if call.version is not None]
        return self.live_step is not None and bool(steps) and min(steps) < self.live_step - rule.max_staleness

    def ready(self, job_id: str, rule: LeaseRule, now: float) -> list[str]:
        """The units that the job could lease, oldest first."""
        allowed = [run for run in self.runs.values() if run.purpose != "eval" and run.purpose in rule.purposes]
        opened: dict[str, float] = {}
        for run in allowed:
            unit = self.unit_of(run)
            opened[unit] = min(opened.get(unit, run.opened_at), run.opened_at)
        return sorted(
            (unit for unit in opened if self.flaw(job_id, unit, rule, now) is None),
            key=lambda unit: (opened[unit], unit),
        )

    def plan(self, units: Sequence[str], rule: LeaseRule, now: float) -> tuple[str, ...]:
        return tuple(run.run_id for unit in units for run in self.members(unit) if self.is_eligible(run, rule, now))

    def seen(self, run_ids: Sequence[str]) -> dict[str, object]:
        """What `lease_traces` of a lease made now gives: each call with its run and role."""
        return {call.call_id: (call.run_id, call.role) for call in self.calls.values() if call.run_id in run_ids}

    def newest_rewards(self, run_ids: Sequence[str]) -> dict[tuple[str, str, str | None, str | None], float]:
        return {
            (run_id, reward.name, reward.role, reward.call_id): reward.value
            for run_id in run_ids
            for reward in self.rewards.get(run_id, ())
        }

    def account(self, job_id: str, epoch: int, now: float) -> tuple[int, int, dict[str, int]]:
        """Sampled tokens stored, trained, and excluded by reason: as the job sees them in that epoch."""
        stored = trained = 0
        excluded: Counter[str] = Counter()
        for call in self.calls.values():
            for index, tokens in call.tokens.items():
                stored += tokens
                entry = self.consumed.get((job_id, epoch, call.call_id, index))
                if entry is None:
                    excluded[self._reason(job_id, epoch, call, now)] += tokens
                else:
                    trained += entry[0]
                    if entry[1] is not None:
                        excluded[entry[1]] += tokens - entry[0]
        return stored, trained, dict(excluded)

    def _reason(self, job_id: str, epoch: int, call: ACall, now: float) -> str:
        """Why nothing of the call was trained, the first reason that applies."""
        job = self.jobs[job_id]
        if call.run_id is None:
            return "no run"
        run = self.runs[call.run_id]
        rule = job.rule or LeaseRule(
            trained=(ModelCalls(model=job.model),), max_staleness=0, min_group=1, purposes=(run.purpose,)
        )  # type: ignore[arg-type]
        reasons = (
            (run.purpose == "eval", "eval"),
            (self.is_held(job_id, run.run_id), "leased"),
            ((job_id, run.run_id, epoch) in self.ledger, "arrived after the lease"),
            ((job_id, run.run_id, epoch) in self.refusals, "refused"),
            (call.model != job.model, "other model"),
            (_of(rule).roles is not None and call.role is None, "no role"),
            (not self.counts(call, rule), "other role"),
            (run.purpose not in rule.purposes, "other purpose"),
            (run.status == "open", "open"),
            (run.status == "failed", "run failed"),
            (call.status == "failed", "failed call"),
            (call.status == "aborted", "aborted"),
            (call.quarantine is not None, f"quarantined: {call.quarantine}"),
            (call.version is None, "no version"),
            (not self.is_settled(run, rule, now), "in grace time"),
            (not self.is_rewarded(run.run_id, rule.reward_names), "no reward"),
            (job.rule is None, "not leased"),
        )
        for applies, reason in reasons:
            if applies:
                return reason
        return self.flaw(job_id, self.unit_of(run), replace(rule, epoch=epoch), now) or "not leased"


def _of(rule: LeaseRule) -> ModelCalls:
    """The jobs of the machine train one model."""
    return rule.trained[0]
