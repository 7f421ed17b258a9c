"""What the gate's evaluator finds to do in the store, and what it stores where it cannot do it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from versions import add_version

from tracegrad.adapters import gate
from tracegrad.adapters.errors import ProxyRefused
from tracegrad.adapters.gate import GateEvaluator, Work
from tracegrad.adapters.gate_command import gate as command
from tracegrad.tracestore.config import GateConfig, GateRule
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.gating import GateTerms
from tracegrad.tracestore.records import PublishState, Task
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.gating import evaluation
from tracegrad.tracestore.testing.rows import MODEL, Clock, live_version

ME = Evaluator(evaluator_id="e", model=MODEL, tasks_hash="t", score="f1")
TERMS = GateTerms(share=0.0, engines=("http://e",), timeout_s=60.0).as_json()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/s.db", clock=clock)
    yield opened
    opened.close()


class Refusing:
    """An app session whose proxy lets nothing be opened."""

    executor = SimpleNamespace(open={}, fail_open_runs=None)

    class control:
        @staticmethod
        def take_time() -> None:
            pass

        @staticmethod
        async def put_tasks(_tasks: Any) -> None:
            raise ProxyRefused("the key has not the scope `reward`", status=403, code="scope")

    async def fail(self, _why: str) -> int:
        return 0


def evaluator(store: Store, told: list[Any] | None = None, models: tuple[str, ...] = (MODEL,)) -> GateEvaluator:
    config = GateConfig(app="a:g", tasks="t", reward="r:f", rule=GateRule(minimum=0.5))
    session: Any = Refusing()
    session.executor.fail_open_runs = session.fail
    tasks = [Task(task_id="one", input={})]
    tell = (told if told is not None else []).append
    return GateEvaluator(store, ME, config, tasks, session, models=models, expires_s=10.0, tell=tell)


def version_of(store: Store, model: str) -> int:
    return add_version(store, "/c", 1, model=model).version_id


def candidate(store: Store, *states: PublishState) -> tuple[int, int]:
    """Publish a second version through `states`; return it and the publish."""
    version = version_of(store, MODEL)
    publish = store.request_publish(version, gate=TERMS)
    for state in states:
        store.advance_publish(publish.publish_id, state)
    return version, publish.publish_id


def found(store: Store, version_id: int, publish_id: int | None = None, *, error: str | None = None) -> None:
    values, run_ids = (None, ()) if error else ({"one": 1.0}, ("a",))
    evaluation(store, version_id, publish_id=publish_id, run_ids=run_ids, n_failed=0, values=values, error=error)


def test_the_live_version_is_evaluated_once(store: Store) -> None:
    at_work = evaluator(store)
    assert at_work._find() is None, "nothing is live"
    live = live_version(store, 0).version_id
    assert at_work._find() == Work(versions={MODEL: live}, publish_id=None)
    found(store, live)
    assert at_work._find() is None
    newer = live_version(store, 1).version_id
    assert at_work._find() == Work(versions={MODEL: newer}, publish_id=None), "it came live without a judgement"


def test_a_candidate_goes_first_and_is_evaluated_once_and_in_time(store: Store, clock: Clock) -> None:
    live = live_version(store, 0).version_id
    version, publish = candidate(store, "draining", "swapping")
    at_work = evaluator(store)
    assert at_work._find() is None, "nobody is served now, so nothing can be evaluated"
    store.advance_publish(publish, "evaluating")
    assert at_work._find() == Work(versions={MODEL: version}, publish_id=publish)
    assert at_work._still(Work(versions={MODEL: version}, publish_id=publish))
    assert at_work._still(Work(versions={MODEL: live}, publish_id=None))
    found(store, version, publish)
    assert at_work._find() is None
    clock.advance(61)
    assert not at_work._still(Work(versions={MODEL: version}, publish_id=publish)), "its time is over"


def test_what_could_not_be_evaluated_is_tried_again_only_where_somebody_waits(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "time", SimpleNamespace(time=lambda: clock.now))
    live = live_version(store, 0).version_id
    found(store, live, error="no app")
    at_work = evaluator(store)
    clock.advance(3600)
    assert at_work._find() is None
    candidate(store)
    assert at_work._find() == Work(versions={MODEL: live}, publish_id=None)
    found(store, live, error="still no app")
    assert at_work._find() is None, "not at once"
    clock.advance(31)
    assert at_work._find() == Work(versions={MODEL: live}, publish_id=None)


def test_an_evaluation_that_cannot_be_made_is_stored_with_its_reason(store: Store) -> None:
    live_version(store, 0)
    version, publish = candidate(store, "draining", "swapping", "evaluating")
    told: list[Any] = []
    asyncio.run(evaluator(store, told)._do(Work(versions={MODEL: version}, publish_id=publish)))
    (stored,) = store.list_evaluations(publish_id=publish)
    assert (stored.error, stored.mean, stored.n_runs) == ("the key has not the scope `reward`", None, 0)
    assert told == [stored]


def test_without_a_gate_there_is_nothing_to_do(tmp_path: Path) -> None:
    path = tmp_path / "tracegrad.yaml"
    path.write_text("models: {}\n")
    done = CliRunner().invoke(command, ["--config", str(path)])
    assert isinstance(done.exception, ConfigError) and "has no trainer.publish.gate" in str(done.exception)


def test_candidates_of_several_models_are_evaluated_as_one_beside_what_is_live(store: Store) -> None:
    """Not before each model has a live version, and under the first of their publishes."""
    at_work = evaluator(store, models=(MODEL, "frozen", "writer"))
    live = {MODEL: live_version(store, 0).version_id, "frozen": live_version(store, 0, model="frozen").version_id}
    assert at_work._find() is None
    live["writer"] = live_version(store, 0, model="writer").version_id
    assert at_work._find() == Work(versions=live, publish_id=None)
    new = {name: version_of(store, name) for name in (MODEL, "writer")}
    first, second = store.request_together(dict.fromkeys(new.values(), TERMS))
    states: list[PublishState] = ["draining", "swapping"]
    for publish in (first, second):
        for state in states:
            store.advance_publish(publish.publish_id, state)
            assert at_work._find() is None
    store.advance_together(second.publish_id, "evaluating")
    work = Work(versions={**live, **new}, publish_id=first.publish_id)
    assert at_work._find() == work and at_work._still(work)
    asyncio.run(at_work._do(work))
    (stored,) = store.list_evaluations(publish_id=first.publish_id)
    assert dict(stored.versions) == {**live, **new}
    assert at_work._find() is None
