"""One job of several models on a real store: which tokens reach which, what commits, and what the next start does."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import recorded_roles as spoken
import recorded_runs as recorded
from in_process import InProcess
from llama_engine import LlamaEngine
from offline_training import train
from played_evaluator import GATE, evaluator
from sqlalchemy import func, select

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.schema import calls, consumption, step_versions
from tracegrad.tracestore.store import Store
from tracegrad.trainer import gate
from tracegrad.trainer.adapter_client import AdapterClient
from tracegrad.trainer.controller import Controller, Surroundings
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.errors import EngineError, PublishError, StepRefused, TrainerError
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.metrics import Console

Configure = Callable[..., Config]


@pytest.fixture
def separate(configure: Configure, llama: Path, store: Store, score: recorded.Score) -> Config:
    """A model for each role, and six groups in which all speak: three steps."""
    config = spoken.mapped(configure(steps=3), "full separation", llama)
    spoken.fill(store, config, 6, score=score)
    return config


def trained_tokens(store: Store) -> dict[tuple[str, str], int]:
    """(Model of the version that was made, role) -> tokens that the steps of the job trained into it."""
    with store._db.read() as connection:
        model = func.coalesce(consumption.c.model, calls.c.model)
        rows = connection.execute(
            select(model, calls.c.role, func.sum(consumption.c.trained_tokens))
            .join(calls, calls.c.seq == consumption.c.seq)
            .where(consumption.c.trained_tokens > 0)
            .group_by(model, calls.c.role)
        )
        return {(row[0], row[1]): int(row[2]) for row in rows}


def sampled_tokens(store: Store) -> dict[str, int]:
    runs = [summary.run.run_id for summary in store.list_runs(limit=1000)]
    totals: dict[str, int] = {}
    for trace in store.traces(runs):
        for call in trace.calls:
            role = str(call.attribution.role)
            totals[role] = totals.get(role, 0) + len(call.choices[0].token_ids)
    return totals


def steps(store: Store) -> dict[str, list[tuple[int, str]]]:
    """Model -> (step, hash) of what the job made of it."""
    found: dict[str, list[tuple[int, str]]] = {}
    for version in store.list_versions():
        if version.job_id == "test":
            found.setdefault(version.model, []).append((version.step, version.checkpoint_hash))
    return found


def metrics(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.trainer.output) / "test" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("mode", spoken.MODES)
def test_exactly_the_tokens_of_its_roles_reach_each_model(
    configure: Configure, llama: Path, store: Store, score: recorded.Score, mode: str
) -> None:
    """The same runs in each mode; of a role whose model is frozen the account says that nobody trains it."""
    config = spoken.mapped(configure(steps=9), mode, llama)
    spoken.fill(store, config, 4, score=score)
    assert train(config, store)[-1] == "stopped after step 2: 0 ready groups are left, a step takes 2"
    trained, sampled = set(config.trained_models()), sampled_tokens(store)
    frozen = {role for role, model in config.roles.items() if model not in trained}
    assert frozen == ({"critic"} if "base" in config.roles.values() else set())
    expected = {(config.roles[role], role): sampled[role] for role in spoken.ROLES if role not in frozen}
    assert trained_tokens(store) == expected
    report = store.consumption("test")
    assert (report.conserved, report.trained) == (True, sum(expected.values()))
    assert dict(report.excluded) == ({"other model": sampled["critic"]} if frozen else {})
    made = steps(store)
    assert {model: [step for step, _ in each] for model, each in made.items()} == {
        model: [0, 1, 2] for model in trained
    }
    assert len({hashes[-1] for hashes in made.values()}) == 1, "one checkpoint holds them all"
    last = metrics(config)[-1]
    assert last["tokens_trained"] == sum(each["tokens_trained"] for each in last.get("models", {"": last}).values())
    assert set(last.get("models", trained)) == trained
    assert set(last["roles"]) == set(spoken.ROLES) - frozen


class Dies(Exception):
    """Stands for the death of the process."""


class Mortal(InProcess):
    """Dies once a step has been saved."""

    def __init__(self, config: Config, step: int) -> None:
        super().__init__(config)
        self.at = step

    def save(self, root: str, step: int) -> Any:
        saved = super().save(root, step)
        if step == self.at:
            raise Dies
        return saved


@pytest.mark.parametrize("credit", [{}, {"scope": "graph", "bootstrap": "all"}])
def test_a_job_that_dies_goes_on_to_the_same_bits(
    separate: Config, store: Store, configure: Configure, llama: Path, credit: dict[str, str]
) -> None:
    """Also where the credit of each model is made of all critics' values."""
    undisturbed, mortal = (
        spoken.mapped(configure(steps=3, job=job, algorithm={"credit": credit}), "full separation", llama)
        for job in ("calm", "test")
    )
    train(undisturbed, store)
    expected = [v.checkpoint_hash for v in store.list_versions("w") if v.job_id == "calm"]
    for step in (2, 3):
        with pytest.raises(Dies):
            train(mortal, store, Mortal(mortal, step))
    said = train(mortal, store)
    assert any("never committed" in line for line in said)
    assert [digest for _, digest in steps(store)["w"]] == expected
    assert steps(store)["p"] == steps(store)["w"] == steps(store)["c"]


