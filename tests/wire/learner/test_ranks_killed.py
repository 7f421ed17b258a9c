"""One of two workers is killed with SIGKILL at random moments: the job ends in the bits of an undisturbed one."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import recorded_runs as recorded
from ranked import Crew, Live

from tracegrad.tracestore.records import BatchPlan
from tracegrad.tracestore.rules import lease_rule
from tracegrad.trainer.checkpoints import list_checkpoints, verify_checkpoint
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.samples import build_batch

STEPS = 4
SIZE = 2
LONG = os.environ.get("TRACEGRAD_LONG") == "1"


class House:
    """A job of two workers, what it trains, what it makes undisturbed, and how long that takes."""

    def __init__(self, folder: Path, crew: Crew) -> None:
        self.folder, self.crew = folder, crew
        base = recorded.random_llama(folder / "base", hidden=64)
        optimizer = {"epochs": 2, "minibatches": 2, "lr": 1e-3}
        self.config = recorded.configuration(base, folder / "out", optimizer=optimizer)
        scorer = Learner(self.config)
        scorer.create(str(folder / "scorer"))
        self.samples = build_batch(
            recorded.traces_of(recorded.recorded_groups(4, score=scorer.score)), lease_rule(self.config)
        )
        self.plans = tuple(BatchPlan(step=s, epoch=0, seed=s, run_ids=("r",)) for s in range(1, STEPS + 1))
        crew.run(SIZE, self.job("first"))  # the warm process is warm only afterwards
        began = time.monotonic()
        crew.run(SIZE, self.job("undisturbed"))
        self.life_s = time.monotonic() - began
        self.expected = self.made("undisturbed")
        assert len(self.expected) == STEPS + 1 and self.made("first") == self.expected

    def job(self, name: str) -> Live:
        return Live(config=self.config, samples=self.samples, plans=self.plans, root=str(self.folder / name))

    def made(self, name: str) -> list[str]:
        """Names of checkpoint folders hold their hashes."""
        return [path.name for path in list_checkpoints(self.folder / name)]

    def kill_at_random(self, kills: int) -> None:
        seed = int(os.environ.get("TRACEGRAD_SEED", time.time_ns() % 1_000_000))
        print(f"seed {seed}: TRACEGRAD_SEED={seed} repeats it; an undisturbed life takes {self.life_s:.1f} s")
        moments = random.Random(seed)
        number = killed = noticed = 0
        while killed < kills:
            number += 1
            job, ended = self.job(f"random-{number}"), False
            while killed < kills and not ended:
                victim, moment = moments.randrange(SIZE), moments.uniform(0.0, self.life_s)
                statuses, answers = self.crew.try_to(SIZE, job, kill=victim, after_s=moment)
                ended = statuses == [0] * SIZE
                if not ended:
                    assert statuses[victim] in (0, -signal.SIGKILL), (seed, answers)
                    killed += 1
                    noticed += statuses[1 - victim] == 1
            self.crew.run(SIZE, job)
            assert self.made(f"random-{number}") == self.expected, f"seed {seed}"
            verify_checkpoint(list_checkpoints(self.folder / f"random-{number}")[-1])
        print(f"{noticed} of {killed} times the other worker noticed by itself")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("ranks")
    with Crew(tmp_path_factory.mktemp("crew")) as crew:
        yield House(folder, crew)


def test_one_of_two_is_killed_at_five_random_moments(house: House) -> None:
    house.kill_at_random(5)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not LONG, reason="TRACEGRAD_LONG=1 runs it")
def test_one_of_two_is_killed_at_thirty_random_moments(house: House) -> None:
    house.kill_at_random(30)
