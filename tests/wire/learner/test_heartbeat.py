"""A trainer's heartbeat, while it works and when it ends."""

import time
from contextlib import closing
from pathlib import Path

from tracegrad.tracestore.store import open_store
from tracegrad.trainer.heartbeat import Heartbeat


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
