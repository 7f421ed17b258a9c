"""Candidates of two models behind one gate: all live or none, at whatever moment somebody dies. Engines on the wire."""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from deaths import Died, dies_at
from fake_engine import FakeEngine, save_weight
from versions import add_version
from weight_probes import probe

from tracegrad.tracestore.config import GateConfig, GateRule, PublishConfig
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.gating import evaluator_of
from tracegrad.tracestore.records import PolicyVersion, PublishState
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.gating import evaluation
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineRefused, PublishFailed, PublishRejected
from tracegrad.trainer.gate import Gatekeeper
from tracegrad.trainer.gated import Passage
from tracegrad.trainer.publish import Publisher

MODELS = ("planner", "writer")
OLD, NEW = 1.0, 1.2


class House:
    """Two models with live versions of weight 1.0 that were evaluated together, and an evaluator to be played."""

    def __init__(self, folder: Path, store: Store, stack: ExitStack, n_engines: int) -> None:
        self.folder, self.store = folder, store
        self.seen: list[tuple[str, ...]] = []
        engine = FakeEngine
        self.engines = {
            name: [stack.enter_context(engine(self.checkpoint(OLD), name)) for _ in range(n_engines)] for name in MODELS
        }
        self.live = {name: self.version(name, OLD) for name in MODELS}
        for name, publisher in self.publishers().items():
            publisher.publish(self.live[name].version_id, probe(OLD))
        self.found({name: version.version_id for name, version in self.live.items()}, None, 0.5)
        self.new = {name: self.version(name, NEW, 1) for name in MODELS}
        self.seen.clear()

    def checkpoint(self, weight: float) -> Path:
        return save_weight(self.folder / f"w{weight}", weight)

    def version(self, model: str, weight: float, step: int = 0) -> PolicyVersion:
        return add_version(self.store, self.checkpoint(weight), step, model=model, kind="step")

    def publishers(self, on_state: Callable[[str], None] | None = None, **changed: float) -> dict[str, Publisher]:
        rule = GateRule(max_drop=0.1, confidence=0.5)
        gate = GateConfig(app="a:g", tasks="t", reward="r:f", rule=rule, **{"timeout_s": 0.3, **changed})  # type: ignore[arg-type]
        settings = PublishConfig(probe_tokens=100, drain_timeout_s=0.4, swap_timeout_s=0.6, gate=gate)

        def told(state: str) -> None:
            self.seen.append(self.states())
            if on_state is not None:
                on_state(state)

        return {
            name: Publisher(
                self.store,
                name,
                [EngineClient(engine.url, name, timeout_s=5) for engine in engines],
                settings,
                on_state=told,
                judged=MODELS,
            )
            for name, engines in self.engines.items()
        }

    def publish(self, on_state: Callable[[str], None] | None = None, **changed: float) -> None:
        publishers = self.publishers(on_state, **changed)
        found = [publishers[name].candidate(self.new[name].version_id, probe(NEW, OLD)) for name in MODELS]
        candidates = [each for each in found if each is not None]
        assert len(candidates) == 2
        gate = publishers["planner"].gate
        assert gate is not None
        Passage(gate, candidates).run()

    def found(self, versions: Mapping[str, int], publish_id: int | None, mean: float) -> None:
        said = {"publish_id": publish_id, "run_ids": ("a",), "n_failed": 0, "values": {"one": mean}}
        evaluation(self.store, versions["planner"], versions=versions, **said)

    def judges(self, mean: float, then: Callable[[str], None] = lambda _state: None) -> Callable[[str], None]:
        """An evaluator that finds this of the candidates, once they are there to be evaluated; `then` comes after."""
        evaluator = Evaluator(evaluator_id="e", model=evaluator_of(MODELS), tasks_hash="t", score="f1")
        self.store.beat_evaluator(evaluator)

        def on_state(state: str) -> None:
            if state == "evaluating":
                first = self.store.publish_view(MODELS)["planner"].together[0]
                self.found({name: version.version_id for name, version in self.new.items()}, first, mean)
            then(state)

        return on_state

    def states(self) -> tuple[str, ...]:
        return tuple(str(view.state) for view in self.store.publish_view(MODELS).values())

    def lives(self) -> dict[str, int | None]:
        return {name: view.live_version for name, view in self.store.publish_view(MODELS).items()}

    def serves(self, versions: Mapping[str, PolicyVersion]) -> bool:
        """Whether the store and every engine say so, of all models."""
        weight = NEW if versions is self.new else OLD
        told = {(e.weight, e.version) for name in MODELS for e in self.engines[name]}
        wanted = {(weight, str(version.version_id)) for version in versions.values()}
        return told == wanted and self.lives() == {name: version.version_id for name, version in versions.items()}


