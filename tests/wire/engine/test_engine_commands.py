"""`tracegrad engine`, `versions` and `rollback` as a person runs them: output, exit codes, what stays behind."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_engine
import pytest
import yaml
from click.testing import CliRunner
from fake_engine import FakeEngine, save_weight
from versions import add_version
from waits import gone, wait_for

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.config import load_config
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.gating import evaluation
from tracegrad.trainer.adapter_client import engine_clients
from tracegrad.trainer.engine_command import engine
from tracegrad.trainer.pin_command import pin
from tracegrad.trainer.versions_command import rollback, versions


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    with FakeEngine(save_weight(tmp_path / "w1.0", 1.0)) as engine:
        yield engine


def write_config(tmp_path: Path, url: str, **engine: object) -> Path:
    path = tmp_path / "tracegrad.yaml"
    fields = {"url": url, "max_model_len": 64, **engine}
    models = {"main": {"checkpoint": "w1.0", "engine": fields}}
    path.write_text(yaml.safe_dump({"store": "sqlite:///store.db", "models": models}))
    return path


def test_an_adapter_has_no_engine_of_its_own(tmp_path: Path) -> None:
    path = write_config(tmp_path, "http://127.0.0.1:1")
    models = {"base": {"checkpoint": "w1.0", "trained": False}, "p": {"adapter": {"of": "base"}}}
    path.write_text(yaml.safe_dump({"models": models}))
    result = CliRunner().invoke(engine, ["--config", str(path), "--model", "p"])
    assert (result.exit_code, "the engine of base serves it" in result.output) == (2, True)
    assert [client.name for client in engine_clients(load_config(path), "p")] == ["p"]


def fill(store: Store, tmp_path: Path, weights: list[float], model: str = "main") -> list[int]:
    """Versions of these weights, each published and live, with a probe's result."""
    ids = []
    for step, weight in enumerate(weights):
        path = save_weight(tmp_path / f"w{weight}", weight)
        version = add_version(store, path, step, model=model, parent_id=ids[-1] if ids else None)
        ids.append(version.version_id)
        publish = store.request_publish(version.version_id)
        for state in ("draining", "swapping"):
            store.advance_publish(publish.publish_id, state)
        seen = {"total_s": 0.25, "result": {"verdict": "new", "mean_abs_new": 0.0123}}
        store.advance_publish(publish.publish_id, "live", probe=seen)
    return ids


def test_preflight_says_ready_or_what_is_missing(tmp_path: Path, fake: FakeEngine) -> None:
    config = str(write_config(tmp_path, fake.url))
    done = CliRunner().invoke(engine, ["--config", config, "--preflight"])
    assert (done.exit_code, done.output) == (0, f"engine main at {fake.url} is ready for training\n")
    fake.processed = False
    done = CliRunner().invoke(engine, ["--config", config, "--preflight"])
    assert done.exit_code == 3
    assert "--logprobs-mode processed_logprobs" in done.output


