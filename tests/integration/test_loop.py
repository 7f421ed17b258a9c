"""The whole loop on the tiny model, real in every part: app -> proxy -> store -> Ray PPO -> vLLM -> app.

`tracegrad up` supervises engine, proxy and trainer; `tracegrad rollout` drives an unmodified LangGraph app with two
roles on one shared model, sampling ahead so that weights are published under load. Once with the critic, once with
group-relative advantages.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.store import Store, open_store

pytestmark = pytest.mark.engine

SUPPORT = Path(__file__).resolve().parents[1] / "support"
STEPS = 18
GROUPS = 16
GROUP = 8
RISE = 0.15
"""The mean sampled reward of the last quarter of the steps must exceed that of the first quarter by this."""


@dataclass(frozen=True)
class Trained:
    """What a finished loop left behind."""

    advantage: str
    store: Store
    metrics: list[dict[str, Any]]
    rollout: dict[str, Any]
    model: str = "tiny"


def _configuration(folder: Path, model: Path, advantage: str) -> dict[str, Any]:
    return {
        "store": "sqlite:///trace.db",
        "models": {
            "tiny": {
                "checkpoint": str(model),
                "engine": {
                    "url": f"http://127.0.0.1:{free_port()}",
                    "dtype": "float32",
                    "max_model_len": 256,
                    "max_num_seqs": 64,
                    "log": "engine.log",
                },
            }
        },
        "roles": {"solver": "tiny", "checker": "tiny"},
        "proxy": {"port": free_port(), "sampling": {"*": {"temperature": 1.0}}},
        "trainer": {
            "model": "tiny",
            "steps": STEPS,
            "output": str(folder),
            "precision": "fp32",
            "workers": {"threads": 1},
            "algorithm": {"credit": {"advantage": advantage}},
            "optimizer": {"lr": 4e-4, "critic_lr": 3e-3, "epochs": 2, "minibatches": 4},
            "batch": {"groups": GROUPS, "max_staleness": 1},
            "publish": {"probe_bound": 1e-4, "probe_tokens": 64},
        },
    }


def _tasks(path: Path) -> Path:
    lines = [
        {"id": f"max-{a}-{b}", "input": {"question": f"max {a} {b}"}, "reference": {"answer": str(max(a, b))}}
        for a in range(10)
        for b in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _command(*parts: str) -> list[str]:
    return [sys.executable, "-m", "tracegrad.adapters.cli", *parts]


@pytest.fixture(scope="module", params=["gae", "grpo"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Trained]:
    """Run the loop to its last step."""
    advantage: Literal["gae", "grpo"] = request.param
    folder = tmp_path_factory.mktemp(f"loop-{advantage}")
    config = folder / "tracegrad.yaml"
    config.write_text(yaml.safe_dump(_configuration(folder, tiny_model, advantage)))
    tasks = _tasks(folder / "tasks.jsonl")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (folder / "up.log").open("wb")
    up = subprocess.Popen(
        _command("up", "--config", str(config), "--exit-with-train"),
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_for_proxy(up, yaml.safe_load(config.read_text())["proxy"]["port"], folder / "up.log")
        rollout = subprocess.run(
            _command(
                "rollout",
                "--app",
                f"{SUPPORT / 'digits_app.py'}:graph",
                "--tasks",
                str(tasks),
                "--reward",
                f"{SUPPORT / 'digits_reward.py'}:reward",
                "--config",
                str(config),
                "--name",
                "loop",
                "--group",
                str(GROUP),
                "--groups",
                str(GROUPS * STEPS),
                "--concurrency",
                "32",
                "--ahead",
                str(GROUPS + GROUPS // 2),
                "--json",
                "--quiet",
            ),
            env=env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert rollout.returncode == 0, rollout.stderr[-3000:] + _tail(folder / "up.log")
        assert up.wait(timeout=60) == 0, _tail(folder / "up.log")
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGINT)
            up.wait(timeout=60)
        log.close()
    store = open_store(f"sqlite:///{folder / 'trace.db'}")
    metrics = [json.loads(line) for line in (folder / "main" / "metrics.jsonl").read_text().splitlines()]
    yield Trained(advantage, store, metrics, json.loads(rollout.stdout))
    store.close()


def _wait_for_proxy(up: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """`up` starts the proxy once the engine answers."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert up.poll() is None, _tail(log)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no proxy after 240 s: {_tail(log)}")


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-4000:]


@pytest.mark.timeout(420)
def test_the_sampled_reward_rises(trained: Trained) -> None:
    rewards = [line["reward"] for line in trained.metrics]
    assert [line["step"] for line in trained.metrics] == list(range(1, STEPS + 1))
    quarter = STEPS // 4
    before, after = sum(rewards[:quarter]) / quarter, sum(rewards[-quarter:]) / quarter
    print(f"{trained.advantage}: sampled reward {before:.3f} -> {after:.3f}")
    assert after - before >= RISE, rewards


def test_the_trainer_agrees_with_the_engine_after_every_publish(trained: Trained) -> None:
    """fp32: what vLLM said when it sampled is what the trainer computes, version after version."""
    differences = [line["logprob_abs_diff"] for line in trained.metrics]
    measured = [value for value in differences if value is not None]
    assert len(measured) >= STEPS // 2
    assert max(measured) < 1e-4, differences


def test_every_version_went_live_and_the_probes_saw_the_new_weights(trained: Trained) -> None:
    """Late steps repeat themselves: few distinct answers make a small probe, which may only say "unresolved"."""
    verdicts = [line["publish"]["result"]["verdict"] for line in trained.metrics]
    assert set(verdicts) <= {"new", "unresolved"}
    assert verdicts.count("new") >= STEPS * 3 // 4, verdicts
    live = trained.store.live_version(trained.model)
    assert live is not None
    assert live.step == STEPS


def test_every_sampled_token_is_trained_or_excluded_for_a_reason(trained: Trained) -> None:
    report = trained.store.consumption("main")
    assert report.stored > 0
    assert report.stored == report.trained + sum(report.excluded.values())
    assert report.trained == sum(line["tokens_trained"] for line in trained.metrics)


def test_publishing_under_load_harmed_no_call(trained: Trained) -> None:
    """No run failed, no call spans two versions, and every one knows its version and its role."""
    assert trained.rollout["runs_failed"] == 0
    runs = trained.store.list_runs(purpose="train", limit=GROUPS * STEPS * GROUP)
    assert len(runs) == GROUPS * STEPS * GROUP
    versions = set()
    for trace in trained.store.traces([summary.run.run_id for summary in runs]):
        assert [call.attribution.role for call in trace.calls] == ["solver", "checker"]
        for call in trace.calls:
            assert call.quarantine is None
            assert call.version_dispatched == call.version_completed is not None
            versions.add(call.version_dispatched)
    assert len(versions) >= STEPS // 2
