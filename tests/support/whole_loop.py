"""`tracegrad up` and `tracegrad rollout` of the digits app, as a person types them, until all steps are done.

Used by the integration tests of the loop.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

SUPPORT = Path(__file__).resolve().parent


def run_loop(folder: Path, configuration: dict[str, Any], *, group: int, groups: int, ahead: int) -> dict[str, Any]:
    """Run the loop in `folder`; return what the rollout said."""
    config = folder / "tracegrad.yaml"
    config.write_text(yaml.safe_dump(configuration))
    tasks = _tasks(folder / "tasks.jsonl")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (folder / "up.log").open("wb")
    up = subprocess.Popen(
        command("up", "--config", str(config), "--exit-with-train"),
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    named = {
        "--app": f"{SUPPORT / 'digits_app.py'}:graph",
        "--reward": f"{SUPPORT / 'digits_reward.py'}:reward",
        "--tasks": tasks,
        "--config": config,
        "--name": "loop",
        "--group": group,
        "--groups": groups,
        "--concurrency": 32,
        "--ahead": ahead,
    }
    try:
        _wait_for_proxy(up, configuration["proxy"]["port"], folder / "up.log")
        rollout = subprocess.run(
            command("rollout", *(str(part) for pair in named.items() for part in pair), "--json", "--quiet"),
            env=env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert rollout.returncode == 0, rollout.stderr[-3000:] + tail(folder / "up.log")
        assert up.wait(timeout=60) == 0, tail(folder / "up.log")
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGINT)
            up.wait(timeout=60)
        log.close()
    said: dict[str, Any] = json.loads(rollout.stdout)
    return said


def command(*parts: str) -> list[str]:
    """Return a tracegrad command line."""
    return [sys.executable, "-m", "tracegrad.adapters.cli", *parts]


def tail(path: Path) -> str:
    """Return the end of a log."""
    return path.read_text(errors="replace")[-4000:]


def _tasks(path: Path) -> Path:
    lines = [
        {"id": f"max-{a}-{b}", "input": {"question": f"max {a} {b}"}, "reference": {"answer": str(max(a, b))}}
        for a in range(10)
        for b in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _wait_for_proxy(up: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """`up` starts the proxy once the engine answers."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert up.poll() is None, tail(log)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no proxy after 240 s: {tail(log)}")
