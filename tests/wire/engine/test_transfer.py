"""Weights sent by vLLM's protocol, behind the publisher that knows nothing of it: same states, probe and way back."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_sender
import pytest
from fake_engine import FakeEngine, save_weight
from fake_transfer import STEPS
from versions import add_version
from waits import wait_for
from weight_probes import probe

from tracegrad.tracestore.config import PublishConfig, TransferConfig, parse_config
from tracegrad.tracestore.store import Store
from tracegrad.trainer.adapter_client import AdapterClient, engine_clients
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineRefused, PublishFailed
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.sender_process import SenderProcess
from tracegrad.trainer.transfer_client import MemorySender, Sender, TransferClient

SETTINGS = PublishConfig(probe_tokens=100, drain_timeout_s=0.4, swap_timeout_s=5)


class House:
    """A store, an engine that takes weights from shared memory, and checkpoints of weights by number."""

    def __init__(self, tmp_path: Path, store: Store) -> None:
        self.tmp_path, self.store = tmp_path, store
        self.engine = FakeEngine(self.checkpoint(1.0))
        self.engine.transfer_backend = "tracegrad"
        self.sender: Sender = MemorySender()
        self.states: list[str] = []

    def checkpoint(self, weight: float) -> Path:
        return save_weight(self.tmp_path / f"w{weight}", weight, tied=True)

    def client(self, engine: FakeEngine | None = None) -> TransferClient:
        return TransferClient((engine or self.engine).url, "main", "memory", self.sender, timeout_s=5)

    def publisher(self, *others: FakeEngine) -> Publisher:
        clients = [self.client(engine) for engine in (self.engine, *others)]
        return Publisher(self.store, "main", clients, SETTINGS, on_state=self.states.append)

    def version(self, weight: float) -> int:
        return add_version(self.store, self.checkpoint(weight), model="main", kind="step").version_id

    def steps(self) -> list[str]:
        """The steps of the protocol so far; forgotten."""
        events, self.engine.events = self.engine.events, []
        return [event for event in events if event in STEPS]


@pytest.fixture
def house(tmp_path: Path, store: Store) -> Iterator[House]:
    house = House(tmp_path, store)
    with house.engine:
        yield house
    assert segments(os.getpid()) == [], "shared memory is given back after every publish"


def segments(process: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"tracegrad-{process}-*"))


def test_a_version_goes_live_by_the_protocol(house: House) -> None:
    with FakeEngine(house.checkpoint(1.0)) as replica:
        replica.transfer_backend = "tracegrad"
        publisher = house.publisher(replica)
        first, second = house.version(1.0), house.version(1.2)
        publisher.publish(first, probe(1.0, None))
        assert house.steps() == list(STEPS)
        report = publisher.publish(second, probe(1.2, 1.0))
        assert report.probe is not None
        assert (report.probe.verdict, report.stage_s > 0) == ("new", True)
        assert [engine.weight for engine in (house.engine, replica)] == [1.2, 1.2]
        assert house.states == ["draining", "swapping", "live"] * 2
        assert house.engine.version == replica.version == str(second)
        assert house.engine.loaded == [], "no folder was named to the engine"
        rpc = [event for event in house.engine.events if event == "collective_rpc"]
        assert len(rpc) == 2, "what it is, and that it forget what was left unfinished"


@pytest.mark.parametrize("step", STEPS)
def test_what_fails_half_way_is_put_back_by_the_protocol(house: House, step: str) -> None:
    publisher = house.publisher()
    first, second = house.version(1.0), house.version(1.2)
    publisher.publish(first, probe(1.0, None))
    house.steps()
    house.engine.fail_at = step
    with pytest.raises(PublishFailed, match=r"out of memory.*version 1 is back"):
        publisher.publish(second, probe(1.2, 1.0))
    assert house.steps() == [*STEPS[: STEPS.index(step) + 1], *STEPS]
    assert (house.engine.weight, house.engine.version) == (1.0, str(first))
    live, last = house.store.live_version("main"), house.store.last_publish("main")
    assert live is not None
    assert last is not None
    assert (live.version_id, last.state) == (first, "failed")
    publisher.publish(second, probe(1.2, 1.0))
    assert house.engine.weight == 1.2


def test_an_update_that_its_trainer_never_finished_is_no_obstacle(house: House) -> None:
    house.engine.update_active = True
    house.publisher().publish(house.version(1.2), probe(1.2, 1.0))
    assert house.engine.weight == 1.2


def test_a_stale_head_is_caught(house: House) -> None:
    publisher = house.publisher()
    publisher.publish(house.version(1.0), probe(1.0, None))
    house.engine.stale_head = True
    with pytest.raises(PublishFailed, match="stale"):
        publisher.publish(house.version(1.2), probe(1.2, 1.0))
    assert (house.engine.weight, house.engine.version) == (1.0, "1")


@pytest.mark.parametrize("harm", ["short", "header", "none"])
def test_what_cannot_be_sent_makes_nobody_wait(house: House, harm: str) -> None:
    publisher = house.publisher()
    first, second = house.version(1.0), house.version(1.2)
    publisher.publish(first, probe(1.0, None))
    house.states.clear()
    file = house.tmp_path / "w1.2" / "model.safetensors"
    raw = file.read_bytes()
    file.unlink() if harm == "none" else file.write_bytes(raw[:-1] if harm == "short" else b"\xff" * 8 + raw[8:])
    said = {"short": "was not written whole", "header": "is no safetensors file", "none": "has no safetensors"}[harm]
    with pytest.raises(PublishFailed, match=f"nothing was swapped: .*{said}"):
        publisher.publish(second, probe(1.2, 1.0))
    assert (house.states, house.engine.weight) == (["failed"], 1.0)


def test_an_engine_started_for_files_is_refused_and_not_touched(house: House) -> None:
    for backend, said in (("", "from files only"), ("ipc", "by ipc")):
        house.engine.transfer_backend = backend
        with pytest.raises(EngineRefused, match=said):
            house.client().reload(str(house.checkpoint(1.2)))
    house.engine.extension = False
    with pytest.raises(EngineRefused, match="lacks our worker extension"):
        house.client().reload(str(house.checkpoint(1.2)))
    assert (house.steps(), house.engine.weight) == ([], 1.0)


def test_a_killed_trainer_leaves_no_memory_behind(tmp_path: Path) -> None:
    folder = save_weight(tmp_path / "w", 1.0)
    code = (
        "import sys, time; from tracegrad.trainer.transfer_client import MemorySender; s = MemorySender(); "
        "s.stage(sys.argv[1]); print('staged', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "staged\n"
        assert len(segments(trainer.pid)) == 1
        os.kill(trainer.pid, signal.SIGKILL)
    wait_for(lambda: not segments(trainer.pid), "its memory is given back")


@pytest.mark.parametrize(("backend", "told"), [("ipc", {"packed": True}), ("nccl", {"world_size": 2})])
def test_a_sender_with_the_engines_vllm_runs_the_protocol(
    house: House, tmp_path: Path, backend: str, told: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process, its wire and its end; vLLM's own part of it is a stand-in that says which files it would send."""
    monkeypatch.setenv("PYTHONPATH", f"{fake_sender.lay_out(tmp_path / 'stub')}:{os.environ.get('PYTHONPATH', '')}")
    house.sender = SenderProcess(TransferConfig(backend=backend), device="cpu")  # type: ignore[arg-type]
    publisher = house.publisher()
    first, second = house.version(1.0), house.version(1.2)
    publisher.publish(first, probe(1.0, None))
    assert told.items() <= house.engine.init_info.items()
    assert house.steps() == list(STEPS)
    house.engine.fail_at = "update_weights"
    with pytest.raises(PublishFailed, match=r"was not sent.*HTTP Error 500.*version 1 is back"):
        publisher.publish(second, probe(1.2, 1.0))
    assert house.steps() == [*STEPS[1:3], *STEPS], "a broken sender is another one's"
    assert house.engine.weight == 1.0
    publisher.publish(second, probe(1.2, 1.0))
    assert (house.engine.weight, house.steps()) == (1.2, list(STEPS[1:])), "one that works is kept"


