"""A state machine over a real store: any interleaving of what proxies, trainers, people and crashes do to it.

After every step the store is compared with the model beside it (`store_model`): each run at most once per job and
epoch, none lost, groups whole, fenced leases never commit, `eval` never leased, conservation adds up. A crash is a
store that is opened anew (`store_lives`).
The rules are few and choose among many acts, because hypothesis leaves whole rules out of an example.
Used by tests/wire/tracestore/test_interleavings.py.
"""

import hypothesis.strategies as st
from hypothesis.stateful import initialize, invariant, rule
from store_leases import Leasing
from store_lives import GROUPS, PROJECT, RULES, pick, same
from store_model import AJob
from store_recording import Recording

from tracegrad.tracestore.testing.rows import MODEL

PICK = st.integers(0, 59)
"""A number that is taken modulo the number of things there are to choose from."""
FATE = st.sampled_from(["heard"] * 8 + ["cut", "unheard"])


class Interleavings(Recording, Leasing):
    """Subclassed with `open_first`, which gives the URL of an empty store of the newest schema."""

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
            + ["tree", "tree", "late", "late", "span", "span", "reward", "resolve", "end", "again", "open"]
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
        elif act == "span" and run_id is not None:
            self._tell_span(run_id, other, fate)
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

    # -- what must be true

    @invariant()
    def the_clock_ticks(self) -> None:
        self.clock.advance(2)  # further than the store's ACTIVE_WITHIN_S, which the model knows nothing of

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
