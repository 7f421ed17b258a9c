"""What proxies, drivers and people do to a store and to the model beside it: runs, calls, rewards, facts, deletions.

Each act compares what the store answers with what the model says. Chosen among by the rules of `store_machine`.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store_lives import ALONE, GROUPS, PROJECT, Cut, Lives, pick, refused
from store_model import ACall, AFact, AReward, ARun

from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.records import Group, LateAttribution, Run, Span, Task
from tracegrad.tracestore.testing.rows import MODEL, live_version, make_call, make_reward


class Recording(Lives):
    """The acts of those who fill a store."""

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
        span_id = None if run_id is None else f"span-{role}"
        fact = LateAttribution(source=source, completion_id=completion_id, run_id=run_id, role=role, span_id=span_id)
        if self.do(fate, lambda: self.store.attribute_late([fact])) is not Cut:
            self.model.tell(AFact(source, completion_id, run_id, role), self.clock.now)

    def _tell_span(self, run_id: str, superstep: int, fate: str) -> None:
        """A part of the span that most calls are in: now and then the first that is heard of it."""
        part = Span(span_id="span-answerer", run_id=run_id, name="answerer", superstep=superstep)
        if not self.model.runs[run_id].deleted and self.do(fate, lambda: self.store.put_spans([part])) is not Cut:
            self.model.touch(run_id, self.clock.now)

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
