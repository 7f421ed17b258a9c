"""The publisher with a gate: what did not pass never stays, at whatever moment somebody dies. Engines on the wire."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from deaths import Died, dies_at
from fake_engine import FakeEngine, save_weight
from versions import add_version
from weight_probes import probe

from tracegrad.tracestore.config import GateConfig, GateRule, PublishConfig
from tracegrad.tracestore.errors import Pinned
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.gating import rejections_in_a_row
from tracegrad.tracestore.records import PolicyVersion, Publish, PublishState
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.gating import evaluation
from tracegrad.trainer import gate as gate_module
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishFailed, PublishRejected
from tracegrad.trainer.gate import version_to_serve
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.versions_table import describe, table


class House:
    """A live version of weight 1.0 with an evaluation of 0.5 on two tasks, engines, and an evaluator to be played."""

    def __init__(self, folder: Path, store: Store, stack: ExitStack, n_engines: int) -> None:
        self.folder, self.store = folder, store
        self.engines = [stack.enter_context(FakeEngine(self.checkpoint(1.0))) for _ in range(n_engines)]
        self.evaluator = Evaluator(evaluator_id="e", model="main", tasks_hash="t", score="f1")
        self.states: list[str] = []
        self.live = self.version(1.0)
        self.publisher().publish(self.live.version_id, probe(1.0))
        self.found(self.live.version_id, None, 0.5)
        self.states.clear()

    def checkpoint(self, weight: float) -> Path:
        return save_weight(self.folder / f"w{weight}", weight)

    def version(self, weight: float, step: int = 0) -> PolicyVersion:
        return add_version(self.store, self.checkpoint(weight), step, model="main", kind="step")

    def publisher(self, on_state: Callable[[str], None] | None = None, **changed: Any) -> Publisher:
        rule = GateRule(max_drop=0.1, confidence=0.5)
        gate = GateConfig(app="a:g", tasks="t", reward="r:f", **{"timeout_s": 0.3, "rule": rule, **changed})
        settings = PublishConfig(probe_tokens=100, drain_timeout_s=0.4, swap_timeout_s=0.6, gate=gate)
        clients = [EngineClient(engine.url, "main", timeout_s=5) for engine in self.engines]

        def told(state: str) -> None:
            self.states.append(state)
            if on_state is not None:
                on_state(state)

        return Publisher(self.store, "main", clients, settings, on_state=told)

    def found(self, version_id: int, publish: Publish | None, mean: float, error: str | None = None) -> None:
        values = None if error else {"one": mean, "two": mean}
        publish_id = None if publish is None else publish.publish_id
        run_ids = () if error else ("a", "b")
        evaluation(
            self.store, version_id, publish_id=publish_id, values=values, run_ids=run_ids, n_failed=0, error=error
        )

    def judges(self, mean: float, **said: Any) -> Callable[[str], None]:
        """An evaluator that finds this of every candidate, once it is there to be evaluated."""
        self.store.beat_evaluator(self.evaluator)

        def on_state(state: str) -> None:
            if state == "evaluating":
                self.found(self.last.version_id, self.last, mean, **said)

        return on_state

    @property
    def last(self) -> Publish:
        found = self.store.last_publish("main")
        assert found is not None
        return found

    def serving(self) -> list[tuple[float, str]]:
        return [(engine.weight, engine.version) for engine in self.engines]

    def live_version(self) -> int:
        found = self.store.live_version("main")
        assert found is not None
        return found.version_id


def test_what_passes_goes_live_and_is_the_next_baseline(house: House) -> None:
    publisher = house.publisher(house.judges(0.45))
    new = house.version(1.2, 1)
    report = publisher.publish(new.version_id, probe(1.2, 1.0))
    assert report.decision is not None
    assert (report.decision.passed, report.decision.difference) == (True, pytest.approx(-0.05))
    assert house.states == ["draining", "swapping", "evaluating", "live"]
    assert house.serving() == [(1.2, str(new.version_id))]
    assert house.last.decision is not None and house.last.decision["mean"] == pytest.approx(0.45)
    assert "evaluation" in str(house.last.decision) and house.last.gate is not None
    third = house.version(1.3, 2)
    assert publisher.publish(third.version_id, probe(1.3, 1.2)).decision.difference == 0.0  # type: ignore[union-attr]


def test_what_is_rejected_is_put_back_with_proof(house: House) -> None:
    publisher = house.publisher(house.judges(0.39))
    publisher._proof = (house.live.version_id, probe(1.0))  # as after its publish by this process
    new = house.version(1.2, 1)
    with pytest.raises(PublishRejected, match=f"version {new.version_id} .*differs by -0.11.*serves on") as caught:
        publisher.publish(new.version_id, probe(1.2, 1.0))
    assert caught.value.decision.judged
    assert caught.value.probes["main"].verdict == "new"
    assert house.states == ["draining", "swapping", "evaluating", "settling", "rejected"]
    assert house.serving() == [(1.0, str(house.live.version_id))]
    assert (house.last.state, house.live_version()) == ("rejected", house.live.version_id)
    assert house.last.probe is not None and house.last.probe["put_back"]["verdict"] == "new"
    assert (house.last.probe["result"]["verdict"], house.last.probe["swap_s"] > 0) == ("new", True)
    assert caught.value.as_json("main")["result"] == house.last.probe["result"], "of the candidate"
    (shown,) = [list(column.cells) for column in table(describe(house.store)).columns if column.header == "probe"]
    assert shown[-1] == "new 0", "and `tracegrad versions` shows it beside the decision"
    assert version_to_serve(house.store, new).version_id == house.live.version_id
    assert rejections_in_a_row(house.store.list_publishes("main")) == 1


def test_nobody_waits_for_a_judge_that_is_not_there(house: House) -> None:
    new = house.version(1.2, 1)
    with pytest.raises(PublishRejected, match="no evaluator came: run `tracegrad gate`") as caught:
        house.publisher().publish(new.version_id, probe(1.2, 1.0))
    assert not caught.value.decision.judged
    assert house.states == ["rejected"], "nothing was drained"
    assert house.serving() == [(1.0, str(house.live.version_id))]
    assert version_to_serve(house.store, new).version_id == new.version_id, "it may be tried again"


def test_without_a_baseline_it_is_waited_for_and_one_that_cannot_be_made_ends_it(house: House) -> None:
    strange = Evaluator(evaluator_id="e", model="main", tasks_hash="other tasks", score="f1")
    house.store.beat_evaluator(strange)
    new = house.version(1.2, 1)
    with pytest.raises(PublishRejected, match=f"version {house.live.version_id} was not evaluated|was not evaluated"):
        house.publisher().publish(new.version_id, probe(1.2, 1.0))
    timer = threading.Timer(0.05, lambda: house.found(house.live.version_id, None, 0, error="no module named app"))
    timer.start()
    began = time.monotonic()
    with pytest.raises(PublishRejected, match="could not be evaluated: no module named app"):
        house.publisher(timeout_s=20.0).publish(new.version_id, probe(1.2, 1.0))
    assert time.monotonic() - began < 5
    assert house.states == ["rejected", "rejected"]


def test_a_time_out_fails_closed(house: House) -> None:
    house.store.beat_evaluator(house.evaluator)
    new = house.version(1.2, 1)
    with pytest.raises(PublishRejected, match=r"was not evaluated within 0\.3 s"):
        house.publisher().publish(new.version_id, probe(1.2, 1.0))
    assert house.states[-3:] == ["evaluating", "settling", "rejected"]
    assert house.serving() == [(1.0, str(house.live.version_id))]


def test_an_evaluation_that_failed_is_no_judgement(house: House) -> None:
    new = house.version(1.2, 1)
    with pytest.raises(PublishRejected, match="the proxy stayed away") as caught:
        house.publisher(house.judges(0, error="the proxy stayed away")).publish(new.version_id, probe(1.2, 1.0))
    assert not caught.value.decision.judged


def test_an_engine_that_restarted_meanwhile_was_not_judged(house: House) -> None:
    judges = house.judges(0.9)

    def restarts(state: str) -> None:
        judges(state)
        if state == "evaluating":
            house.engines[0].weight, house.engines[0].version = 1.0, str(house.live.version_id)

    new = house.version(1.2, 1)
    with pytest.raises(PublishRejected, match="came to serve something else"):
        house.publisher(restarts).publish(new.version_id, probe(1.2, 1.0))
    assert house.serving() == [(1.0, str(house.live.version_id))]


def test_what_was_live_before_is_not_judged_again(house: House) -> None:
    second = house.version(1.2, 1)
    house.publisher(house.judges(0.9)).publish(second.version_id, probe(1.2, 1.0))
    house.states.clear()
    house.publisher().publish(house.live.version_id, probe(1.0, 1.2))
    assert house.states == ["draining", "swapping", "live"]


def test_replicas_follow_what_passed_and_the_first_one_goes_back_from_what_did_not(
    make_house: Callable[[int], House],
) -> None:
    house = make_house(3)
    seen: list[list[tuple[float, str]]] = []
    judges = house.judges(0.9)

    def watch(state: str) -> None:
        judges(state)
        if state == "evaluating":
            seen.append(house.serving())

    live, new = house.live, house.version(1.2, 1)
    house.publisher(watch, share=0.4).publish(new.version_id, probe(1.2, 1.0))
    two = (1.2, str(new.version_id))
    assert seen == [[(1.0, str(live.version_id)), two, two]], "2 of 3 engines carry a share of 0.4"
    assert house.states == ["draining", "swapping", "evaluating", "settling", "live"]
    assert house.serving() == [two] * 3
    third = house.version(1.4, 2)
    with pytest.raises(PublishRejected):
        house.publisher(house.judges(0.1)).publish(third.version_id, probe(1.4, 1.2))
    assert house.serving() == [two] * 3
    assert [engine.loaded[-1] for engine in house.engines] == ["w1.2"] * 3
    assert [engine.loaded.count("w1.4") for engine in house.engines] == [0, 0, 1]


def test_a_replica_that_cannot_follow_brings_all_of_them_back(make_house: Callable[[int], House]) -> None:
    house = make_house(2)
    judges = house.judges(0.9)

    def breaks(state: str) -> None:
        judges(state)
        if state == "settling":
            house.engines[0].fail_reloads = 1

    new = house.version(1.2, 1)
    with pytest.raises(PublishFailed, match="out of memory"):
        house.publisher(breaks).publish(new.version_id, probe(1.2, 1.0))
    assert house.serving() == [(1.0, str(house.live.version_id))] * 2
    assert (house.last.state, house.live_version()) == ("failed", house.live.version_id)


@pytest.mark.parametrize(
    ("n_engines", "mean", "at"),
    [
        (n_engines, mean, at)
        for n_engines in (1, 2)
        for mean in (0.9, 0.1)
        for at in ("draining", "swapping", "evaluating", "settling")
        if (n_engines, mean, at) != (1, 0.9, "settling")  # one engine that has what passed does not settle
    ],
)
def test_a_death_at_each_state_leaves_the_last_good_version_after_the_next_start(
    make_house: Callable[[int], House], at: PublishState, mean: float, n_engines: int
) -> None:
    """No second publish before; a proxy that is alive is drained again where it was let through."""
    house = make_house(n_engines)
    judges, dies = house.judges(mean), dies_at(at)

    def meets(state: str) -> None:
        judges(state)
        dies(state)

    new = house.version(1.2, 1)
    with pytest.raises(Died):
        house.publisher(meets).publish(new.version_id, probe(1.2, 1.0))
    assert house.last.state == at
    proxy = threading.Thread(target=acknowledge, args=(house,))
    house.store.register_proxy("p", "http://p")
    proxy.start()
    ended = house.publisher().recover()
    house.store.remove_proxy("p")
    proxy.join()
    assert ended is not None
    judged_against = at == "settling" and mean < 0.5
    assert ended.state == ("rejected" if judged_against else "failed")
    assert house.serving() == [(1.0, str(house.live.version_id))] * n_engines
    assert house.live_version() == house.live.version_id
    probed = at in ("evaluating", "settling")
    assert probed == (ended.probe is not None), "what the probe saw of a candidate outlives its publisher"
    if judged_against:
        assert version_to_serve(house.store, new).version_id == house.live.version_id
    else:
        house.publisher(house.judges(0.9)).publish(new.version_id, probe(1.2, 1.0))
        assert house.serving() == [(1.2, str(new.version_id))] * n_engines


def acknowledge(house: House) -> None:
    """A proxy with nothing in flight."""
    for _ in range(500):
        last = house.last
        if last.state == "settling":
            assert house.serving()[-1][0] == 1.2, "weights changed before the proxy stood still"
            house.store.ack_publish(last.publish_id, "p", "settling")
            return
        if last.state in ("failed", "rejected"):
            return
        time.sleep(0.01)


def test_a_stop_while_judges_are_waited_for_puts_the_live_weights_back(house: House) -> None:
    def stops(state: str) -> None:
        if state == "evaluating":
            raise_soon.start()

    publisher = house.publisher(stops, timeout_s=30.0)
    house.store.beat_evaluator(house.evaluator)
    asked = threading.Event()
    raise_soon = threading.Timer(0.05, asked.set)
    assert publisher.gate is not None
    publisher.gate._stopped = asked.is_set
    new = house.version(1.2, 1)
    with pytest.raises(PublishRejected, match="was told to stop"):
        publisher.publish(new.version_id, probe(1.2, 1.0))
    assert house.serving() == [(1.0, str(house.live.version_id))]


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt])
def test_a_trainer_that_is_told_to_leave_puts_the_live_weights_back_first(
    house: House, how: type[BaseException]
) -> None:
    def leaves(state: str) -> None:
        if state == "evaluating":
            raise how

    house.store.beat_evaluator(house.evaluator)
    new = house.version(1.2, 1)
    with pytest.raises(how):
        house.publisher(leaves).publish(new.version_id, probe(1.2, 1.0))
    assert (house.last.state, house.last.decision["judged"]) == ("rejected", False)  # type: ignore[index]
    assert house.serving() == [(1.0, str(house.live.version_id))]


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["draining", "swapping", "settling"])
def test_who_leaves_on_the_way_through_the_gate_puts_the_live_weights_back(
    make_house: Callable[[int], House], at: str, how: type[BaseException]
) -> None:
    """Also while what passed goes on to the other engines."""
    house = make_house(2)
    judges = house.judges(0.9)

    def leaves(state: str) -> None:
        judges(state)
        if state == at:
            raise how

    house.store.beat_evaluator(house.evaluator)
    new = house.version(1.2, 1)
    with pytest.raises(how):
        house.publisher(leaves).publish(new.version_id, probe(1.2, 1.0))
    assert (house.last.state, house.last.error) == ("failed", "its publisher was told to stop")
    assert house.serving() == [(1.0, str(house.live.version_id))] * 2


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("mean", [None, 0.1])
def test_who_leaves_while_the_gate_rejects_puts_the_live_weights_back(
    make_house: Callable[[int], House], mean: float | None, how: type[BaseException]
) -> None:
    """After a judgement, or after a first Ctrl-C (`mean` None): proxies stand still for it already."""
    house = make_house(2)
    judges = house.judges(0.1 if mean is None else mean)
    publisher = house.publisher(rule=GateRule(minimum=0.5))

    def leaves(state: str) -> None:
        if mean is None and state == "evaluating":
            assert publisher.gate is not None
            publisher.gate._stopped = lambda: True
        else:
            judges(state)
        if state == "settling":
            raise how

    publisher.on_state = leaves
    house.store.beat_evaluator(house.evaluator)
    with pytest.raises(how):
        publisher.publish(house.version(1.2, 1).version_id, probe(1.2, 1.0))
    assert house.last.state == "rejected" and house.last.decision is not None
    assert house.last.decision["judged"] == (mean is not None)
    assert house.serving() == [(1.0, str(house.live.version_id))] * 2


def test_who_leaves_before_a_judge_came_leaves_nothing_unfinished(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gate_module.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        house.publisher().publish(house.version(1.2, 1).version_id, probe(1.2, 1.0))
    monkeypatch.undo()
    assert (house.last.state, house.states) == ("rejected", [])


def test_a_minimum_alone_needs_no_baseline(house: House) -> None:
    """A live version that cannot be evaluated does not keep a better one from serving."""
    other = Evaluator(evaluator_id="e", model="main", tasks_hash="other tasks", score="f1")
    judges = house.judges(0.9)
    house.store.beat_evaluator(other)
    publisher = house.publisher(judges, rule=GateRule(minimum=0.8))
    new = house.version(1.2, 1)
    assert publisher.publish(new.version_id, probe(1.2, 1.0)).decision.passed  # type: ignore[union-attr]


def test_a_pin_is_kept_by_the_publisher_and_by_recovery(house: House) -> None:
    second = house.version(1.2, 1)
    house.publisher(house.judges(0.9)).publish(second.version_id, probe(1.2, 1.0))
    house.store.pin_version(house.live.version_id, "by hand")
    with pytest.raises(Pinned):
        house.publisher().publish(second.version_id, probe(1.2, 1.0))
    assert version_to_serve(house.store, second).version_id == house.live.version_id
    assert house.publisher().recover() is None
    assert house.serving() == [(1.0, str(house.live.version_id))], "a pin that nobody came to publish"
