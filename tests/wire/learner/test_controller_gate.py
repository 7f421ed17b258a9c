"""Training behind a gate and behind a pin: what does not serve is said, counted, and left or built on as configured."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import recorded_runs as recorded
from in_process import InProcess
from llama_engine import LlamaEngine
from versions import go_live

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.records import Lease, PolicyVersion
from tracegrad.tracestore.step_records import StepCommit
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.gating import evaluation
from tracegrad.trainer import gate, publishing
from tracegrad.trainer.checkpoints import step_folder
from tracegrad.trainer.controller import Controller, Surroundings
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.metrics import Console

PUBLISH = {"probe_tokens": 16, "probe_bound": 0.001, "drain_timeout_s": 5.0, "swap_timeout_s": 5.0}
GATE = {"app": "a:g", "tasks": "t.jsonl", "reward": "r:f", "rule": {"max_drop": 0.1, "confidence": 0.5}}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "POLL_S", 0.01)
    monkeypatch.setattr(publishing, "POLL_S", 0.01)


def live_of(store: Store) -> PolicyVersion:
    live = store.live_version(recorded.MODEL)
    assert live is not None
    return live


@contextmanager
def evaluator(store: Store, by_step: dict[int, float]) -> Iterator[None]:
    """One that finds this of the versions of these steps, live or to be judged."""
    over = threading.Event()

    def find(version: PolicyVersion, publish_id: int | None) -> None:
        name = f"{version.version_id} {publish_id}"
        if all(each.name != name for each in store.list_evaluations(version_id=version.version_id)):
            said = {"run_ids": ("a",), "n_failed": 0, "score": "reward", "values": {"one": by_step[version.step]}}
            evaluation(store, version.version_id, publish_id=publish_id, name=name, **said)

    def work() -> None:
        while not over.wait(0.01):
            store.beat_evaluator(Evaluator(evaluator_id="e", model=recorded.MODEL, tasks_hash="t", score="reward"))
            last, live = store.last_publish(recorded.MODEL), store.live_version(recorded.MODEL)
            if live is not None and live.step in by_step:
                find(live, None)
            if last is not None and last.state == "evaluating":
                find(store.get_version(last.version_id), last.publish_id)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    over.set()
    thread.join()


class Generates(InProcess):
    """Workers beside which traffic goes on; `before` is called when it is asked for, and may say no."""

    def __init__(self, config: Config, store: Store, before: Callable[[int], bool] = lambda n: True) -> None:
        super().__init__(config)
        self.store, self.before, self.asked = store, before, 0
        self.loaded: list[str] = []

    def load(self, path: str, expected_hash: str | None = None) -> int:
        self.loaded.append(step_folder(path).name[:11])
        return super().load(path, expected_hash)

    def traffic(self) -> None:
        self.asked += 1
        if not self.before(self.asked):
            return
        version_id, seed = live_of(self.store).version_id, len(self.store.list_runs(limit=10_000))
        groups = recorded.recorded_groups(2, score=self.score, version_id=version_id, seed=seed)
        recorded.fill(self.store, groups)


def run(config: Config, store: Store, engine: LlamaEngine, workers: Generates) -> tuple[Controller, list[str]]:
    said: list[str] = []

    def echo(text: str) -> None:
        said.append(text)
        if " waits for runs" in text:
            workers.traffic()

    with JobFolder(config.trainer).held() as folder:
        around = Surroundings(
            store=store,
            workers=workers,
            folder=folder,
            console=Console(echo, steps=config.trainer.steps, as_json=False),
            engines={recorded.MODEL: [EngineClient(engine.url, recorded.MODEL)]},
        )
        controller = Controller(config, around)
        controller.run()
    return controller, said


def metrics(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.trainer.output) / "test" / "metrics.jsonl").read_text()
    return [json.loads(line)["publish"] for line in text.splitlines()]


def states(store: Store) -> list[tuple[int, str]]:
    return [(store.get_version(p.version_id).step, p.state) for p in store.list_publishes(recorded.MODEL)]


def gated(configure: Callable[..., Config], steps: int, **changed: Any) -> Config:
    return configure(steps=steps, publish={**PUBLISH, "gate": {**GATE, **changed}}, batch={"max_staleness": 9})


def test_training_goes_on_from_what_was_rejected_and_the_last_good_version_serves(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine
) -> None:
    config = gated(configure, 3)
    with evaluator(store, {0: 0.5, 1: 0.5, 2: 0.1, 3: 0.6}):
        _, said = run(config, store, engine, Generates(config, store))
    assert states(store) == [(0, "live"), (1, "live"), (2, "rejected"), (3, "live")]
    assert any("(step 2) was rejected by the gate: reward differs by -0.4" in line for line in said), said
    first, second, third = metrics(config)
    assert first["decision"]["passed"] and third["decision"]["passed"]
    assert second["decision"]["mean"] == pytest.approx(0.1) and "serves on" in second["rejected"]
    assert second["put_back"]["verdict"] == "new", "that the old weights are back is proven"
    parents = {v.step: v.parent_id for v in store.list_versions(recorded.MODEL) if v.kind == "step"}
    by_step = {v.step: v.version_id for v in store.list_versions(recorded.MODEL) if v.kind != "canary"}
    assert parents[3] == by_step[2], "trained on from the rejected version"
    assert engine.version == str(by_step[3])


def test_or_it_returns_to_the_last_good_version(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine
) -> None:
    config = gated(configure, 3, rejected={"then": "return"})
    workers = Generates(config, store)
    with evaluator(store, {0: 0.5, 1: 0.5, 2: 0.1, 3: 0.6}):
        _, said = run(config, store, engine, workers)
    by_step = {v.step: v for v in store.list_versions(recorded.MODEL) if v.kind != "canary"}
    assert (by_step[2].abandoned, by_step[3].parent_id) == (True, by_step[1].version_id)
    assert workers.loaded == ["step-000001"]
    assert any("training goes on from version" in line for line in said)


def test_too_many_in_a_row_end_the_training_and_the_next_start_serves_the_good_one(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine
) -> None:
    config = gated(configure, 9, rejected={"stop_after": 2})
    with evaluator(store, {0: 0.5, 1: 0.1, 2: 0.1}):
        controller, _ = run(config, store, engine, Generates(config, store))
    assert controller.gave_up is not None and "rejected 2 versions in a row" in controller.gave_up
    assert (live_of(store).step, engine.version) == (0, str(live_of(store).version_id))
    config = gated(configure, 2)
    workers = Generates(config, store)
    _, said = run(config, store, engine, workers)
    assert any("the newest, is held back" in line for line in said), said
    assert workers.loaded == ["step-000002", "step-000000", "step-000002"], "the path is proven with what is served"
    assert states(store)[-1] == (0, "live")


def test_a_pin_holds_serving_while_training_goes_on_and_its_end_publishes_the_newest(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine
) -> None:
    def before(asked: int) -> bool:
        if asked == 2:
            store.pin_version(live_of(store).version_id, "by hand")
        if asked == 4:
            assert live_of(store).step == 1
            store.unpin(recorded.MODEL, "by hand")
        return asked != 4

    config = configure(steps=4, publish=PUBLISH, batch={"max_staleness": 9})
    workers = Generates(config, store, before)
    _, said = run(config, store, engine, workers)
    assert states(store) == [(0, "live"), (1, "live"), (2, "skipped"), (3, "skipped"), (3, "live"), (4, "live")]
    skipped = [p for p in store.list_publishes(recorded.MODEL) if p.state == "skipped"]
    assert all("is pinned at version" in (p.error or "") for p in skipped)
    assert sum("is not published: model" in line for line in said) == 2
    assert "skipped" in metrics(config)[1]


def test_the_end_of_a_pin_at_an_older_version_publishes_the_newest_again_while_runs_are_waited_for(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest was live when the pin came, so that the trainer never held anything back itself."""
    catch_up = publishing.Publishing.catch_up

    def before(asked: int) -> bool:
        if asked == 2:
            first = next(v for v in store.list_versions(recorded.MODEL) if v.step == 0)
            store.pin_version(first.version_id, "by hand")
            go_live(store, first.version_id)
        return asked != 2

    def then_unpin(self: publishing.Publishing, *given: Any) -> None:
        catch_up(self, *given)
        if store.pinned(recorded.MODEL) is not None:
            assert live_of(store).step == 0
            store.unpin(recorded.MODEL, "by hand")

    monkeypatch.setattr(publishing.Publishing, "catch_up", then_unpin)
    config = configure(steps=2, publish=PUBLISH, batch={"max_staleness": 9})
    _, said = run(config, store, engine, Generates(config, store, before))
    assert states(store) == [(0, "live"), (1, "live"), (0, "live"), (1, "live"), (2, "live")]
    assert any("the pin is off" in line for line in said)


