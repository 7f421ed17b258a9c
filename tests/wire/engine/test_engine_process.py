"""The engine's process: how it is started, that it comes back, and that nothing of it stays behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import fake_engine
import pytest
from fake_engine import save_weight
from waits import gone, wait_for

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.config import AdapterConfig, EngineConfig, ModelConfig
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.trainer import engine_launch
from tracegrad.trainer.engine import EngineProcess
from tracegrad.trainer.engine_errors import EngineStartFailed


def model(folder: Path, **engine: object) -> ModelConfig:
    fields = {
        "url": f"http://127.0.0.1:{free_port()}",
        "launch": ("{python}", fake_engine.__file__),
        "start_timeout_s": 30.0,
        "log": str(folder / "engine.log"),
        **engine,
    }
    return ModelConfig(checkpoint=str(save_weight(folder / "w1", 1.0)), engine=EngineConfig(**fields))  # type: ignore[arg-type]


def version(version_id: int, path: Path) -> PolicyVersion:
    return PolicyVersion(
        version_id=version_id,
        model="main",
        kind="step",
        parent_id=None,
        checkpoint_path=str(path),
        checkpoint_hash="h",
        step=1,
        updates=1,
        line=version_id,
        job_id=None,
    )


def test_it_starts_and_stops_with_all_its_children(tmp_path: Path) -> None:
    said: list[str] = []
    process = EngineProcess("main", model(tmp_path), say=said.append)
    process.start()
    child = int((tmp_path / "w1" / "child.pid").read_text())
    assert process.client.healthy()
    assert process.pid is not None
    assert not gone(child)
    server = process.pid
    process.stop()
    assert gone(server)
    assert gone(child)
    assert process.pid is None
    assert said[-1].startswith("engine main: up after ")


def test_the_command_and_environment(tmp_path: Path) -> None:
    config = model(tmp_path, args=("--no-enforce-eager",), env={"OMP_NUM_THREADS": "3"}, max_model_len=99)
    with EngineProcess("main", config, live=lambda: version(7, save_weight(tmp_path / "w7", 7.0))) as process:
        assert process.client.version() == "7"
    started = json.loads((tmp_path / "w7" / "argv.json").read_text())
    given, environment = started["argv"], started["environment"]
    pairs = dict(zip(given, [*given[1:], ""], strict=True))
    assert pairs["--model"] == str(tmp_path / "w7"), "a live version is served from the first answer on"
    assert pairs["--tokenizer"] == str(tmp_path / "w1")
    assert pairs["--max-model-len"] == "99"
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--generation-config"] == "vllm"
    assert given[-1] == "--no-enforce-eager"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_the_extension_is_importable_where_nothing_else_of_ours_is(tmp_path: Path) -> None:
    home = engine_launch.lay_out_extension(tmp_path / "home")
    module, _, name = engine_launch.EXTENSION.rpartition(".")
    code = f"import {module} as m; print(m.{name}.__name__, m.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(home)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [name, str(home / "tracegrad" / "trainer" / "worker_extension.py")]


def test_a_launch_command_of_ones_own(tmp_path: Path) -> None:
    config = EngineConfig(url="http://127.0.0.1:9", launch=("vllm", "serve", "{model}", "--port={port}", '{"a": 1}'))
    command = engine_launch.command("main", "/w", "/base", config)
    assert command[:5] == ["vllm", "serve", "/w", "--port=9", '{"a": 1}']
    assert "--model" not in command
    assert "--port" not in command
    assert command[command.index("--served-model-name") + 1] == "main"


def test_the_engine_of_a_base_has_room_for_its_adapters_and_knows_their_layers() -> None:
    assert engine_launch.adapter_flags((), 0) == ()
    flags = engine_launch.adapter_flags(
        (AdapterConfig(of="b", rank=9, targets=("v_proj",)), AdapterConfig(of="b", rank=4, targets=("q_proj",))), 3
    )
    assert flags[:7] == ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "3", "--max-cpu-loras", "4")
    assert flags[7:] == ("--lora-target-modules", "q_proj", "v_proj")
    assert "down_proj" in engine_launch.adapter_flags((AdapterConfig(of="b"),), 2)


def test_an_engine_of_ours_allows_as_many_top_logprobs_as_the_proxy_asks_for(tmp_path: Path) -> None:
    """And no more than there are tokens."""
    assert engine_launch.kept_flags(256, "org/name") == ("--max-logprobs", "256")
    assert engine_launch.kept_flags(20, "org/name") == () == engine_launch.kept_flags(0, "org/name")
    for config in ({"vocab_size": 100}, {"text_config": {"vocab_size": 100}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert engine_launch.kept_flags(256, str(tmp_path)) == ("--max-logprobs", "100")
        assert engine_launch.kept_flags(0, str(tmp_path)) == ()


@pytest.mark.parametrize(
    ("url", "says"), [("http://0.0.0.0:8000", "not loopback"), ("http://127.0.0.1", "names no port")]
)
def test_addresses_that_are_refused(tmp_path: Path, url: str, says: str) -> None:
    with pytest.raises(EngineStartFailed, match=says):
        EngineProcess("main", model(tmp_path, url=url)).start()


def test_an_address_of_a_private_network_is_used_where_it_is_named(tmp_path: Path) -> None:
    config = EngineConfig(url="http://engine:8000", bind="0.0.0.0")
    command = engine_launch.command("main", "/w", "/base", config)
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert command[command.index("--port") + 1] == "8000"
    with pytest.raises(EngineStartFailed, match=r"engine\.bind"):
        engine_launch.address(EngineConfig(url="http://engine:8000"))


def test_a_taken_port_is_a_plain_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineStartFailed, match=r"is taken.*models\.main\.engine\.url"):
            EngineProcess("main", model(tmp_path, url=url)).start()


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"args": ("--crash-at-start",)}, "(?s)died while starting.*engine.log.*no such kernel"),
        ({"launch": ("/no/such/python",)}, "(?s)cannot run '/no/such/python'"),
        ({"args": ("--slow", "60"), "start_timeout_s": 0.6}, "(?s)not healthy after 1 s.*reading weights"),
    ],
    ids=["crash", "no command", "too slow"],
)
def test_a_failed_start_says_why_and_leaves_nothing(tmp_path: Path, engine: dict[str, object], says: str) -> None:
    process = EngineProcess("main", model(tmp_path, **engine))
    with pytest.raises(EngineStartFailed, match=says):
        process.start()
    assert process.pid is None
    child = tmp_path / "w1" / "child.pid"
    assert not child.exists() or gone(int(child.read_text()))


def test_a_live_version_without_its_folder_is_said_plainly(tmp_path: Path) -> None:
    process = EngineProcess("main", model(tmp_path), live=lambda: version(3, tmp_path / "moved"))
    with pytest.raises(EngineStartFailed, match=r"live version 3, .*moved, is gone: .*rollback"):
        process.start()
    assert process.pid is None


def test_a_killed_engine_comes_back_on_the_live_version(tmp_path: Path) -> None:
    live: list[PolicyVersion] = []
    process = EngineProcess("main", model(tmp_path), live=lambda: live[-1] if live else None)
    process.start()
    until = threading.Event()
    watcher = threading.Thread(target=process.watch, args=(until,))
    watcher.start()
    try:
        live.append(version(2, save_weight(tmp_path / "w2", 2.0)))
        child = int((tmp_path / "w1" / "child.pid").read_text())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: process.restarts == 1, "it is started again", 15)
        assert gone(child), "the dead server's children are gone as well"
        assert process.client.version() == "2"
        assert process.client.score([1, 2, 3], 1) == pytest.approx(fake_engine.logprobs(2.0, [1, 2, 3], 1))
    finally:
        until.set()
        watcher.join()
        process.stop()


def test_a_version_that_goes_live_during_the_start_is_loaded(tmp_path: Path) -> None:
    versions = [version(1, save_weight(tmp_path / "w1", 1.0)), version(2, save_weight(tmp_path / "w2", 2.0))]
    asked: list[int] = []

    def live() -> PolicyVersion:
        asked.append(len(asked))
        return versions[0] if len(asked) == 1 else versions[1]

    with EngineProcess("main", model(tmp_path), live=live) as process:
        assert process.client.version() == "2"
        assert process.client.score([1, 2, 3], 1) == pytest.approx(fake_engine.logprobs(2.0, [1, 2, 3], 1))


def test_an_engine_that_cannot_come_back_is_an_error_in_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    process = EngineProcess("main", model(tmp_path), say=said.append, max_failed_starts=2)
    process.start()
    (tmp_path / "w1" / "crash").touch()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineStartFailed, match="no such kernel"):
        process.watch(threading.Event())
    assert any("next try in 1 s (failed 1 times)" in line for line in said)


OWNER = """
import sys, time
from pathlib import Path
from tracegrad.tracestore.config import EngineConfig, ModelConfig
from tracegrad.trainer.engine import EngineProcess
url, fake, folder = sys.argv[1:]
config = EngineConfig(url=url, launch=("{python}", fake), log=folder + "/engine.log")
process = EngineProcess("main", ModelConfig(checkpoint=folder + "/w1", engine=config))
process.start()
print(process.pid, flush=True)
time.sleep(60)
"""


def test_it_dies_with_its_owner_even_when_that_is_killed(tmp_path: Path) -> None:
    save_weight(tmp_path / "w1", 1.0)
    arguments = [f"http://127.0.0.1:{free_port()}", fake_engine.__file__, str(tmp_path)]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *arguments], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    server = int(owner.stdout.readline())
    child = int((tmp_path / "w1" / "child.pid").read_text())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: gone(server) and gone(child), "both are gone", 15)