def test_a_beginning_that_was_cut_short_is_finished(separate: Config, store: Store, monkeypatch: Any) -> None:
    """The versions of step 0 are written one by one."""
    written, add = [], store.add_version

    def once(**fields: Any) -> Any:
        if written:
            raise Dies
        written.append(fields)
        return add(**fields)

    with monkeypatch.context() as patched:
        patched.setattr(store, "add_version", once)
        with pytest.raises(Dies):
            train(separate, store)
    train(separate, store)
    made = steps(store)
    assert {model: [step for step, _ in each] for model, each in made.items()} == {
        model: [0, 1, 2, 3] for model in "pwc"
    }
    assert len({each[0] for each in made.values()}) == 1


def test_one_model_that_refuses_stops_the_step_for_all(separate: Config, store: Store) -> None:
    class Refuses(InProcess):
        def step(self, plan: Any, shares: Any, **kwargs: Any) -> Any:
            if plan.step == 2:

                def refuse(*_: Any, **__: Any) -> Any:
                    raise StepRefused("step 2: loss nan")

                self.learners["w"].step = refuse  # type: ignore[method-assign]
            return super().step(plan, shares, **kwargs)

    with pytest.raises(StepRefused, match="loss nan"):
        train(separate, store, Refuses(separate))
    last = store.last_checkpoint("test")
    assert last is not None and last.step == 1
    assert store.reclaim("test", 60.0) is None, "the lease is returned"
    train(separate, store)
    assert [step for step, _ in steps(store)["w"]] == [0, 1, 2, 3]


def test_a_model_that_had_nothing_to_train_keeps_its_version_and_its_weights(
    configure: Configure, llama: Path, store: Store, score: recorded.Score
) -> None:
    config = spoken.mapped(configure(steps=3, keep_checkpoints=1), "full separation", llama)
    spoken.fill(store, config, 2, score=score)
    spoken.fill(store, config, 2, score=score, seed=1, roles=("planner",))
    spoken.fill(store, config, 2, score=score, seed=2)
    train(until(config, 2), store)
    assert {model: [step for step, _ in each] for model, each in steps(store).items()} == {
        "p": [0, 1, 2],
        "w": [0, 1],
        "c": [0, 1],
    }
    train(config, store)
    newest = {model: store.list_versions(model)[-1] for model in "pwc"}
    assert {model: version.step for model, version in newest.items()} == dict.fromkeys("pwc", 3)
    parents = {model: store.get_version(version.parent_id or 0).step for model, version in newest.items()}
    assert parents == {"p": 2, "w": 1, "c": 1}


def until(config: Config, last: int) -> Config:
    return msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, steps=last))


def test_models_go_back_together(separate: Config, store: Store) -> None:
    """A rollback of one model's version takes the step back for all: one checkpoint holds them."""
    train(until(separate, 2), store)
    store.abandon_version(store.list_versions("w")[-1].version_id)
    train(separate, store)
    newest = {model: store.list_versions(model)[-1] for model in "pwc"}
    parents = {model: store.get_version(version.parent_id or 0) for model, version in newest.items()}
    assert {model: (newest[model].step, parents[model].step) for model in "pwc"} == dict.fromkeys("pwc", (3, 1))
    assert [v.step for v in store.list_versions("p") if v.abandoned] == [2]
    for version in store.list_versions("c"):
        store.abandon_version(version.version_id)
    with pytest.raises(TrainerError, match="abandoned"):
        train(separate, store)


