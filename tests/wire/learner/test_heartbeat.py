"""A trainer's heartbeat, while it works and when it ends."""

import time
from contextlib import closing
from pathlib import Path

from waits import wait_for

from tracegrad.tracestore.errors import StoreUnavailable
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.heartbeat import Heartbeat, Pulse


def test_it_beats_beside_the_work_and_is_gone_afterwards(tmp_path: Path) -> None:
    with closing(open_store(f"sqlite:///{tmp_path}/store.db")) as store:
        with Heartbeat(store, "job", every_s=0.02) as heart:
            first = store.trainer_at_work("job", 9)
            assert first is not None and first.phase == "starting"
            heart.enter("training", 2)
            time.sleep(0.2)
            now = store.trainer_at_work("job", 0.15)
            assert now is not None, "nobody spoke for 0.2 s, and it beat all the same"
            assert (now.phase, now.step, now.started_at) == ("training", 2, first.started_at)
        assert store.trainer_at_work("job", 9) is None


def test_a_store_that_is_away_for_a_moment_ends_no_pulse() -> None:
    beats: list[float] = []

    def beat() -> None:
        beats.append(time.monotonic())
        if len(beats) < 3:
            raise StoreUnavailable("the network is gone")

    with Pulse(beat, name="p", every_s=0.01):
        wait_for(lambda: len(beats) >= 5, "it beats again")