def test_what_passes_goes_live_for_all_at_once(house: House) -> None:
    """And says why in the words of the whole; the next comparison is with what was found of both."""
    house.publish(house.judges(0.45))
    assert house.serves(house.new)
    assert house.seen == [
        ("draining", "requested"),
        ("swapping", "requested"),
        ("swapping", "draining"),
        ("swapping", "swapping"),
        ("evaluating", "evaluating"),
        ("live", "live"),
    ], "nobody is dispatched to a candidate before all are there"
    for name in MODELS:
        publish = house.store.last_publish(name)
        assert publish is not None and publish.decision is not None and publish.probe is not None
        assert publish.decision["why"].endswith("(judged together: planner 3, writer 4)")
        assert publish.decision["difference"] == pytest.approx(-0.05)
        assert publish.probe["result"]["verdict"] == "new"
    live = {name: version.version_id for name, version in house.new.items()}
    assert house.store.find_baseline(live, "t", "f1") is not None


def test_what_is_rejected_leaves_none_of_them(house: House) -> None:
    with pytest.raises(PublishRejected, match=r"versions 3 \(step 1\), 4 \(step 1\) were rejected .*; 1, 2 serve on"):
        house.publish(house.judges(0.1))
    assert house.serves(house.live)
    assert house.states() == ("rejected", "rejected")


@pytest.mark.parametrize("which", MODELS)
def test_one_that_cannot_be_swapped_is_the_end_of_all(house: House, which: str) -> None:
    """The first of them is in its engine when the second one fails."""
    house.engines[which][0].fail_reloads = 1
    with pytest.raises(PublishFailed, match="out of memory"):
        house.publish(house.judges(0.9))
    assert house.serves(house.live)
    assert house.states() == ("failed", "failed")
    other = house.store.last_publish(MODELS[which == "planner"])
    assert other is not None and "published together with others" in str(other.error)
    house.publish(house.judges(0.9))
    assert house.serves(house.new)