def test_a_sender_that_cannot_run_says_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.sender = SenderProcess(TransferConfig(backend="ipc", python="/no/python"))
    with pytest.raises(EngineRefused, match=r"engine\.transfer\.python: /no/python cannot be run"):
        house.client().reload(str(house.checkpoint(1.2)))
    house.sender = SenderProcess(TransferConfig(backend="ipc", python=shutil.which("false") or "/bin/false"))
    with pytest.raises(EngineRefused, match="the sender died"):
        house.client().reload(str(house.checkpoint(1.2)))
    assert house.steps() == []


def test_the_configuration_chooses_the_way() -> None:
    models = {
        "base": {"checkpoint": "/b", "trained": False, "engine": {"transfer": {"backend": "memory"}}},
        "role": {"adapter": {"of": "base"}},
        "full": {"checkpoint": "/f", "engine": {"url": "http://127.0.0.1:1", "transfer": {"backend": "nccl"}}},
        "plain": {"checkpoint": "/p", "engine": {"url": "http://127.0.0.1:2"}},
    }
    config = parse_config({"models": models, "roles": {"a": "role", "b": "full", "c": "plain"}})
    kinds = {name: type(engine_clients(config, name)[0]) for name in ("role", "full", "plain")}
    assert kinds == {"role": AdapterClient, "full": TransferClient, "plain": EngineClient}
