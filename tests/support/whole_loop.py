"""The digits app in a loop with proxy, engine and trainer, until all steps are done. Used by the integration tests.

`run_loop`: `tracegrad up` and `tracegrad rollout`, as a person types them. `learn`: the engines run already, and the
trainer runs in this process without Ray, which saves the half minute that these take to start.

The settings teach the tiny model what `digits_rewards` asks for in few runs. They were found by sampling offline: at
temperature 0.8 every seed of four or five rises from 0.11 or less to 0.6 and more in eight steps, in every way to map
the roles. At 1.0 adapters end at 0.45, because the head that they cannot change is too soft to be surer. A shared model
with a critic breaks now and then at a learning rate of 1e-3. On machines that other work slowed down, some runs
started four steps late (0.33 after eight): so there are twelve.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import offline_training
import yaml

from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.config import Config, load_config
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.adapter_client import engine_clients

SUPPORT = Path(__file__).resolve().parent
STEPS, GROUPS, GROUP = 12, 16, 4
LR, ADAPTER_LR = 7e-4, 3e-3
SOFT = {"temperature": 0.8}


def configuration(
    folder: Path,
    models: dict[str, Any],
    roles: dict[str, str],
    *,
    lr: float,
    credit: dict[str, Any],
    steps: int = STEPS,
) -> dict[str, Any]:
    """Return what trains these models on the digits app, in `folder`. Of the checker's digits top-k leaves nine."""
    return {
        "store": "sqlite:///trace.db",
        "models": models,
        "roles": roles,
        "proxy": {"port": free_port(), "sampling": {"*": SOFT, "checker": {**SOFT, "top_k": 9}}},
        "trainer": {
            "steps": steps,
            "output": str(folder),
            "precision": "fp32",
            "workers": {"threads": 1},
            "algorithm": {"credit": credit},
            "optimizer": {"lr": lr, "critic_lr": 3e-3, "epochs": 4},
            "batch": {"groups": GROUPS, "max_staleness": 1, "poll_s": 0.1},
            "publish": {"probe_bound": 1e-3, "probe_tokens": 32},
        },
    }


def run_loop(folder: Path, configured: dict[str, Any], *, reward: str) -> dict[str, Any]:
    """Run the loop in `folder`; return what the rollout said. `reward`: a function of `digits_rewards`."""
    config = _written(folder, configured)
    with running("up", "--config", str(config), "--exit-with-train", log=folder / "up.log") as up:
        # `up` starts the proxy once the engine answers.
        wait_for(f"http://127.0.0.1:{configured['proxy']['port']}/health", up, folder / "up.log")
        rollout = subprocess.run(
            _rollout(config, reward, configured["trainer"]["steps"]),
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert rollout.returncode == 0, rollout.stderr[-3000:] + tail(folder / "up.log")
        assert up.wait(timeout=60) == 0, tail(folder / "up.log")
    said: dict[str, Any] = json.loads(rollout.stdout)
    return said


def learn(folder: Path, configured: dict[str, Any], *, reward: str) -> list[dict[str, Any]]:
    """Run the loop in `folder` with engines that run already; return its metrics, a line a step."""
    path = _written(folder, configured)
    config = load_config(path)
    rollout = _rollout(path, reward, config.trainer.steps)
    proxy_log, rollout_log = folder / "proxy.log", folder / "rollout.log"
    stop = Event()
    with running("proxy", "--config", str(path), log=proxy_log) as proxy:
        wait_for(f"http://127.0.0.1:{config.proxy.port}/health", proxy, proxy_log)
        with running(*rollout[3:], log=rollout_log) as sampling:
            Thread(target=lambda: sampling.wait() and stop.set(), daemon=True).start()
            said = _train(config, stop)
            assert not stop.is_set(), tail(rollout_log)
            assert sampling.wait(timeout=60) == 0, tail(rollout_log) + "\n".join(said[-20:])
    return metrics_of(folder)


def gain(metrics: list[dict[str, Any]], role: str) -> tuple[float, float]:
    """Return the mean reward that a role's calls earned in the first step, and in the last two."""
    earned = [line["roles"][role]["reward"] for line in metrics]
    print(f"reward of the {role}, step by step: {[round(each, 2) for each in earned]}")
    return earned[0], sum(earned[-2:]) / 2


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the job's metrics."""
    return [json.loads(line) for line in (folder / "main" / "metrics.jsonl").read_text().splitlines()]


def command(*parts: str) -> list[str]:
    """Return a tracegrad command line."""
    return [sys.executable, "-m", "tracegrad.adapters.cli", *parts]


@contextmanager
def running(*parts: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A tracegrad command in a session of its own; interrupted at the end, if it is still there."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(*parts), env=_environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once `url` answers with 200, while the process lives."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, tail(log)
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"nothing at {url} after 240 s: {tail(log)}")


def tail(path: Path) -> str:
    """Return the end of a log."""
    return path.read_text(errors="replace")[-4000:]


def _train(config: Config, stop: Event) -> list[str]:
    engines = {name: engine_clients(config, name) for name in config.trained_models()}
    with closing(open_store(config.store)) as store:
        return offline_training.train(config, store, stop=stop, engines=engines)


def _rollout(config: Path, reward: str, steps: int) -> list[str]:
    named = {
        "--app": f"{SUPPORT / 'digits_app.py'}:graph",
        "--reward": f"{SUPPORT / 'digits_rewards.py'}:{reward}",
        "--tasks": _tasks(config.with_name("tasks.jsonl")),
        "--config": config,
        "--name": "loop",
        "--group": GROUP,
        "--groups": GROUPS * steps,
        "--concurrency": 32,
        "--ahead": GROUPS * 3 // 2,
    }
    return command("rollout", *(str(part) for pair in named.items() for part in pair), "--json", "--quiet")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _written(folder: Path, configuration: dict[str, Any]) -> Path:
    path = folder / "tracegrad.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return path


def _tasks(path: Path) -> Path:
    lines = [
        {"id": f"max-{a}-{b}", "input": {"question": f"max {a} {b}"}, "reference": {"answer": str(max(a, b))}}
        for a in range(10)
        for b in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