def test_a_trainer_that_starts_under_a_pin_serves_the_pinned_version(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine
) -> None:
    config = configure(steps=1, publish=PUBLISH)
    run(config, store, engine, Generates(config, store))
    versions = {v.step: v for v in store.list_versions(recorded.MODEL) if v.kind != "canary"}
    store.pin_version(versions[0].version_id, "by hand")
    workers = Generates(config, store)
    run(config, store, engine, workers)
    assert (engine.version, live_of(store).step) == (str(versions[0].version_id), 0)
    assert workers.loaded == ["step-000001", "step-000000", "step-000001"]


def test_a_rollback_between_a_commit_and_its_publish_is_waited_for_and_kept(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tracegrad rollback` does it: its publish is under way when the trainer wants to publish, then it is live."""
    commit_step, over = Store.commit_step, []

    def committed(self: Store, lease: Lease, commit: StepCommit) -> Any:
        made = commit_step(self, lease, commit)
        if lease.plan.step == 2:
            version = next(v for v in store.list_versions(recorded.MODEL) if v.step == 0)
            publish = store.request_publish(version.version_id)
            over.append(threading.Timer(0.3, finish, [publish.publish_id]))
            over[0].start()
        return made

    def finish(publish_id: int) -> None:
        for state in ("draining", "swapping"):
            store.advance_publish(publish_id, state)
        store.advance_publish(publish_id, "live", goes_back=True)

    monkeypatch.setattr(Store, "commit_step", committed)
    config = configure(steps=3, publish=PUBLISH, batch={"max_staleness": 9})
    _, said = run(config, store, engine, Generates(config, store))
    over[0].join()
    assert states(store) == [(0, "live"), (1, "live"), (0, "live"), (3, "live")]
    by_step = {v.step: v for v in store.list_versions(recorded.MODEL) if v.kind != "canary"}
    assert by_step[1].abandoned and by_step[2].abandoned and by_step[3].parent_id == by_step[0].version_id
    assert "is published later: publish 3" in "\n".join(said)
    assert f"training goes on from version {by_step[0].version_id} (step 0)" in said
    assert "abandoned" in metrics(config)[1]["skipped"]


def test_what_the_gate_rejects_when_a_pin_is_taken_off_is_not_built_on_either(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine
) -> None:
    def before(asked: int) -> bool:
        if asked == 1:
            store.pin_version(live_of(store).version_id, "by hand")
        if asked == 2:
            store.unpin(recorded.MODEL, "by hand")
        return asked != 2

    config = gated(configure, 2, rejected={"then": "return"})
    with evaluator(store, {0: 0.5, 1: 0.1, 2: 0.6}):
        run(config, store, engine, Generates(config, store, before))
    assert states(store) == [(0, "live"), (1, "skipped"), (1, "rejected"), (2, "live")]
    by_step = {v.step: v for v in store.list_versions(recorded.MODEL) if v.kind != "canary"}
    assert by_step[1].abandoned and by_step[2].parent_id == by_step[0].version_id
