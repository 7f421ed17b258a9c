"""Candidates of two adapters on one engine, judged beside what serves: all live or none, and nothing left loaded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from deaths import Died, dies_at
from fake_engine import FakeEngine, save_weight
from versions import add_version
from weight_probes import probe

from tracegrad.tracestore.config import EngineConfig, GateConfig, GateRule, ModelConfig, PublishConfig
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.gating import evaluator_of
from tracegrad.tracestore.publishes import REHEARSED
from tracegrad.tracestore.records import PolicyVersion, Publish, PublishState
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.gating import evaluation
from tracegrad.trainer import gate as gate_module
from tracegrad.trainer.adapter_client import AdapterClient
from tracegrad.trainer.engine_errors import EngineNotReady, PublishFailed, PublishRejected
from tracegrad.trainer.gated import Passage
from tracegrad.trainer.preflight import check
from tracegrad.trainer.publish import Perturbed, Publisher

MODELS = ("planner", "writer")
OLD, NEW = 1.0, 1.2


class House:
    """Two adapters on one base, live at weight 1.0 and evaluated together, and an evaluator to be played."""

    def __init__(self, folder: Path, store: Store, stack: ExitStack) -> None:
        self.folder, self.store = folder, store
        self.seen: list[tuple[tuple[str, ...], dict[str, str]]] = []
        self.engine = stack.enter_context(FakeEngine(save_weight(folder / "base", OLD), "base"))
        self.engine.busy = True  # calls to other models of the engine never end
        self.live = {name: self.version(name, OLD, 0) for name in MODELS}
        for name, publisher in self.publishers().items():
            publisher.publish(self.live[name].version_id, probe(OLD))
        self.found({name: version.version_id for name, version in self.live.items()}, None, 0.5)
        self.new = {name: self.version(name, NEW, 1) for name in MODELS}
        self.seen.clear()
        self.engine.loaded.clear()

    def version(self, model: str, weight: float, step: int) -> PolicyVersion:
        folder = save_weight(self.folder / f"{model}-{step}", weight)
        return add_version(self.store, folder, step, model=model, kind="step")

    def publishers(self, on_state: Callable[[str], None] = lambda _state: None) -> dict[str, Publisher]:
        rule = GateRule(max_drop=0.1, confidence=0.5)
        gate = GateConfig(app="a:g", tasks="t", reward="r:f", rule=rule, timeout_s=0.3, share=0.5)
        settings = PublishConfig(probe_tokens=100, drain_timeout_s=0.4, swap_timeout_s=0.6, gate=gate)

        def told(state: str) -> None:
            self.seen.append((self.states(), dict(self.engine.adapters)))
            on_state(state)

        def made(name: str) -> Publisher:
            clients = [AdapterClient(self.engine.url, name, "base", timeout_s=5)]
            return Publisher(self.store, name, clients, settings, on_state=told, judged=MODELS)

        return {name: made(name) for name in MODELS}

    def publish(self, mean: float, then: Callable[[str], None] = lambda _s: None, *, weight: float = NEW) -> None:
        """Let both be judged by an evaluator that finds `mean` of them; `then` comes after each state."""
        self.store.beat_evaluator(Evaluator(evaluator_id="e", model=evaluator_of(MODELS), tasks_hash="t", score="f1"))

        def on_state(state: str) -> None:
            if state == "evaluating":
                first = self.store.publish_view(MODELS)["planner"].together[0]
                self.found({name: version.version_id for name, version in self.new.items()}, first, mean)
            then(state)

        publishers = self.publishers(on_state)
        for name, publisher in publishers.items():
            publisher._proof = (self.live[name].version_id, probe(OLD))  # as after its publish by this process
        found = [publishers[name].candidate(self.new[name].version_id, probe(weight, OLD)) for name in MODELS]
        gate = publishers["planner"].gate
        assert gate is not None
        Passage(gate, [each for each in found if each is not None]).run()

    def found(self, versions: Mapping[str, int], publish_id: int | None, mean: float) -> None:
        said = {"publish_id": publish_id, "run_ids": ("a",), "n_failed": 0, "values": {"one": mean}}
        evaluation(self.store, versions["planner"], versions=versions, **said)

    def states(self) -> tuple[str, ...]:
        return tuple(str(view.state) for view in self.store.publish_view(MODELS).values())

    def served(self, versions: Mapping[str, PolicyVersion], *, beside: bool = False) -> dict[str, str]:
        """What the engine lists where it serves these; `beside`: under the names of what is next."""
        return {name + REHEARSED * beside: version.checkpoint_path for name, version in versions.items()}

    def serves(self, versions: Mapping[str, PolicyVersion]) -> bool:
        """Whether the store says so, and the engine, which has nothing else loaded."""
        lives = {name: view.live_version for name, view in self.store.publish_view(MODELS).items()}
        told = lives == {name: version.version_id for name, version in versions.items()}
        return told and self.engine.adapters == self.served(versions)


@pytest.fixture
def house(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(gate_module, "POLL_S", 0.01)
    with ExitStack() as stack:
        yield House(tmp_path, store, stack)


def test_what_passes_was_served_beside_what_was_live_and_takes_its_name(house: House) -> None:
    """It is loaded and proven before anybody drains; the switch of the name waits for proxies."""
    house.publish(0.45)
    both = house.served(house.live) | house.served(house.new, beside=True)
    assert house.seen[:5] == [
        (("draining", "requested"), both),
        (("swapping", "requested"), both),
        (("swapping", "draining"), both),
        (("swapping", "swapping"), both),
        (("evaluating", "evaluating"), both),
    ]
    assert [states for states, _ in house.seen[5:]] == [("settling", "settling"), ("live", "live")]
    assert house.serves(house.new)
    for name in MODELS:
        publish = house.store.last_publish(name)
        assert publish is not None and publish.gate is not None and publish.probe is not None
        assert (publish.gate["beside"], publish.gate["engines"]) == (True, [house.engine.url])
        assert publish.probe["result"]["verdict"] == "new"


def test_what_is_rejected_is_unloaded_and_what_serves_was_never_touched(house: House) -> None:
    with pytest.raises(PublishRejected, match="1, 2 serve on") as caught:
        house.publish(0.1)
    assert house.serves(house.live)
    assert house.states() == ("rejected", "rejected")
    assert house.engine.loaded == [version.checkpoint_path for version in house.new.values()]
    assert {seen.verdict for seen in caught.value.probes.values()} == {"new"}, "what serves is proven all the same"


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_is_not_what_was_trained_is_the_end_of_both_before_anybody_waits(house: House, which: int) -> None:
    folder = Path(house.new[MODELS[which]].checkpoint_path)
    save_weight(folder, 2.5)
    with pytest.raises(PublishFailed, match="nothing was swapped: the engine does not serve"):
        house.publish(0.9)
    assert "draining" not in {state for states, _ in house.seen for state in states}
    assert (house.serves(house.live), house.states()) == (True, ("failed", "failed"))
    save_weight(folder, NEW)
    house.publish(0.9)
    assert house.serves(house.new)


def test_a_proxy_that_does_not_drain_leaves_nothing_loaded(house: House) -> None:
    house.store.register_proxy("p", "http://p")
    with pytest.raises(PublishFailed, match="p did not drain"):
        house.publish(0.9)
    assert (house.serves(house.live), house.states()) == (True, ("failed", "failed"))


def test_a_switch_that_fails_after_the_judgement_brings_both_back(house: House) -> None:
    def breaks(state: str) -> None:
        house.engine.fail_reloads = state == "settling"

    with pytest.raises(PublishFailed, match="out of memory"):
        house.publish(0.9, breaks)
    assert (house.serves(house.live), house.states()) == (True, ("failed", "failed"))


@pytest.mark.parametrize("which", [0, 1])
def test_candidates_whose_publisher_slept_too_long_are_unloaded(house: House, which: int) -> None:
    """The first of them may be `swapping` by then: it is put back by the publisher, which knows that nothing was."""
    asleep: list[Publish] = []

    def sleeps(state: str) -> None:
        if state == "draining" and house.states()[which] == state:
            last = house.store.last_publish(MODELS[which])
            assert last is not None
            asleep.extend(house.store.end_unswapped(last.publish_id))

    with pytest.raises(PublishFailed, match="its publisher died while it was draining; nothing was swapped"):
        house.publish(0.9, sleeps)
    assert [each.model for each in asleep] == list(MODELS[which:])
    assert (house.serves(house.live), house.states()) == (True, ("failed", "failed"))
    assert house.engine.loaded == [version.checkpoint_path for version in house.new.values()], "beside, and no more"
    house.publish(0.9)
    assert house.serves(house.new)


def test_what_a_killed_publisher_left_beside_is_unloaded_though_its_publish_has_ended(house: House) -> None:
    with pytest.raises(Died):
        house.publish(0.9, dies_at("draining", 0))
    last = house.store.last_publish("planner")
    assert last is not None and len(house.store.end_unswapped(last.publish_id)) == 2, "as a proxy does"
    assert not house.serves(house.live)
    assert [publisher.recover() for publisher in house.publishers().values()] == [None, None]
    assert house.serves(house.live)


def test_an_engine_that_restarted_meanwhile_was_not_judged(house: House) -> None:
    """It comes back with what is live alone, as `tracegrad engine` starts it."""

    def restarts(state: str) -> None:
        if state == "evaluating":
            house.engine.adapters = house.served(house.live)

    with pytest.raises(PublishRejected, match="came to serve something else") as caught:
        house.publish(0.9, restarts)
    assert not caught.value.decision.judged
    assert (house.serves(house.live), house.states()) == (True, ("rejected", "rejected"))


def test_a_canary_goes_through_the_same_name(house: House, tmp_path: Path) -> None:
    """At a start, where the path is proven by weights that are visibly others."""
    publisher = house.publishers()["planner"]
    candidate = publisher.candidate(
        house.new["planner"].version_id,
        probe(NEW, OLD),
        Perturbed(
            checkpoint_path=str(save_weight(tmp_path / "canary", 3.0)),
            checkpoint_hash="canary",
            logprobs=probe(3.0).new_logprobs,
        ),
    )
    assert candidate is not None and publisher.gate is not None
    house.store.beat_evaluator(Evaluator(evaluator_id="e", model=evaluator_of(MODELS), tasks_hash="t", score="f1"))
    with pytest.raises(PublishRejected, match="was not evaluated within"):
        Passage(publisher.gate, [candidate]).run()
    assert house.engine.loaded == [str(tmp_path / "canary"), house.new["planner"].checkpoint_path]
    assert house.serves(house.live)


DEATHS: list[tuple[float, PublishState, int]] = [
    (mean, at, which)
    for mean in (0.9, 0.1)
    for at, which in (("draining", 0), ("draining", 1), ("swapping", 1), ("evaluating", 0), ("settling", 0))
]


@pytest.mark.parametrize(("mean", "at", "which"), DEATHS)
def test_a_death_leaves_what_was_live_and_nothing_beside_it(
    house: House, at: PublishState, which: int, mean: float
) -> None:
    with pytest.raises(Died):
        house.publish(mean, dies_at(at, which))
    assert house.engine.adapters == house.served(house.live) | house.served(house.new, beside=True)
    for publisher in house.publishers().values():
        publisher.recover()
    assert house.serves(house.live)
    judged_against = at == "settling" and mean < 0.5
    assert set(house.states()) == {"rejected" if judged_against else "failed"}
    if not judged_against:
        house.publish(0.9)
        assert house.serves(house.new)


def test_an_engine_without_room_for_both_is_refused_with_the_option_that_says_it(house: House) -> None:
    model = ModelConfig(checkpoint=str(house.folder / "base"), engine=EngineConfig(max_model_len=64))
    client = AdapterClient(house.engine.url, "planner", "base", timeout_s=5)
    house.engine.max_loras = 3
    with pytest.raises(EngineNotReady, match=r"3 adapters at once, and 4 are to be.*--max-loras 4"):
        check(client, model, slots=4)
    house.engine.max_loras = 4
    check(client, model, slots=4)