PUBLISH = {"probe_tokens": 8, "probe_bound": 0.001, "drain_timeout_s": 5.0, "swap_timeout_s": 5.0}


class House:
    """A job online: an engine for each model that holds weights, and traffic whenever the trainer waits for runs."""

    def __init__(self, config: Config, store: Store, score: recorded.Score, base: Path, scratch: Path) -> None:
        self.config, self.store, self.score, self.base, self.scratch = config, store, score, base, scratch
        self.said: list[str] = []
        self.seed = 100
        self._running = contextlib.ExitStack()
        self.engines: dict[str, LlamaEngine] = {}

    def __enter__(self) -> "House":
        for name in {self.config.held_by(each): None for each in self.config.trained_models()}:
            self.engines[name] = self._running.enter_context(LlamaEngine(self.base, self.scratch / name, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def clients(self) -> dict[str, list[EngineClient]]:
        of = {name: (self.engines[self.config.held_by(name)].url, name) for name in self.config.trained_models()}
        return {
            name: [EngineClient(*at) if name in self.engines else AdapterClient(*at, self.config.held_by(name))]
            for name, at in of.items()
        }

    def train(self, workers: InProcess | None = None) -> None:
        def echo(text: str) -> None:
            self.said.append(text)
            if " waits for runs" in text:
                self.seed += 1
                spoken.fill(self.store, self.config, 2, score=self.score, seed=self.seed)

        with JobFolder(self.config.trainer).held() as folder:
            around = Surroundings(
                store=self.store,
                workers=workers or InProcess(self.config),
                folder=folder,
                console=Console(echo, steps=self.config.trainer.steps, as_json=False),
                engines=self.clients(),
            )
            Controller(self.config, around).run()


@pytest.fixture(params=["partial sharing", "adapter per role"])
def house(
    request: pytest.FixtureRequest, configure: Configure, store: Store, score: recorded.Score, tmp_path: Path
) -> Iterator[House]:
    llama = request.getfixturevalue("llama")
    config = spoken.mapped(configure(steps=2, publish=PUBLISH, keep_checkpoints=1), request.param, llama)
    with House(config, store, score, llama, tmp_path) as running:
        yield running


def served(house: House) -> dict[str, int]:
    """Model -> the step of what is live of it, after a look at what its engine says that it serves."""
    steps = {}
    for name, (client,) in house.clients().items():
        live = house.store.live_version(name)
        assert live is not None
        assert client.serves(live.checkpoint_path, str(live.version_id))
        steps[name] = live.step
    return steps


def test_every_model_goes_live_proven_on_its_engine(house: House) -> None:
    """Canary, initial version and both steps, each with a probe, whether the engine has other models beside it."""
    house.train()
    trained = house.config.trained_models()
    assert served(house) == dict.fromkeys(trained, 2)
    for engine in house.engines.values():
        expected = 6 * len(trained) if engine.adapters else 4
        assert len(engine.loaded) == expected, "canary, initial, two steps, which adapters rehearse"
    last = metrics(house.config)[-1]
    assert {model: report["result"]["verdict"] for model, report in last["publish"].items()} == dict.fromkeys(
        trained, "new"
    )
    assert last["version"] == {name: house.store.list_versions(name)[-1].version_id for name in trained}
    kinds = {name: [v.kind for v in house.store.list_versions(name)][:2] for name in trained}
    assert kinds == {name: ["initial", "canary"] for name in trained}


def test_a_model_that_fails_to_publish_stops_all_and_the_last_good_ones_serve_on(house: House) -> None:
    """The step is committed; what comes after the failed one is not published; the next start publishes both."""

    class Breaks(InProcess):
        def save(self, root: str, step: int) -> Any:
            if step == 2:
                next(iter(house.engines.values())).fail_reloads = 1
            return super().save(root, step)

    with pytest.raises((PublishError, EngineError), match="out of memory"):
        house.train(Breaks(house.config))
    assert served(house) == dict.fromkeys(house.config.trained_models(), 1)
    last = house.store.last_checkpoint("test")
    assert last is not None and last.step == 2
    house.train()
    assert served(house) == dict.fromkeys(house.config.trained_models(), 2)


def test_a_pin_holds_one_model_and_not_the_others(house: House) -> None:
    house.config = until(house.config, 1)
    house.train()
    first, second = house.config.trained_models()
    held = house.store.live_version(first)
    assert held is not None
    house.store.pin_version(held.version_id, "by hand")
    house.config = until(house.config, 2)
    house.train()
    assert served(house) == {first: 1, second: 2}
    house.train()
    assert served(house) == {first: 1, second: 2}, "the next start serves what is pinned, too"


def test_runs_that_one_model_recorded_train_two(
    configure: Configure, llama: Path, store: Store, score: recorded.Score, tmp_path: Path
) -> None:
    """Offline, under another role map: every token reaches the model of its role, and its version knows it."""
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    shared = spoken.mapped(configure(), "full sharing", base)
    spoken.fill(store, shared, 4, score=score)
    recorded_too = configure(steps=9, batch={"runs": {"recorded_models": ["all"]}})
    split = spoken.mapped(recorded_too, "partial sharing", base)
    train(split, store)
    sampled = sampled_tokens(store)
    assert trained_tokens(store) == {(split.roles[role], role): sampled[role] for role in spoken.ROLES}
    writers = store.version_calls(store.list_versions("b")[-1].version_id)
    assert {call.role for call in writers} == {"writer"}
    assert store.consumption("test").conserved
    with store._db.read() as connection:
        assert connection.execute(select(func.count()).select_from(step_versions)).scalar() == 4


@pytest.fixture
def gated(house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(gate, "POLL_S", 0.01)
    raw = msgspec.to_builtins(house.config)
    raw["trainer"]["publish"]["gate"] = GATE | {"rejected": {"then": "return"}}
    raw["trainer"]["batch"]["max_staleness"] = 9
    house.config = parse_config(raw)
    return house


def ends(store: Store, models: tuple[str, ...]) -> dict[str, list[tuple[int, str]]]:
    """Model -> (step, end) of its publishes."""
    return {
        name: [(store.get_version(p.version_id).step, p.state) for p in store.list_publishes(name)] for name in models
    }


def test_a_step_of_several_models_is_judged_as_one_and_left_as_one(gated: House) -> None:
    """Rejected, it is built on by none of them; what came next passed."""
    gated.config = until(gated.config, 3)
    models = gated.config.trained_models()
    with evaluator(gated.store, models, {0: 0.5, 1: 0.5, 2: 0.1, 3: 0.6}):
        gated.train()
    passed = [(0, "live"), (1, "live"), (2, "rejected"), (3, "live")]
    assert ends(gated.store, models) == dict.fromkeys(models, passed)
    assert served(gated) == dict.fromkeys(models, 3)
    for name in models:
        by_step = {v.step: v for v in gated.store.list_versions(name) if v.kind != "canary"}
        assert (by_step[2].abandoned, by_step[3].parent_id) == (True, by_step[1].version_id)
    assert sum("were rejected by the gate: reward differs by -0.4" in line for line in gated.said) == 1
    reports = metrics(gated.config)[1]["publish"]
    assert all(reports[name]["put_back"]["verdict"] == "new" for name in models)


def test_what_a_killed_trainer_left_unjudged_is_judged_as_one_at_the_next_start(gated: House) -> None:
    """The path is proven with what is live, then the candidates of all follow; a pinned model stays behind."""
    models = gated.config.trained_models()

    class Killed(BaseException):
        pass

    def dies(state: str) -> None:
        if state == "evaluating":
            raise Killed

    with evaluator(gated.store, models, {0: 0.5, 1: 0.5, 2: 0.5}):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Controller, "_on_publish_state", lambda _self, state: dies(state))
            gated.train()
        assert {state.state for state in gated.store.publish_view(models).values()} == {"evaluating"}
        gated.config = until(gated.config, 1)
        gated.train()
        assert ends(gated.store, models)[models[0]] == [(0, "live"), (1, "failed"), (0, "live"), (1, "live")]
        assert ends(gated.store, models)[models[0]] == ends(gated.store, models)[models[1]]
        assert served(gated) == dict.fromkeys(models, 1)
        gated.store.pin_version(gated.store.publish_view(models)[models[0]].live_version or 0, "by hand")
        gated.config = until(gated.config, 2)
        gated.train()
    assert served(gated) == {models[0]: 1, models[1]: 2}
    assert "is pinned at version" in metrics(gated.config)[-1]["publish"][models[0]]["skipped"]