def test_what_is_copied_is_copied_before_anybody_waits(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both of them; where the second cannot be, nobody has waited."""
    staged: list[tuple[str, ...]] = []

    def stage(self: EngineClient, _path: str) -> None:
        staged.append((self.name, *house.states()))
        if len(staged) == 4:
            raise EngineRefused("no room")

    monkeypatch.setattr(EngineClient, "stage", stage)
    house.publish(house.judges(0.9))
    assert staged == [("planner", "requested", "requested"), ("writer", "requested", "requested")]
    house.live, house.new = house.new, {name: house.version(name, 1.4, 2) for name in MODELS}
    house.seen.clear()
    with pytest.raises(PublishFailed, match="nothing was swapped: no room"):
        house.publish(house.judges(0.9))
    assert (house.seen, house.states()) == ([("requested", "failed")], ("failed", "failed"))


def test_one_that_is_not_what_was_trained_is_the_end_of_all(house: House) -> None:
    house.engines["writer"][0].ignore_reload = True
    with pytest.raises(PublishFailed, match="does not serve version 4: stale"):
        house.publish(house.judges(0.9))
    assert house.lives() == {name: version.version_id for name, version in house.live.items()}
    assert house.engines["planner"][0].weight == OLD
    assert "evaluating" not in {state for states in house.seen for state in states}


def test_what_another_version_of_one_of_them_was_judged_beside_is_no_judgement(house: House) -> None:
    """An evaluator of one model alone, or one that saw what serves no more."""
    house.store.beat_evaluator(Evaluator(evaluator_id="e", model="planner", tasks_hash="t", score="f1"))
    with pytest.raises(PublishRejected, match="no evaluator came"):
        house.publish()

    def strange(state: str) -> None:
        if state == "evaluating":
            first = house.store.publish_view(MODELS)["planner"].together[0]
            versions = {"planner": house.new["planner"].version_id, "writer": house.live["writer"].version_id}
            house.found(versions, first, 0.9)

    house.judges(0.9)
    with pytest.raises(PublishRejected, match="is of version 3, 2, not of 3, 4"):
        house.publish(strange)
    assert house.serves(house.live)


DEATHS: list[tuple[int, float, PublishState, int]] = [
    (n_engines, mean, at, which)
    for n_engines in (1, 2)
    for mean in (0.9, 0.1)
    for at, which in (("draining", 1), ("swapping", 0), ("swapping", 1), ("evaluating", 0), ("settling", 0))
    if (n_engines, mean, at) != (1, 0.9, "settling")  # one engine that has what passed does not settle
]


@pytest.mark.parametrize(("n_engines", "mean", "at", "which"), DEATHS)
def test_a_death_leaves_the_last_good_versions_of_all_after_the_next_start(
    make_house: Callable[[int], House], at: PublishState, which: int, mean: float, n_engines: int
) -> None:
    """The `which`-th of them entered the state. While it is recovered no proxy may reach a candidate and a live one."""
    house = make_house(n_engines)
    with pytest.raises(Died):
        house.publish(house.judges(mean, dies_at(at, which)), share=0.5 if n_engines > 1 else 0.0)
    mixtures: list[tuple[str, ...]] = []
    over = threading.Event()

    def watch() -> None:
        """Read what proxies read."""
        while not over.is_set():
            states = house.states()
            if "evaluating" in states and set(states) != {"evaluating"}:
                mixtures.append(states)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for publisher in house.publishers().values():
            publisher.recover()
    finally:
        over.set()
        watcher.join()
    assert mixtures == []
    assert house.serves(house.live)
    judged_against = at == "settling" and mean < 0.5
    assert set(house.states()) == {"rejected" if judged_against else "failed"}
    if not judged_against:
        house.publish(house.judges(0.9))
        assert house.serves(house.new)


@pytest.mark.parametrize("which", [0, 1])
def test_a_death_between_two_swaps_or_two_ways_back_is_recovered_too(
    house: House, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one model are in, those of the other are not; then the recovery dies in the same place."""
    swaps = []

    def load(self: EngineClient, *args: object, **rest: object) -> str:
        if len(swaps) == which:
            raise Died
        swaps.append(self.name)
        return real(self, *args, **rest)  # type: ignore[arg-type]

    real = EngineClient.swap
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(EngineClient, "swap", load)
        house.publish(house.judges(0.9))
    swaps.clear()
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(EngineClient, "swap", load)
        for publisher in house.publishers().values():
            publisher.recover()
    for publisher in house.publishers().values():
        publisher.recover()
    assert house.serves(house.live)
    assert house.states() == ("failed", "failed")


@pytest.mark.parametrize(("asleep", "judged"), [("requested", True), ("requested", False), ("draining", True)])
def test_a_publisher_that_slept_too_long_swaps_none_of_them(
    house: House, monkeypatch: pytest.MonkeyPatch, asleep: str, judged: bool
) -> None:
    """Nor does it where the evaluator was asleep, too, so that the candidates were to be rejected."""

    def sleeps(*_: object) -> None:
        last = house.store.last_publish("planner")
        assert last is not None and len(house.store.end_unswapped(last.publish_id)) == 2

    def entered(state: str) -> None:
        if state == asleep:
            sleeps()

    on_state = house.judges(0.9, entered) if judged else entered
    if asleep == "requested":
        real = Gatekeeper.refuses
        monkeypatch.setattr(Gatekeeper, "refuses", lambda gate, live: (sleeps(), real(gate, live))[1])
    for engine in (engine for engines in house.engines.values() for engine in engines):
        engine.events.clear()
    with pytest.raises(PublishFailed, match=f"its publisher died while it was {asleep}; nothing"):
        house.publish(on_state)
    assert (house.serves(house.live), house.states()) == (True, ("failed", "failed"))
    assert not any(engine.events for engines in house.engines.values() for engine in engines)


def test_replicas_of_all_follow_what_passed_or_go_back_together(make_house: Callable[[int], House]) -> None:
    house = make_house(2)
    first: list[dict[str, list[float]]] = []

    def breaks(state: str) -> None:
        if state == "evaluating":
            first.append({name: [engine.weight for engine in house.engines[name]] for name in MODELS})
        if state == "settling" and len(first) == 1:
            house.engines["writer"][0].fail_reloads = 1

    with pytest.raises(PublishFailed, match="out of memory"):
        house.publish(house.judges(0.9, breaks), share=0.5)
    assert first == [{name: [OLD, NEW] for name in MODELS}]
    assert house.serves(house.live), "the planner's had followed"
    assert house.states() == ("failed", "failed")
    house.publish(house.judges(0.9, breaks), share=0.5)
    assert house.serves(house.new)


def test_a_rollback_beside_a_judgement_is_not_what_was_judged(house: House) -> None:
    """A version of one model is judged beside what is live of the other, and that is no longer live."""

    def rolls_back(state: str) -> None:
        if state != "evaluating":
            return
        other = house.version("writer", OLD, 2)
        publish = house.store.request_publish(other.version_id)
        way: list[PublishState] = ["draining", "swapping", "live"]
        for step in way:
            house.store.advance_publish(publish.publish_id, step)

    publishers = house.publishers(house.judges(0.9, rolls_back))
    house.new["writer"] = house.live["writer"]
    with pytest.raises(PublishRejected, match="another version of one of the other models went live"):
        publishers["planner"].publish(house.new["planner"].version_id, probe(NEW, OLD))
    assert house.engines["planner"][0].weight == OLD
