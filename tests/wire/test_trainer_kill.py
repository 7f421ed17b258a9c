"""Law 7 under `kill -9`: a trainer that is killed again and again ends with the bits of one that nothing disturbed.

Real processes on a real store: on SQLite, and in a database of the PostgreSQL that TRACEGRAD_TEST_POSTGRES names. The
job trains two models, an adapter and a full one, each in a group of its own, in the trainer's own process: so a life
costs a second or two, and many can be ended. Deaths of workers alone: tests/wire/learner/test_ranks_killed.py.
tests/integration/test_trainer_resume.py does a few of the same with Ray.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import recorded_roles as spoken
import recorded_runs as recorded
import yaml
from forked_trainer import Trainers

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.crash_points import POINTS
from tracegrad.trainer.learner import Learner

STEPS = 6
OFFLINE_POINTS = [point for point in POINTS if point != "during-publish"]
LONG = os.environ.get("TRACEGRAD_LONG") == "1"


class House:
    """Recorded groups for all steps, what an undisturbed job makes of them, and how long it takes."""

    def __init__(self, folder: Path, store: str, trainers: Trainers) -> None:
        self.folder, self.trainers = folder, trainers
        self.config = self._recorded(store)
        self.undisturbed: dict[str, list[tuple[int, str]]] = {}
        trainers.get_warm()
        began = time.monotonic()
        assert trainers.run(self.job("undisturbed")) == 0
        self.life_s = time.monotonic() - began
        self.undisturbed = self.trained("undisturbed")
        assert set(self.undisturbed) == {"p", "w"}
        assert all([step for step, _ in made] == list(range(STEPS + 1)) for made in self.undisturbed.values())

    def _recorded(self, store: str) -> Config:
        """Fill the store with runs in which both models speak."""
        base = recorded.random_llama(self.folder / "base", hidden=64)
        optimizer = {"epochs": 2, "minibatches": 2, "lr": 1e-3}
        settings = {"optimizer": optimizer, "steps": STEPS, "keep_checkpoints": STEPS}
        one = recorded.configuration(base, self.folder / "out", store=store, **settings)
        scorer = Learner(one)
        scorer.create(str(self.folder / "sampler"))
        config = spoken.mapped(one, "adapter and full model", base)
        with closing(open_store(store)) as opened:
            spoken.fill(opened, config, 2 * STEPS, score=scorer.score, roles=("planner", "writer"))
        return config

    def job(self, name: str) -> Path:
        """Write the configuration of a job of that name."""
        named = msgspec.structs.replace(self.config, trainer=msgspec.structs.replace(self.config.trainer, job=name))
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(msgspec.to_builtins(named)))
        return path

    def trained(self, name: str) -> dict[str, list[tuple[int, str]]]:
        """Model -> the steps and hashes of what the job made of it."""
        made: dict[str, list[tuple[int, str]]] = {}
        with closing(open_store(self.config.store)) as store:
            for version in store.list_versions():
                if version.job_id == name:
                    made.setdefault(version.model, []).append((version.step, version.checkpoint_hash))
        return made

    def check(self, name: str) -> None:
        """Every run trained once, and the same weights, bit by bit."""
        assert self.trained(name) == self.undisturbed
        with closing(open_store(self.config.store)) as store:
            report = store.consumption(name)
            assert (report.trained, report.conserved) == (report.stored, True)
            assert store.reclaim(name, 1.0) is None
        lines = (Path(self.config.trainer.output) / name / "metrics.jsonl").read_text().splitlines()
        assert [msgspec.json.decode(line)["step"] for line in lines] == list(range(1, STEPS + 1))

    def kill_at_random(self, kills: int) -> None:
        """Kill trainers `kills` times, each at a moment of what is left of its life; let each job come to its end."""
        seed = int(os.environ.get("TRACEGRAD_SEED", time.time_ns() % 1_000_000))
        print(f"seed {seed}: TRACEGRAD_SEED={seed} repeats it; an undisturbed life takes {self.life_s:.1f} s")
        moments = random.Random(seed)
        number = killed = 0
        while killed < kills:
            number += 1
            path = self.job(f"random-{number}")
            while killed < kills:
                status = self.trainers.run(path, after_s=moments.uniform(0.0, self.life_s))
                assert status in (0, -signal.SIGKILL), f"seed {seed}: {path.stem} ended with status {status}"
                if status == 0:
                    break
                killed += 1
            assert self.trainers.run(path) == 0, f"seed {seed}: {path.stem} did not come to its end"
            self.check(path.stem)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("kills")
    store = f"sqlite:///{folder}/store.db"
    if request.param == "postgres":
        store = request.getfixturevalue("postgres_database").render_as_string(hide_password=False)
    with Trainers() as trainers:
        yield House(folder, store, trainers)


def test_killed_at_every_named_point_and_continued(house: House) -> None:
    path = house.job("named")
    for step, point in enumerate(OFFLINE_POINTS, start=1):
        assert house.trainers.run(path, point=f"{point}:{step}") == -signal.SIGKILL, point
    assert house.trainers.run(path) == 0
    house.check("named")


def test_killed_at_a_few_random_moments(house: House) -> None:
    house.kill_at_random(5 if house.config.store.startswith("sqlite") else 2)  # lives are longer on PostgreSQL


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not LONG, reason="TRACEGRAD_LONG=1 runs it")
def test_killed_at_fifty_random_moments(house: House) -> None:
    house.kill_at_random(50)
