"""The publisher against a real store and an engine that speaks the wire: what is live is what is served, always."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fake_engine import FakeEngine, save_weight
from versions import add_version
from weight_probes import probe

from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishFailed
from tracegrad.trainer.errors import EngineError
from tracegrad.trainer.publish import Perturbed, Publisher, canary

SETTINGS = PublishConfig(probe_tokens=100, drain_timeout_s=0.4, swap_timeout_s=0.6)


class House:
    """A store, an engine that serves weight 1.0 as the initial version, and checkpoints of weights by number."""

    def __init__(self, tmp_path: Path, store: Store) -> None:
        self.tmp_path, self.store = tmp_path, store
        self.engine = FakeEngine(self.checkpoint(1.0))
        self.states: list[str] = []

    def checkpoint(self, weight: float) -> Path:
        return save_weight(self.tmp_path / f"w{weight}", weight, tied=True)

    def version(self, weight: float) -> PolicyVersion:
        return add_version(self.store, self.checkpoint(weight), model="main", kind="step")

    def publisher(self, settings: PublishConfig = SETTINGS, **options: float) -> Publisher:
        client = EngineClient(self.engine.url, "main", timeout_s=5)
        return Publisher(self.store, "main", [client], settings, on_state=self.states.append, **options)

    def state(self) -> tuple[str, int | None]:
        """(state of the newest publish, live version)."""
        last, live = self.store.last_publish("main"), self.store.live_version("main")
        assert last is not None
        return last.state, live and live.version_id


@pytest.fixture
def house(tmp_path: Path, store: Store) -> Iterator[House]:
    house = House(tmp_path, store)
    with house.engine:
        yield house


def test_a_version_goes_live_through_every_state(house: House) -> None:
    first, second = house.version(1.0), house.version(1.2)
    publisher = house.publisher()
    publisher.publish(first.version_id, probe(1.0, None))
    report = publisher.publish(second.version_id, probe(1.2, 1.0))
    assert report.probe is not None
    assert report.probe.verdict == "new"
    assert report.probe.mean_abs_new < 1e-9
    assert report.probe.n_tokens == 6 * 35
    assert house.states == ["draining", "swapping", "live"] * 2
    assert house.state() == ("live", second.version_id)
    assert house.engine.version == str(second.version_id)
    assert house.engine.weight == 1.2
    last = house.store.last_publish("main")
    assert last is not None
    assert last.probe is not None
    assert last.probe["result"]["verdict"] == "new"
    assert 0 < last.probe["swap_s"] <= last.probe["total_s"]
    swap = [e for e in house.engine.events if e in ("collective_rpc", "reset_prefix_cache", "update_weight_version")]
    # the first reset proves that nothing runs any more, the second forgets what the old weights computed
    assert swap == ["reset_prefix_cache", "collective_rpc", "reset_prefix_cache", "update_weight_version"] * 2


LEAVES = pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt])


@LEAVES
@pytest.mark.parametrize("at", ["draining", "swapping", "probed"])
def test_who_is_told_to_leave_lets_the_proxies_go_on_first(
    house: House, monkeypatch: pytest.MonkeyPatch, at: str, how: type[BaseException]
) -> None:
    """Whatever was swapped by then: they would hold calls for a publisher that is gone."""
    first, second = house.version(1.0), house.version(1.2)
    publisher = house.publisher()
    publisher.publish(first.version_id, probe(1.0, None))

    def leaves(*_: object, **__: object) -> None:
        raise how

    def told(state: str) -> None:
        house.states.append(state)
        if state == at:
            leaves()

    publisher.on_state = told
    if at == "probed":
        monkeypatch.setattr(publisher.fleet, "probe", leaves)
    with pytest.raises(how):
        publisher.publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("failed", first.version_id)
    last = house.store.last_publish("main")
    assert last is not None and last.error == "its publisher was told to stop"
    assert (house.engine.weight, house.engine.version) == (1.0, str(first.version_id))
    monkeypatch.undo()
    house.publisher().publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("live", second.version_id)


def test_who_leaves_an_engine_that_cannot_be_put_back_says_so_and_leaves_it_unfinished(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = house.version(1.0), house.version(1.2)
    publisher = house.publisher()
    publisher.publish(first.version_id, probe(1.0, None))

    def leaves(*_: object, **__: object) -> None:
        house.engine.fail_reloads = 99
        raise SystemExit

    monkeypatch.setattr(publisher.fleet, "probe", leaves)
    with pytest.raises(EngineError):
        publisher.publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("swapping", first.version_id), "the next start ends it"


def test_it_waits_for_every_living_proxy_and_for_no_dead_one(house: House) -> None:
    version = house.version(1.2)
    house.store.register_proxy("dead", "http://127.0.0.1:1")
    time.sleep(0.35)
    house.store.register_proxy("alive", "http://127.0.0.1:2")
    loaded_at_ack: list[list[str]] = []

    def proxy() -> None:
        while (view := house.store.publish_view(["main"])["main"]).state != "draining":
            time.sleep(0.01)
        time.sleep(0.1)
        house.store.beat_proxy("alive")
        loaded_at_ack.append(list(house.engine.loaded))
        assert view.publish_id is not None
        house.store.ack_publish(view.publish_id, "alive")

    thread = threading.Thread(target=proxy)
    thread.start()
    report = house.publisher(heartbeat_expires_s=0.3).publish(version.version_id, probe(1.2, None))
    thread.join()
    assert loaded_at_ack == [[]], "weights were swapped before the proxy had drained"
    assert 0.1 <= report.drain_s < 1.0


def test_a_proxy_that_does_not_drain_fails_the_publish_and_nothing_is_swapped(house: House) -> None:
    version = house.version(1.2)
    house.store.register_proxy("stuck", "http://127.0.0.1:2")
    with pytest.raises(PublishFailed, match=r"nothing was swapped: stuck did not drain in 0\.4 s"):
        house.publisher().publish(version.version_id, probe(1.2, None))
    assert house.state() == ("failed", None)
    assert house.engine.loaded == []


def test_a_publisher_that_waits_is_heard_of_all_the_time(house: House) -> None:
    version = house.version(1.2)
    house.store.register_proxy("slow", "http://127.0.0.1:2")
    silences: list[float] = []

    def proxy() -> None:
        while (view := house.store.publish_view(["main"])["main"]).state != "draining":
            time.sleep(0.01)
        for _ in range(20):
            time.sleep(0.05)
            house.store.beat_proxy("slow")
            silences.append(house.store.publish_view(["main"])["main"].silent_s)
        assert view.publish_id is not None
        house.store.ack_publish(view.publish_id, "slow")

    thread = threading.Thread(target=proxy)
    thread.start()
    settings = msgspec.structs.replace(SETTINGS, drain_timeout_s=20.0)
    house.publisher(settings, heartbeat_expires_s=0.5).publish(version.version_id, probe(1.2, None))
    thread.join()
    assert len(silences) == 20 and max(silences) < 0.6


@pytest.mark.parametrize("mode", ["drain", "in_flight"])
@pytest.mark.parametrize("asleep", ["requested", "draining"])
def test_a_publisher_that_was_ended_while_it_slept_leaves_the_engines_alone(
    house: House, monkeypatch: pytest.MonkeyPatch, asleep: str, mode: str
) -> None:
    first, second = house.version(1.0), house.version(1.2)
    publisher = house.publisher(msgspec.structs.replace(SETTINGS, mode=mode))
    publisher.publish(first.version_id, probe(1.0, None))

    def sleeps(*_: object) -> None:
        last = house.store.last_publish("main")
        assert last is not None and house.store.end_unswapped(last.publish_id)

    if asleep == "requested":
        monkeypatch.setattr(publisher.fleet, "stage", sleeps)
    else:
        publisher.on_state = lambda state: sleeps() if state == asleep else None
    house.engine.events.clear()
    with pytest.raises(PublishFailed, match=f"failed: its publisher died while it was {asleep}; nothing was swapped"):
        publisher.publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("failed", first.version_id)
    assert house.engine.events == []
    monkeypatch.undo()
    publisher.on_state = house.states.append
    publisher.publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("live", second.version_id)


@pytest.mark.parametrize(("fault", "verdict"), [("ignore_reload", "stale"), ("stale_head", "stale")])
def test_a_stale_engine_is_caught_and_the_old_weights_come_back(house: House, fault: str, verdict: str) -> None:
    first, second = house.version(1.0), house.version(1.4)
    publisher = house.publisher()
    publisher.publish(first.version_id, probe(1.0, None))
    setattr(house.engine, fault, True)
    with pytest.raises(PublishFailed, match=f"{verdict}.*version {first.version_id} is back") as caught:
        publisher.publish(second.version_id, probe(1.4, 1.0))
    assert caught.value.probe.verdict == verdict
    assert house.state() == ("failed", first.version_id)
    assert (house.engine.weight, house.engine.version) == (1.0, str(first.version_id))
    last = house.store.last_publish("main")
    assert last is not None
    assert last.probe is not None
    assert last.probe["result"]["verdict"] == verdict


def test_wrong_weights_are_a_mismatch(house: House) -> None:
    version = house.version(1.0)
    with pytest.raises(
        PublishFailed, match=r"mismatch.*raise trainer.publish.probe_bound.*no live version to put back"
    ):
        house.publisher().publish(version.version_id, probe(3.0, None))
    assert house.state() == ("failed", None)
    assert house.engine.version == "unverified"


def test_equal_weights_are_allowed_and_recorded_as_unresolved(house: House) -> None:
    first, second = house.version(1.0), house.version(1.0)
    publisher = house.publisher()
    publisher.publish(first.version_id, probe(1.0, None))
    report = publisher.publish(second.version_id, probe(1.0, 1.0))
    assert report.probe is not None
    assert report.probe.verdict == "unresolved"
    assert house.state() == ("live", second.version_id)


def test_an_engine_that_cannot_load_gets_the_old_weights_back(house: House) -> None:
    first, second = house.version(1.0), house.version(1.2)
    publisher = house.publisher()
    publisher.publish(first.version_id)
    house.engine.fail_reloads = 1
    with pytest.raises(PublishFailed, match=f"out of memory.*version {first.version_id} is back"):
        publisher.publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("failed", first.version_id)
    assert house.engine.loaded[-1] == "w1.0"


def test_an_engine_with_running_requests_is_not_swapped_silently(house: House) -> None:
    version = house.version(1.2)
    house.engine.busy = True
    with pytest.raises(PublishFailed, match=r"nothing was swapped.*requests are running on it"):
        house.publisher().publish(version.version_id, probe(1.2, None))
    assert house.engine.loaded == []
    assert house.state() == ("failed", None)


def test_calls_go_on_through_a_swap_and_the_probe_comes_after_it(house: House) -> None:
    """The first version is published by drain; then the engine stands still for the swap alone, with what it has."""
    publisher = house.publisher(msgspec.structs.replace(SETTINGS, mode="in_flight"))
    publisher.publish(house.version(1.0).version_id, probe(1.0, None))
    house.engine.busy = True
    house.engine.events.clear()
    second = house.version(1.2)
    began = time.monotonic()
    report = publisher.publish(second.version_id, probe(1.2, 1.0))
    took_s, last = time.monotonic() - began, house.store.last_publish("main")
    assert last is not None and report.paused_s == last.paused_s
    assert report.swap_s * 0.5 < last.paused_s <= report.swap_s + 1e-4 < took_s - report.probe_s, "not the probe"
    swap = ["pause?mode=keep", "collective_rpc", "reset_prefix_cache", "update_weight_version", "weight_info", "resume"]
    assert house.engine.events[:6] == swap and "v1/completions" in house.engine.events[6:]
    assert report.probe is not None and report.probe.verdict == "new"
    assert [each.in_flight for each in house.store.list_publishes("main")] == [False, True]
    assert house.state() == ("live", second.version_id)


@pytest.mark.parametrize(("fault", "value"), [("fail_reloads", 1), ("stale_head", True)])
def test_a_swap_in_flight_that_fails_is_undone_while_the_engine_stands_still(
    house: House, fault: str, value: object
) -> None:
    first, publisher = house.version(1.0), house.publisher(msgspec.structs.replace(SETTINGS, mode="in_flight"))
    publisher.publish(first.version_id, probe(1.0, None))
    house.engine.busy = True
    setattr(house.engine, fault, value)
    house.engine.events.clear()
    with pytest.raises(PublishFailed, match=f"version {first.version_id} is back"):
        publisher.publish(house.version(1.4).version_id, probe(1.4, 1.0))
    assert (house.engine.weight, house.engine.version) == (1.0, str(first.version_id))
    stood = [event for event in house.engine.events if event in ("pause?mode=keep", "resume")]
    resumed_once = ["pause?mode=keep", "pause?mode=keep", "resume"]  # not with weights that were not loaded
    assert stood == (resumed_once if fault == "fail_reloads" else ["pause?mode=keep", "resume"] * 2)
    assert house.engine.running.is_set()
    last = house.store.last_publish("main")
    assert last is not None and last.state == "failed" and last.probe is not None
    assert 0 < last.paused_s == last.probe["paused_s"] < last.entered["failed"] - last.entered["swapping"]


def test_an_engine_that_is_down_fails_the_publish_before_the_swap(house: House) -> None:
    version = house.version(1.2)
    house.engine.close()
    with pytest.raises(PublishFailed, match=r"nothing was swapped.*does not answer"):
        house.publisher().publish(version.version_id, probe(1.2, None))
    assert house.state() == ("failed", None)


def test_an_engine_gone_for_good_leaves_the_publish_unfinished_until_recovery(house: House) -> None:
    first, second = house.version(1.0), house.version(1.2)
    publisher = house.publisher()
    publisher.publish(first.version_id)
    port = int(house.engine.url.rpartition(":")[2])
    house.engine.die_on_reload = True
    with pytest.raises(PublishFailed, match="stays unfinished and proxies hold"):
        publisher.publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("swapping", first.version_id)
    with pytest.raises(PublishFailed, match="stays swapping"):
        house.publisher().recover()
    house.engine = FakeEngine(Path(house.store.get_version(second.version_id).checkpoint_path), port=port)
    with house.engine:
        failed = house.publisher().recover()
    assert failed is not None
    assert failed.state == "failed"
    assert (house.engine.weight, house.engine.version) == (1.0, str(first.version_id))
    assert house.state() == ("failed", first.version_id)


def test_an_engine_that_restarts_during_a_swap_is_waited_for(house: House) -> None:
    first, second = house.version(1.0), house.version(1.2)
    publisher = house.publisher()
    publisher.publish(first.version_id)
    port = int(house.engine.url.rpartition(":")[2])
    house.engine.die_on_reload = True
    revived: list[FakeEngine] = []

    def revive() -> None:
        while house.engine.alive:
            time.sleep(0.01)
        revived.append(FakeEngine(house.checkpoint(1.2), port=port).__enter__())

    thread = threading.Thread(target=revive)
    thread.start()
    with pytest.raises(PublishFailed, match=f"version {first.version_id} is back"):
        publisher.publish(second.version_id, probe(1.2, 1.0))
    thread.join()
    assert house.state() == ("failed", first.version_id)
    assert (revived[0].weight, revived[0].version) == (1.0, str(first.version_id))
    revived[0].close()


@pytest.mark.parametrize("reached", ["requested", "draining", "swapping"])
def test_what_a_dead_publisher_left_is_failed_and_the_live_weights_are_loaded(house: House, reached: str) -> None:
    first, second = house.version(1.0), house.version(1.2)
    house.publisher().publish(first.version_id)
    left = house.store.request_publish(second.version_id)
    for state in ("draining", "swapping")[: ("requested", "draining", "swapping").index(reached)]:
        house.store.advance_publish(left.publish_id, state)
    house.engine.weight, house.engine.version = 1.2, str(second.version_id)
    with pytest.raises(Conflict):
        house.publisher().publish(second.version_id)
    failed = house.publisher().recover()
    assert failed is not None
    assert failed.publish_id == left.publish_id
    assert f"died while it was {reached}" in (failed.error or "")
    assert (house.engine.weight, house.engine.version) == (1.0, str(first.version_id))
    house.publisher().publish(second.version_id, probe(1.2, 1.0))
    assert house.state() == ("live", second.version_id)


def test_recovery_brings_a_restarted_engine_to_the_live_version(house: House) -> None:
    first = house.version(1.5)
    house.publisher().publish(first.version_id)
    house.engine.weight, house.engine.version = 1.0, "default"
    assert house.publisher().recover() is None
    assert (house.engine.weight, house.engine.version) == (1.5, str(first.version_id))
    assert house.state() == ("live", first.version_id)


def test_recovery_of_a_fresh_store_does_nothing(house: House) -> None:
    assert house.publisher().recover() is None
    assert house.engine.loaded == []


def perturbed(house: House, weight: float) -> Perturbed:
    return Perturbed(
        checkpoint_path=str(house.checkpoint(weight)),
        checkpoint_hash="perturbed",
        logprobs=probe(weight, None).new_logprobs,
    )


def test_the_canary_is_loaded_first_and_never_served(house: House) -> None:
    version = house.version(1.0)
    report = canary(house.publisher(), version.version_id, probe(1.0, None), lambda _probe: perturbed(house, 2.0))
    assert house.engine.loaded == ["w2.0", "w1.0"]
    assert house.states == ["draining", "swapping", "live"], "the canary must stay inside one hold"
    assert report.canary is not None
    assert report.canary.verdict == "new"
    assert house.state() == ("live", version.version_id)
    row = house.store.list_versions("main")[-1]
    assert (row.kind, row.abandoned, row.parent_id) == ("canary", True, version.version_id)


def test_the_canary_sees_a_stale_head_and_wants_to_be_visible(house: House) -> None:
    version = house.version(1.0)
    with pytest.raises(PublishFailed, match="perturb them more"):
        canary(house.publisher(), version.version_id, probe(1.0, None), lambda _probe: perturbed(house, 1.01))
    house.engine.stale_head = True
    with pytest.raises(PublishFailed, match="do not reach the engine whole"):
        canary(house.publisher(), version.version_id, probe(1.0, None), lambda _probe: perturbed(house, 2.0))
    assert house.state() == ("failed", None)


def test_without_a_probe_a_tied_head_needs_the_extension(house: House) -> None:
    version = house.version(1.2)
    house.engine.extension = False
    with pytest.raises(PublishFailed, match="lacks our worker extension"):
        house.publisher().publish(version.version_id)
    assert house.store.last_publish("main") is None
    house.publisher().publish(version.version_id, probe(1.2, None))
    assert house.state() == ("live", version.version_id)


def test_replicas_are_all_swapped_and_the_worst_one_decides(house: House, tmp_path: Path) -> None:
    first, second = house.version(1.0), house.version(1.3)
    with FakeEngine(house.checkpoint(1.0)) as other:
        clients = [EngineClient(e.url, "main") for e in (house.engine, other)]
        publisher = Publisher(house.store, "main", clients, SETTINGS)
        publisher.publish(first.version_id, probe(1.0, None))
        assert other.version == house.engine.version == str(first.version_id)
        other.ignore_reload = True
        with pytest.raises(PublishFailed, match="stale"):
            publisher.publish(second.version_id, probe(1.3, 1.0))
        assert (house.engine.weight, other.weight) == (1.0, 1.0)
