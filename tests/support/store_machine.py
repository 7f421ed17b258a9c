"""A state machine over a real store: any interleaving of what proxies, trainers, people and crashes do to it.

After every step the store is compared with the model beside it (`store_model`): each run at most once per job and
epoch, none lost, groups whole, fenced leases never commit, `eval` never leased, conservation adds up. A crash is a
store that is opened anew: "cut" stops a transaction right before its commit (on SQLite the files are copied in that
moment and the copy is opened, which is what a killed process leaves), "unheard" loses the answer after it.
The rules are few and choose among many acts, because hypothesis leaves whole rules out of an example.
Used by tests/wire/tracestore/test_interleavings.py.
"""

import copy
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Connection, event, text
from store_model import ACall, AFact, AJob, ALease, AReward, ARun, StoreModel

from tracegrad.tracestore.errors import Conflict, LeaseLost
from tracegrad.tracestore.records import Call, Consumption, Group, LateAttribution, Lease, LeaseRule, Purpose, Run, Task
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import MODEL, Clock, live_version, make_call, make_commit, make_reward, make_rule

PROJECT = "default"
GROUPS: dict[str, tuple[int, Purpose]] = {
    "one": (1, "train"),
    "pair": (2, "train"),
    "three": (3, "train"),
    "exam": (2, "eval"),
}
ALONE: tuple[Purpose, ...] = ("live", "train", "eval")
RULES: dict[str, LeaseRule] = {
    "first": make_rule(min_group=1),
    "second": make_rule(
        min_group=2, reward_names=("em",), roles=("answerer",), purposes=("train",), max_staleness=0, grace_s=4.0
    ),
}
"""Training job -> what it leases."""
PICK = st.integers(0, 59)
"""A number that is taken modulo the number of things there are to choose from."""
FATE = st.sampled_from(["heard"] * 8 + ["cut", "unheard"])


class Cut(Exception):
    """The process died in this moment."""


