"""The gate of several models under `kill -9`: all of them are live at the new version or none is, and training goes on.

A trainer in a process of its own, an engine for each model that holds weights in this one. The trainer is killed a
moment after a stage of its gate was reached, as the store says it, and the next one goes on from there.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest
import recorded_roles as spoken
import recorded_runs as recorded
import yaml
from forked_trainer import Trainers
from llama_engine import LlamaEngine
from played_evaluator import GATE, evaluator

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import PublishState
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.adapter_client import engine_clients
from tracegrad.trainer.learner import Learner

LONG = os.environ.get("TRACEGRAD_LONG") == "1"
PUBLISH = {"probe_tokens": 8, "probe_bound": 0.001, "drain_timeout_s": 5.0, "swap_timeout_s": 5.0}
STAGES: tuple[PublishState, ...] = ("live", "settling", "evaluating", "swapping")
LONGEST_S = 0.15
"""How long after the stage was seen: a swap takes less, and so does an evaluation of the played evaluator's."""


class House:
    """Two models with runs for all steps; every third one is bad.

    An adapter and a full model, each on an engine of its own; or two adapters on one engine, which are judged beside
    what is live.
    """

    def __init__(self, folder: Path, store: str, steps: int, stack: ExitStack, *, beside: bool) -> None:
        self.path = folder / "config.yaml"
        base = recorded.random_llama(folder / "base")
        gate = GATE | {"rejected": {"stop_after": None}, "share": 0.5 if beside else 0.0}
        settings = {"steps": steps, "publish": PUBLISH}
        one = recorded.configuration(base, folder / "out", store=store, batch={"max_staleness": 99}, **settings)
        scorer = Learner(one)
        scorer.create(str(folder / "sampler"))
        mode = "adapter per role" if beside else "adapter and full model"
        raw = msgspec.to_builtins(spoken.mapped(one, mode, base))
        raw["trainer"]["publish"]["gate"] = gate
        self.engines = {
            name: stack.enter_context(LlamaEngine(base, folder / f"engine-{name}", name))
            for name in ({"base": 1} if beside else {"base": 1, "w": 1})
        }
        for name, engine in self.engines.items():
            raw["models"][name]["engine"]["url"] = engine.url
        self.config: Config = parse_config(raw)
        self.path.write_text(yaml.safe_dump(msgspec.to_builtins(self.config)))
        self.models, self.steps = self.config.trained_models(), steps
        self.store: Store = stack.enter_context(closing(open_store(self.config.store)))
        spoken.fill(self.store, self.config, 2 * steps, score=scorer.score, roles=("planner", "writer"))
        found = {step: 0.1 if step % 3 == 2 else 0.5 + step / 1000 for step in range(steps + 1)}
        stack.enter_context(evaluator(self.store, self.models, found))
        self.trainers = stack.enter_context(Trainers())

    def at(self, stage: PublishState) -> Callable[[], bool]:
        """What asks whether a gated publish that comes from now on is at a stage."""
        before = {view.publish_id for view in self.store.publish_view(self.models).values()}
        return lambda: any(
            view.gate is not None and view.state == stage and view.publish_id not in before
            for view in self.store.publish_view(self.models).values()
        )

    def live_steps(self) -> dict[str, int]:
        """Model -> the step of what is live of it."""
        live = {name: self.store.live_version(name) for name in self.models}
        return {name: version.step for name, version in live.items() if version is not None}

    def kill(self, stage: PublishState, delay_s: float) -> bool:
        """Let a trainer live until the stage; return whether it had to be killed. No model is ahead of another."""
        status = self.trainers.run_until(self.path, self.at(stage), delay_s=delay_s)
        assert status in (0, -signal.SIGKILL)
        steps = self.live_steps()
        assert len(steps) == len(self.models)
        assert len(set(steps.values())) == 1, f"a mixture is live: {steps}"
        return status != 0

    def goes_on(self) -> None:
        """The next trainer comes to the end: engines serve what is live, and every run was trained once."""
        assert self.trainers.run(self.path) == 0
        last = max(step for step in range(self.steps + 1) if step % 3 != 2)
        assert self.live_steps() == dict.fromkeys(self.models, last)
        for name in self.models:
            live = self.store.live_version(name)
            assert live is not None
            assert all(
                each.serves(live.checkpoint_path, str(live.version_id)) for each in engine_clients(self.config, name)
            )
            assert set(self.engines["base"].adapters) == {n for n in self.models if self.config.held_by(n) == "base"}
            steps = [version.step for version in self.store.list_versions(name) if version.kind == "step"]
            assert steps == list(range(1, self.steps + 1))
        report = self.store.consumption(self.config.trainer.job)
        assert (report.trained, report.conserved) == (report.stored, True)


@pytest.fixture
def make_house(tmp_path: Path, either_url: str) -> Iterator[Callable[..., House]]:
    with ExitStack() as stack:
        yield lambda steps, *, beside: House(tmp_path, either_url, steps, stack, beside=beside)


def kill_at(house: House, stages: Sequence[PublishState]) -> int:
    """Kill trainers at these stages, or until one came to its end; return how many were killed."""
    seed = int(os.environ.get("TRACEGRAD_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}: TRACEGRAD_SEED={seed} repeats it")
    moments = random.Random(seed)
    for killed, stage in enumerate(stages):
        if not house.kill(stage, moments.uniform(0.0, LONGEST_S)):
            return killed
    return len(stages)


@pytest.mark.parametrize(
    ("either_url", "beside"), [("sqlite", False), ("sqlite", True), ("postgres", True)], indirect=["either_url"]
)
def test_killed_at_each_stage_of_the_gate_all_models_or_none_are_live(
    make_house: Callable[..., House], beside: bool
) -> None:
    """Version 1 passes; version 2 does not, so it settles where one engine has one version at a time."""
    house = make_house(3 if beside else 4, beside=beside)
    stages = STAGES[1:3] if beside else STAGES
    assert kill_at(house, stages) == len(stages)
    house.goes_on()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not LONG, reason="TRACEGRAD_LONG=1 runs it")
@pytest.mark.parametrize("beside", [False, True])
def test_killed_at_twenty_stages_of_the_gate(make_house: Callable[..., House], beside: bool) -> None:
    house = make_house(40, beside=beside)
    assert kill_at(house, 5 * STAGES) == 20
    house.goes_on()