def test_mistakes_on_the_command_line(tmp_path: Path, fake: FakeEngine) -> None:
    config = str(write_config(tmp_path, fake.url))
    done = CliRunner().invoke(engine, ["--config", config, "--model", "mian"])
    assert (done.exit_code, "no model 'mian' (it has main)" in done.output) == (2, True)
    done = CliRunner().invoke(engine, ["--config", str(tmp_path / "none.yaml")])
    assert (done.exit_code, "cannot read" in done.output) == (2, True)
    done = CliRunner().invoke(engine, ["--config", config])
    assert (done.exit_code, "is taken" in done.output) == (1, True)
    external = str(write_config(tmp_path, fake.url, external=True))
    done = CliRunner().invoke(engine, ["--config", external])
    assert (done.exit_code, "main is not ours to start" in done.output) == (2, True)
    assert CliRunner().invoke(engine, ["--config", external, "--preflight"]).exit_code == 0
    write_config(tmp_path, f"http://127.0.0.1:{free_port()}")
    shutil.rmtree(tmp_path / "w1.0")
    done = CliRunner().invoke(engine, ["--config", config])
    assert (done.exit_code, "models.main.checkpoint: there is no folder" in done.output) == (2, True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(tmp_path: Path, how: signal.Signals) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    save_weight(tmp_path / "w1.0", 1.0)
    config = write_config(tmp_path, url, launch=["{python}", fake_engine.__file__], log="engine.log")
    code = "from tracegrad.trainer.engine_command import engine; engine()"
    running = subprocess.Popen([sys.executable, "-c", code, "--config", str(config)], stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    said = [running.stderr.readline(), running.stderr.readline()]
    assert said[0].startswith("engine main: up after ")
    assert said[1].startswith("engine main: ready")
    server = int((tmp_path / "w1.0" / "child.pid").read_text())
    running.send_signal(how)
    assert running.wait(20) == 0
    running.stderr.close()
    wait_for(lambda: gone(server), "the server is gone", 5)


def test_one_process_for_each_replica(tmp_path: Path) -> None:
    """Each answers to the model's name, and the preflight looks at each."""
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    save_weight(tmp_path / "w1.0", 1.0)
    config = write_config(tmp_path, urls[0], launch=["{python}", fake_engine.__file__], log="engine.log")
    fields = yaml.safe_load(config.read_text())
    fields["models"]["main"]["replicas"] = urls[1:]
    config.write_text(yaml.safe_dump(fields))
    code = "from tracegrad.trainer.engine_command import engine; engine()"
    running = subprocess.Popen([sys.executable, "-c", code, "--config", str(config)], stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    said = [running.stderr.readline() for _ in range(4)]
    assert [line.split(":")[0] for line in said] == ["engine main-0"] * 2 + ["engine main-1"] * 2
    assert all((tmp_path / name).exists() for name in ("engine.log", "engine-1.log"))
    done = CliRunner().invoke(engine, ["--config", str(config), "--preflight"])
    assert (done.exit_code, done.output.count("is ready for training")) == (0, 2)
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 0
    running.stderr.close()


def test_versions_lists_states_times_and_probes(tmp_path: Path, fake: FakeEngine) -> None:
    config = str(write_config(tmp_path, fake.url))
    done = CliRunner().invoke(versions, ["--config", config])
    assert done.exit_code == 1
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    first, second = fill(store, tmp_path, [1.0, 2.0])
    failed = store.request_publish(first)
    store.advance_publish(failed.publish_id, "failed", error="no engine")
    store.close()
    done = CliRunner().invoke(versions, ["--config", config, "--json"])
    rows = json.loads(done.output)
    assert [(r["version_id"], r["live"], r["step"]) for r in rows] == [(first, False, 0), (second, True, 1)]
    assert [p["state"] for p in rows[0]["publishes"]] == ["live", "failed"]
    assert rows[0]["publishes"][1]["error"] == "no engine"
    assert rows[1]["publishes"][0]["probe"]["result"]["verdict"] == "new"
    table = CliRunner().invoke(versions, ["--config", config], env={"COLUMNS": "140"}).output
    assert "LIVE" in table
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    third = fill(store, tmp_path, [3.0])[0]
    store.close()
    table = CliRunner().invoke(versions, ["--config", config], env={"COLUMNS": "140"}).output
    states = {line.split()[0]: " ".join(line.split()[2:4]) for line in table.splitlines() if line.strip()[:1].isdigit()}
    assert (states[str(second)], states[str(third)].split()[0]) == ("was live", "LIVE"), "only one of them is live"
    assert "0.012" in table


def test_the_table_fits_a_terminal_and_says_what_the_gate_decided(
    tmp_path: Path, fake: FakeEngine, store: Store
) -> None:
    config = str(write_config(tmp_path, fake.url))
    fill(store, tmp_path, [1.0, 2.0])
    live = store.live_version("main")
    assert live is not None
    evaluation(store, live.version_id, run_ids=("a", "b"), n_failed=0, values={"one": 0.5, "two": 0.55})
    why = "mean f1 0.4312 differs by -0.09377 from the live version's over 128 tasks (perhaps -0.11, at confidence 0.9)"
    decision = {"passed": False, "judged": True, "why": why, "mean": 0.43125, "difference": -0.09377}
    for step in (120_002, 120_003):
        version = add_version(store, f"w{step}", step, model="main")
        publish = store.request_publish(version.version_id, gate={"timeout_s": 1.0})
        if step == 120_002:
            store.advance_publish(publish.publish_id, "rejected", decision=decision)
        else:
            store.advance_publish(publish.publish_id, "failed", error="no engine")
            store.skip_publish(version.version_id, "model 'main' is pinned at version 2")
    store.pin_version(live.version_id, "by hand")
    shown = CliRunner().invoke(versions, ["--config", config], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown and "..." not in shown, "nothing is cut off"
    for expected in ("LIVE, pinned", "new 0.012", "0.525", "0.431 (-0.094)", "rejected", "skipped"):
        assert expected in shown, expected
    plain = " ".join(shown.split())
    assert f"version 3 rejected: {why}" in plain
    assert "version 4 skipped: model 'main' is pinned at version 2" in plain
    rows = json.loads(CliRunner().invoke(versions, ["--config", config, "--json"]).output)
    assert [(row["pinned"], len(row["evaluations"])) for row in rows] == [(False, 0), (True, 1), (False, 0), (False, 0)]
    assert rows[2]["publishes"][0]["decision"]["why"] == why


def test_the_commands_know_adapters_and_several_models(tmp_path: Path, fake: FakeEngine, store: Store) -> None:
    """One is rolled back beside the other; the list says whose version is whose; a pin's end asks whose it is."""
    path = write_config(tmp_path, fake.url)
    base = {**yaml.safe_load(path.read_text())["models"]["main"], "trained": False}
    models = {"base": base, **{name: {"adapter": {"of": "base"}} for name in ("p", "w")}}
    path.write_text(yaml.safe_dump({"store": "sqlite:///store.db", "models": models, "roles": {"a": "p", "b": "w"}}))
    config, fake.name = ["--config", str(path)], "base"
    done = CliRunner().invoke(engine, [*config, "--preflight"])
    ready = f"engine base at {fake.url} is ready for training of the adapter"
    assert (done.exit_code, done.output) == (0, f"{ready} p\n{ready} w\n")
    first, second = fill(store, tmp_path, [1.0, 2.0], "p")
    (other,) = fill(store, tmp_path, [3.0], "w")
    fake.adapters = {"p": str(tmp_path / "w2.0"), "w": str(tmp_path / "w3.0")}
    done = CliRunner().invoke(rollback, [str(first), *config])
    assert done.output == f"version {first} is live again; abandoned: {second}\n"
    assert fake.adapters == {"p": str(tmp_path / "w1.0"), "w": str(tmp_path / "w3.0")}
    listed = json.loads(CliRunner().invoke(versions, [*config, "--json"]).output)
    assert [(row["model"], row["live"]) for row in listed] == [("p", True), ("p", False), ("w", True)]
    for version in (first, other):
        assert CliRunner().invoke(pin, [str(version), *config]).exit_code == 0
    assert "say whose pin: --model p or w" in CliRunner().invoke(pin, ["--off", *config]).output
    assert CliRunner().invoke(pin, ["--off", "--model", "p", *config]).exit_code == 0
    assert (store.pinned("p"), store.pinned("w")) == (None, other)


def test_rollback_reaches_every_replica(tmp_path: Path, fake: FakeEngine, store: Store) -> None:
    config = write_config(tmp_path, fake.url)
    with FakeEngine(tmp_path / "w1.0") as other:
        fields = yaml.safe_load(config.read_text())
        fields["models"]["main"]["replicas"] = [other.url]
        config.write_text(yaml.safe_dump(fields))
        first, _ = fill(store, tmp_path, [1.0, 2.0])
        fake.weight = other.weight = 2.0
        assert CliRunner().invoke(rollback, [str(first), "--config", str(config)]).exit_code == 0
        assert [(each.weight, each.version) for each in (fake, other)] == [(1.0, str(first))] * 2


def test_rollback_publishes_the_old_version_and_abandons_the_newer(
    tmp_path: Path, fake: FakeEngine, store: Store
) -> None:
    config = str(write_config(tmp_path, fake.url))
    first, second, third = fill(store, tmp_path, [1.0, 2.0, 3.0])
    fake.weight, fake.version = 3.0, str(third)
    done = CliRunner().invoke(rollback, [str(first), "--config", config])
    assert done.output == f"version {first} is live again; abandoned: {second}, {third}\n"
    assert (fake.weight, fake.version) == (1.0, str(first))
    live = store.live_version("main")
    assert live is not None
    assert live.version_id == first
    assert [v.abandoned for v in store.list_versions("main")] == [False, True, True]
    assert len(store.list_publishes("main")) == 4
    for again, says in ((first, "is live already"), (second, "abandoned"), (99, "no policy version 99")):
        done = CliRunner().invoke(rollback, [str(again), "--config", config])
        assert (done.exit_code, says in done.output) == (1, True), done.output
    new = add_version(store, "w", 1, model="main", parent_id=first)
    assert new.version_id > third, "ids are never reused"


def add_offline(store: Store, tmp_path: Path) -> int:
    """A version of a job that publishes nothing, newer than what serves."""
    path = save_weight(tmp_path / "offline", 9.0)
    store.register_job("again", ["main"], {})
    return add_version(store, path, 7, model="main", job_id="again").version_id


def test_what_was_trained_offline_is_neither_abandoned_nor_served(
    tmp_path: Path, fake: FakeEngine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rollback` and `pin --off` mean the versions of jobs that publish. (All here without --config: the file here.)"""
    write_config(tmp_path, fake.url)
    monkeypatch.chdir(tmp_path)
    first, second, third = fill(store, tmp_path, [1.0, 2.0, 3.0])
    offline = add_offline(store, tmp_path)
    done = CliRunner().invoke(rollback, [str(second), "--json"])
    assert json.loads(done.output) == {"live": second, "abandoned": [third]}
    assert not store.get_version(offline).abandoned
    assert CliRunner().invoke(pin, [str(first)]).exit_code == 0
    done = CliRunner().invoke(pin, ["--off", "--json"])
    assert json.loads(done.output)["published"] == second
    assert (fake.weight, fake.version) == (2.0, str(second))


def test_versions_tells_jobs_apart_and_knows_no_other_models(tmp_path: Path, fake: FakeEngine, store: Store) -> None:
    config = str(write_config(tmp_path, fake.url))
    fill(store, tmp_path, [1.0])
    assert " job " not in CliRunner().invoke(versions, ["--config", config]).output
    add_offline(store, tmp_path)
    shown = CliRunner().invoke(versions, ["--config", config]).output
    assert (" job " in shown, "again" in shown) == (True, True)
    done = CliRunner().invoke(versions, ["--config", config, "--model", "mian"])
    assert (done.exit_code, "no versions of a model 'mian'; the store has those of: main" in done.output) == (1, True)


def test_a_rollback_that_does_not_arrive_abandons_nothing(tmp_path: Path, fake: FakeEngine, store: Store) -> None:
    config = str(write_config(tmp_path, fake.url))
    first, second = fill(store, tmp_path, [1.0, 2.0])
    fake.fail_reloads = 1
    done = CliRunner().invoke(rollback, [str(first), "--config", config])
    assert (done.exit_code, f"version {second} is back" in done.output) == (1, True)
    assert not any(v.abandoned for v in store.list_versions("main"))