class Interleavings(RuleBasedStateMachine):
    """Subclassed with `open_first`, which gives the URL of an empty store of the newest schema."""

    open_first: ClassVar[Callable[[], str]]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.url = type(self).open_first()
        self.store = self._opened()
        self.model = StoreModel({})
        self.numbers: Counter[str] = Counter()
        self.appended: dict[str, Call] = {}
        self.handles: list[Lease] = []
        """Every lease that somebody was ever given, fenced ones included."""
        self.commits: dict[tuple[int, int], Any] = {}
        self.backup: tuple[Path, StoreModel] | None = None
        self.dying = False

    # -- the store and its deaths

    def _opened(self) -> Store:
        store = open_store(self.url, create=False, clock=self.clock)
        if store._db.is_sqlite:  # this is about interleavings; test_durability is about the disk
            event.listen(store._db.engine, "connect", lambda driver, _: driver.execute("PRAGMA synchronous=OFF"))
            store._db.engine.dispose()
        event.listen(store._db.engine, "commit", self._at_commit)
        return store

    def _at_commit(self, connection: Connection) -> None:
        if self.dying and connection.get_execution_options().get("tracegrad_writes"):
            self.dying = False
            self._keep_what_is_on_the_disk()
            raise Cut

    def _keep_what_is_on_the_disk(self) -> None:
        if self.store._db.is_sqlite:
            now = Path(str(self.store._db.url.database))
            following = now.with_name(f"{self.new_id('life')}.db")
            for suffix in ("", "-wal"):
                if now.with_name(now.name + suffix).exists():
                    shutil.copy(now.with_name(now.name + suffix), following.with_name(following.name + suffix))
            self.url = f"sqlite:///{following}"

    def _open_again(self) -> None:
        self.store.close()
        self.store = self._opened()

    def do(self, fate: str, work: Callable[[], Any]) -> Any:
        """Return what `work` gives; Cut where it never happened. But for the fate "heard" the process dies."""
        self.dying = fate == "cut"
        try:
            found = work()
        except Cut:
            found = Cut
        finally:
            self.dying = False
        if fate == "unheard" or found is Cut:
            self._open_again()
        return found

    # -- choosing

    def new_id(self, kind: str) -> str:
        self.numbers[kind] += 1
        return f"{kind}{self.numbers[kind]}"

    def any_run(self, number: int) -> str | None:
        """One of the newest runs, or None where there is none; every third time one that a lease holds, if any is."""
        held = [run_id for lease in self.model.leases.values() if lease.state == "held" for run_id in lease.run_ids]
        among = held if held and number % 3 == 2 else list(self.model.runs)[-12:]
        return pick(number, among) if among else None

    # -- the rules

    @initialize(kinds=st.lists(st.sampled_from(list(GROUPS)), min_size=2, max_size=4))
    def begin(self, kinds: list[str]) -> None:
        self._publish()
        for job_id in RULES:
            self.store.register_job(job_id, [MODEL], {})
            self.model.jobs[job_id] = AJob(MODEL)
        for kind in kinds:
            self._roll_out(kind, ("f1", "em"))

    @rule(
        act=st.sampled_from(
            ["roll out"] * 3
            + ["append"] * 4
            + ["tree", "tree", "late", "late", "reward", "resolve", "end", "again", "open"]
        ),
        run=PICK,
        other=PICK,
        placed=st.sampled_from(["known"] * 4 + ["unheard of", "nowhere", "nowhere"]),
        flaw=st.sampled_from(["exact"] * 6 + ["failed", "aborted", "quarantined", "no version", "other model"]),
        role=st.sampled_from(["answerer", "answerer", "rewriter", None]),
        tokens=st.lists(st.integers(1, 3), min_size=1, max_size=2),
        fate=FATE,
    )
    def a_proxy(
        self, *, act: str, run: int, other: int, placed: str, flaw: str, role: str | None, tokens: list[int], fate: str
    ) -> None:
        run_id = self.any_run(run)
        if act == "roll out":
            names = ("f1",) if other % 3 == 0 else ("f1", "em")
            self._roll_out(pick(run, list(GROUPS)), names, left_open=other % 4 == 3)
        elif act == "open":
            self._open_any(other, fate)
        elif act == "append":
            where = {"known": run_id, "unheard of": "stray", "nowhere": None}[placed]
            self._append(where, role, fate, flaw=flaw, version=other, tokens=tokens)
        elif act == "tree" and run_id is not None:
            self._attribute_late(1, run_id, None, "heard")
            self._append(None, role, fate, flaw="exact", version=-1, tokens=tokens)
        elif act == "late":
            self._attribute_late(other % 5 - 2, run_id if placed == "known" else None, role, fate)
        elif act == "resolve":
            self._resolve_attributions(fate)
        elif act == "again":
            self._append_again(other)
        elif run_id is not None and act == "reward":
            self._reward(run_id, "em" if other % 2 else "f1", role, fate, on_call=other % 3 == 0)
        elif run_id is not None:
            self._end(run_id, "failed" if flaw == "failed" else "closed", fate)

    @rule(
        act=st.sampled_from(["lease"] * 4 + ["commit"] * 5 + ["renew", "release", "refuse", "reclaim", "reclaim"]),
        job=st.sampled_from(list(RULES)),
        which=PICK,
        groups=st.integers(1, 2),
        epoch=st.sampled_from([0, 0, 0, 1]),
        ahead=st.sampled_from([1, 1, 1, 2]),
        excluded=st.sampled_from([None, "greedy", "superseded by a retry"]),
        fate=FATE,
    )
    def a_trainer(
        self, *, act: str, job: str, which: int, groups: int, epoch: int, ahead: int, excluded: str | None, fate: str
    ) -> None:
        if act == "lease":
            self._lease(job, fate, groups=groups, epoch=epoch, ahead=ahead)
            if which % 2 and self.handles and self.model.leases[self.handles[-1].lease_id].state == "held":
                self._resolve_attributions("heard")  # a proxy does, every half second
                self._sees_what_it_saw(self.handles[-1])
        elif act == "reclaim":
            self._reclaim(job, fate)
        elif self.handles:
            lease = self.handles[-1 - which % min(len(self.handles), 4)]
            if act == "commit":
                self._commit_step(lease, excluded, fate)
            elif act == "renew":
                self._renew(lease)
            elif act == "refuse":
                self._refuse(lease, fate)
            else:
                self._release(lease, fate)

    @rule(
        act=st.sampled_from(
            ["crash", "time", "time", "publish", "idle", "unplaced", "back up", "restore", "delete", "delete"]
        ),
        which=st.lists(PICK, min_size=1, max_size=3),
        busy=st.sampled_from(["refuse", "skip", "skip", "force"]),
        fate=FATE,
    )
    def a_person(self, *, act: str, which: list[int], busy: str, fate: str) -> None:
        if act == "delete":
            self._delete_runs(which, busy, fate)
        elif act == "unplaced":
            self._delete_unplaced_calls(fate)
        elif act == "publish":
            self._publish()
        elif act == "idle":
            idle_s = 20.0 * (which[0] % 8)
            assert self.store.close_idle_runs(PROJECT, idle_s) == self.model.close_idle(
                self.clock.now - idle_s, self.clock.now
            )
        elif act == "crash":
            self._keep_what_is_on_the_disk()
            self._open_again()
        elif act == "time":  # leases expire, and stay the job's
            self.clock.advance(100.0)
        elif self.store._db.is_sqlite:
            self._back_up() if act == "back up" else self._restore()

    # -- what proxies and drivers do

    def _publish(self) -> None:
        step = 0 if self.model.live_step is None else self.model.live_step + 1
        version = live_version(self.store, step)
        self.model.steps[version.version_id] = self.model.live_step = step

    def _member(self, name: str, member: int) -> Run:
        size, purpose = self.model.sizes[name], GROUPS[name.split("-", maxsplit=1)[0]][1]
        self.store.put_tasks([Task(task_id=name, input={})])
        self.store.put_groups([Group(group_id=name, task_id=name, planned_size=size, purpose=purpose)])
        return Run(run_id=f"{name}-{member}", purpose=purpose, group_id=name, member=member)

    def _open_any(self, which: int, fate: str) -> None:
        """A member of a group that is known or new, or a run alone; known ones are opened again."""
        if which % 4 == 0:
            name = self.new_id(f"{pick(which, list(GROUPS))}-")
            self.model.sizes[name] = GROUPS[name.split("-")[0]][0]
        places = [(name, member) for name, size in self.model.sizes.items() for member in range(size)][-6:]
        alone = [Run(run_id=f"alone-{purpose}", purpose=purpose) for purpose in ALONE]
        place = pick(which, [*places, *alone])
        self._open(place if isinstance(place, Run) else self._member(*place), fate)

    def _open(self, run: Run, fate: str) -> None:
        known = self.model.runs.get(run.run_id)
        if known is not None and (known.purpose, known.group_id) != (run.purpose, run.group_id):
            return  # deleted once, and then heard of again: it is a live run now
        if self.do(fate, lambda: self.store.open_run(run)) is not Cut and known is None:
            now = self.clock.now
            self.model.runs[run.run_id] = ARun(run.run_id, run.purpose, run.group_id, run.member, now, now)

    def _append(
        self, run_id: str | None, role: str | None, fate: str, *, flaw: str, version: int, tokens: list[int]
    ) -> None:
        call_id = self.new_id("call")
        made = ACall(
            call_id=call_id,
            run_id=run_id,
            role=role,
            model="other" if flaw == "other model" else MODEL,
            version=None if flaw in ("no version", "other model") else pick(version, list(self.model.steps)),
            status=flaw if flaw in ("failed", "aborted") else "complete",
            quarantine="no logprobs" if flaw == "quarantined" else None,
            tokens=dict(enumerate(tokens)),
            completion_id=f"chatcmpl-{call_id}",
        )
        call = make_call(
            call_id,
            run_id,
            tokens=[range(n) for n in tokens],
            role=role,
            model=made.model,
            version=made.version,
            status=made.status,
            quarantine=made.quarantine,
        )
        if self.do(fate, lambda: self.store.append_calls([call])) is not Cut:
            self.model.append(made, self.clock.now)
            self.appended[call_id] = call

    def _append_again(self, which: int) -> None:
        """By a proxy that did not hear of it. What the call took over since is no other content."""
        call = pick(which, list(self.appended.values())) if self.appended else None
        stored = None if call is None else self.model.calls.get(call.call_id)
        if call is not None and stored is not None and stored.completion_id and len(stored.tokens) == len(call.choices):
            self.store.append_calls([call])

    def _attribute_late(self, ahead: int, run_id: str | None, role: str | None, fate: str) -> None:
        """A fact about one of the last calls, or one that comes before its call."""
        source: Any = "langsmith" if ahead % 2 else "hook"
        completion_id = f"chatcmpl-call{max(self.numbers['call'] + ahead, 1)}"
        fact = LateAttribution(source=source, completion_id=completion_id, run_id=run_id, role=role)
        if self.do(fate, lambda: self.store.attribute_late([fact])) is not Cut:
            self.model.tell(AFact(source, completion_id, run_id, role), self.clock.now)

    def _resolve_attributions(self, fate: str) -> None:
        if self.do(fate, self.store.resolve_attributions) is not Cut:
            self.model.resolve()

    def _reward(self, run_id: str, name: str, role: str | None, fate: str, *, on_call: bool = False) -> None:
        """Also late, and in the place of an earlier one."""
        calls = [call.call_id for call in self.model.calls.values() if call.run_id == run_id]
        call_id = calls[-1] if on_call and calls and role is None else None
        given = AReward(self.new_id("reward"), name, float(self.numbers["reward"]), role, call_id)
        reward = make_reward(given.reward_id, run_id, given.value, name, role=role, call_id=call_id)
        stored = self.do(fate, lambda: self.store.add_rewards([reward]))
        if stored is not Cut:
            self.model.rewards.setdefault(run_id, []).append(given)
            trained = {job_id for job_id, trained_run, _ in self.model.ledger if trained_run == run_id}
            assert stored[0].late_for == tuple(sorted(trained))
            self.store.add_rewards([reward])

    def _end(self, run_id: str, status: Any, fate: str) -> None:
        known = self.model.runs[run_id]

        def end() -> Any:
            return self.store.end_run(run_id, status=status, ended_by="explicit")

        if (known.status, status) == ("closed", "failed"):
            refused(Conflict, end)
        elif self.do(fate, end) is not Cut:
            self.model.end(known, status, self.clock.now)

    def _roll_out(self, kind: str, names: Sequence[str], *, left_open: bool = False) -> None:
        """All that a rollout does for a group, so that there is something to lease; its last member may not end."""
        name = self.new_id(f"{kind}-")
        self.model.sizes[name] = GROUPS[kind][0]
        for member in range(GROUPS[kind][0]):
            run = self._member(name, member)
            self._open(run, "heard")
            self._append(run.run_id, "answerer", "heard", flaw="exact", version=-1, tokens=[2])
            for reward_name in names:
                self._reward(run.run_id, reward_name, None, "heard")
            if not left_open or member + 1 < GROUPS[kind][0]:
                self._end(run.run_id, "closed", "heard")

    # -- what trainers do

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
        for trace in self.store.lease_traces(lease):
            seen |= {call.call_id: (trace.run.run_id, call.attribution.role) for call in trace.calls}
            for reward in trace.rewards:
                rewards[trace.run.run_id, reward.name, reward.role, reward.call_id] = reward.value
        same({**seen, "": rewards}, self.model.leases[lease.lease_id].saw)

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

    # -- what people do

    def _delete_runs(self, which: list[int], busy: Any, fate: str) -> None:
        wanted = sorted({run_id for number in which if (run_id := self.any_run(number)) is not None})
        held = {run_id for run_id in wanted if any(self.model.is_held(job_id, run_id) for job_id in self.model.jobs)}
        refusing = held | {run_id for run_id in wanted if self.model.runs[run_id].status == "open"}
        if busy == "refuse" and refusing:
            refused(Conflict, lambda: self.store.delete_runs(wanted))
            return
        deletion = self.do(fate, lambda: self.store.delete_runs(wanted, busy=busy))
        if deletion is Cut:
            return
        if busy == "force":
            for lease in self.model.leases.values():
                if lease.state == "held" and held.intersection(lease.run_ids):
                    lease.state = "released"
        some = [run_id for run_id in wanted if busy == "force" or run_id not in refusing]
        assert set(deletion.skipped) == set(wanted) - set(some)
        assert set(deletion.stubs) == self.model.delete(some, self.clock.now)

    def _delete_unplaced_calls(self, fate: str) -> None:
        if self.do(fate, lambda: self.store.delete_unplaced_calls(PROJECT, self.clock.now)) is Cut:
            return
        for call in [call for call in self.model.calls.values() if call.run_id is None]:
            del self.model.calls[call.call_id]
            self.model.facts = [one for one in self.model.facts if one.completion_id != call.completion_id]

    def _back_up(self) -> None:
        target = Path(str(self.store._db.url.database)).with_name(f"{self.new_id('backup')}.db")
        self.store.backup(target)
        self.backup = (target, copy.deepcopy(self.model))

    def _restore(self) -> None:
        """The store goes back, and with each step that is gone its consumption. Who held a lease since has none."""
        if self.backup is not None:
            target, self.model = self.backup
            self.backup = None
            self.url = f"sqlite:///{target}"
            self._open_again()
            self.handles.clear()
            self.commits.clear()

    # -- what must be true

    @invariant()
    def the_clock_ticks(self) -> None:
        self.clock.advance(1)

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        """All of it at the end; on the way one account now and then (it is what costs), each in its turn."""
        self.numbers["step"] += 1
        turn, rest = divmod(self.numbers["step"], 5)
        accounts = [(job_id, epoch) for job_id in self.model.jobs for epoch in (0, 1)]
        if accounts and not rest:
            self._adds_up(*pick(turn, accounts))
        if self.numbers["step"] % 3 == 0:
            for lease in self.handles[-3:]:
                if self.model.leases[lease.lease_id].state == "held":
                    self._sees_what_it_saw(lease)
        self._has_what_it_should()

    def teardown(self) -> None:
        try:
            for job_id, job in self.model.jobs.items():
                for epoch in (0, 1):
                    self._adds_up(job_id, epoch)
                self._queue_adds_up(job_id)
                wanted = job.rule or RULES[job_id]
                ready = self.model.ready(job_id, wanted, self.clock.now)
                same(self.store.backlog(job_id, wanted).ready_groups, len(ready))
            same(self.store.check(), [])
        finally:
            self.store.close()

    def _adds_up(self, job_id: str, epoch: int) -> None:
        report = self.store.consumption(job_id, epoch)
        expected = self.model.account(job_id, epoch, self.clock.now)
        same((report.stored, report.trained, dict(report.excluded)), expected)
        assert report.conserved

    def _queue_adds_up(self, job_id: str) -> None:
        expected = self.model.account(job_id, 0, self.clock.now)
        queue = self.store.queue(job_id, epoch=0)
        told: Counter[str] = Counter()
        for one in queue.reasons:
            told[one.reason] += one.tokens
        same({reason: tokens for reason, tokens in told.items() if tokens and reason != "trained"}, expected[2])
        same((queue.stored, queue.tokens("trained"), queue.conserved), (expected[0], expected[1], True))

    def _has_what_it_should(self) -> None:
        with self.store._db.read() as connection:
            ledger = connection.execute(text("SELECT job_id, run_id, epoch FROM ledger")).all()
            holds = connection.execute(text("SELECT job_id, run_id FROM holds")).all()
            runs = connection.execute(text("SELECT run_id, purpose, status FROM runs")).all()
        same(sorted(map(tuple, ledger)), sorted(self.model.ledger))
        held = [lease for lease in self.model.leases.values() if lease.state == "held"]
        same(sorted(map(tuple, holds)), sorted((lease.job_id, run_id) for lease in held for run_id in lease.run_ids))
        same(set(map(tuple, runs)), {(run.run_id, run.purpose, run.status) for run in self.model.runs.values()})
        assert "eval" not in {self.model.runs[run_id].purpose for _, run_id in holds}


def same(stored: Any, expected: Any) -> None:
    assert stored == expected, f"the store says {stored}, the model {expected}"


def pick(number: int, among: Sequence[Any]) -> Any:
    return among[number % len(among)]


def refused(kind: type[Exception], work: Callable[[], Any]) -> None:
    try:
        work()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was to be raised")
