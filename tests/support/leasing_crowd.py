"""A crowd on one store: forked processes that lease, train, release, meddle and die at random till all is trained.

    python leasing_crowd.py STORE_URL SEED PROCESSES JOB

The parent imports everything once, forks, and forks again for who was killed by its own hand. A child prints one JSON
line for each step it committed, and one for each error that nobody should see; it ends when no run is left to train.
Every number comes from SEED, the order of events from the machine. Used by tests/wire/tracestore/test_crowd.py.
"""

import json
import os
import random
import signal
import sys
import time
from typing import Any

from tracegrad.tracestore.errors import Conflict, LeaseLost, NotFound, TraceStoreError
from tracegrad.tracestore.records import Lease
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import account, make_call, make_commit, make_reward, make_rule

GIVE_UP_S = 600.0
NOISE = 6
"""Runs of a batch that a meddler writes to."""


def say(**what: Any) -> None:
    """One line in one write: pipes keep those whole."""
    os.write(1, json.dumps(what).encode() + b"\n")


class Member:
    """One life of one process of the crowd."""

    def __init__(self, store: Store, job: str, chance: random.Random, first_step: int) -> None:
        self.store, self.job, self.chance, self.step = store, job, chance, first_step
        self.runs = [summary.run.run_id for summary in store.list_runs(limit=100_000)]

    def live(self) -> None:
        """Until nothing is left."""
        deadline = time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline:
            if self.chance.random() < 0.3:
                self.meddle()
            lease = self.any_lease()
            if lease is not None:
                self.work(lease)
            elif self.store.backlog(self.job, make_rule()).ready_groups == 0:
                lease = self.store.reclaim(self.job, 60.0)
                if lease is None:
                    return
                self.work(lease)
        raise TimeoutError("the crowd does not come to an end")

    def any_lease(self) -> Lease | None:
        """A new one; now and then that of somebody else, who may be dead or alive."""
        if self.chance.random() < 0.1:
            return self.store.reclaim(self.job, 60.0)
        self.step += 1
        groups = self.chance.choice((1, 1, 2))
        return self.store.lease(self.job, make_rule(), groups=groups, lease_s=60.0, step=self.step, epoch=0, seed=0)

    def work(self, lease: Lease) -> None:
        try:
            self.die(0.05)
            if self.chance.random() < 0.3:
                lease = self.store.renew(lease, 60.0)
            if self.chance.random() < 0.15:
                self.store.release(lease)
                return
            commit = make_commit(account(self.store, lease), hash_=f"{os.getpid()}-{lease.lease_id}-{lease.token}")
            self.die(0.05)
            self.store.commit_step(lease, commit)
            self.die(0.03)
            say(committed=lease.plan.run_ids)
        except LeaseLost:
            return

    def die(self, chance: float) -> None:
        if self.chance.random() < chance:
            os.kill(os.getpid(), signal.SIGKILL)

    def meddle(self) -> None:
        """What proxies and people do meanwhile to any runs, in any order; and two ways to die in it."""
        some = self.chance.sample(self.runs, min(NOISE, len(self.runs)))
        act, number = self.chance.random(), self.chance.getrandbits(60)
        if act < 0.4:
            self.store.add_rewards([make_reward(f"late-{number}-{run_id}", run_id, 0.5) for run_id in some])
        elif act < 0.8:
            fresh = [f"fresh-{self.chance.randrange(20)}" for _ in range(2)]
            self.store.append_calls([make_call(f"late-{number}-{run_id}", run_id) for run_id in {*some, *fresh}])
        elif act < 0.9:
            self.store.attribute_late([])
            self.store.close_idle_runs("default", 3600.0)
        else:
            self.delete([f"fresh-{self.chance.randrange(20)}", some[0]])

    def delete(self, run_ids: list[str]) -> None:
        """By force: a lease that holds it is over. Somebody may be writing to what is deleted, and find it gone."""
        try:
            self.store.delete_runs(run_ids, busy="force" if self.chance.random() < 0.3 else "skip")
        except (NotFound, Conflict):
            return
        except TraceStoreError as error:
            if "something is left, or was written since" not in str(error):
                raise


def be_one(url: str, job: str, seed: str, first_step: int) -> int:
    store = open_store(url, create=False)
    member = None
    while True:
        try:
            member = member or Member(store, job, random.Random(seed), first_step)
            member.live()
            return 0
        except (NotFound, Conflict) as error:
            if "deleted" not in str(error) and "unknown run" not in str(error) and "no run" not in str(error):
                say(error=f"{type(error).__name__}: {error}")
                return 1
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is to see it
            say(error=f"{type(error).__name__}: {error}")
            return 1


def main(url: str, seed: str, processes: int, job: str) -> int:
    born = 0
    alive: dict[int, int] = {}
    worst = 0

    def bear() -> None:
        nonlocal born
        born += 1
        pid = os.fork()
        if pid == 0:
            os._exit(be_one(url, job, f"{seed}-{born}", born * 1_000_000))
        alive[pid] = born

    for _ in range(processes):
        bear()
    while alive:
        pid, status = os.wait()
        del alive[pid]
        if os.WIFSIGNALED(status):
            bear()
        else:
            worst = max(worst, os.WEXITSTATUS(status))
    say(lives=born)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
