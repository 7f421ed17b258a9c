"""`tracegrad train --offline` with a real Ray, killed with SIGKILL: the continuation is bitwise.

One job is killed while its actor writes, and between ledger and publish, and ends with the same checkpoint hashes as a
job that nothing disturbed, every run trained once. Every other point, and random moments, are cheap without Ray:
tests/wire/test_trainer_kill.py. TRACEGRAD_LONG=1 adds random moments here too. Seeds are printed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import recorded_runs as recorded
import yaml
from in_process import InProcess

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.store import open_store

STEPS = 6
KILLS = ("during-checkpoint:2", "after-ledger:4")
PROGRAM = "from tracegrad.adapters.cli import main; main()"
LONG = os.environ.get("TRACEGRAD_LONG") == "1"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A configuration, and a store file with groups for all steps."""
    folder = tmp_path_factory.mktemp("resume")
    return recorded.stored_groups(folder, groups=2 * STEPS, steps=STEPS, keep_checkpoints=STEPS), folder


def start(config: Config, folder: Path, job: str, kill_at: str = "") -> subprocess.Popen[str]:
    named = msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, job=job))
    path = folder / f"{job}.yaml"
    path.write_text(yaml.safe_dump(msgspec.to_builtins(named)))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", "--config", str(path), "--offline"],
        env={**os.environ, "TRACEGRAD_KILL_AT": kill_at, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def trained(config: Config, job: str) -> list[tuple[int, str]]:
    with closing(open_store(config.store)) as store:
        return [(v.step, v.checkpoint_hash) for v in store.list_versions(recorded.MODEL) if v.job_id == job]


@pytest.fixture(scope="module")
def undisturbed(setting: tuple[Config, Path]) -> list[tuple[int, str]]:
    config, folder = setting
    code, out, err = finish(start(config, folder, "undisturbed"))
    assert code == 0, out + err
    assert err == "", "the console is the user's"
    found = trained(config, "undisturbed")
    assert [step for step, _ in found] == list(range(STEPS + 1))
    return found


def check(config: Config, job: str, undisturbed: list[tuple[int, str]]) -> None:
    assert trained(config, job) == undisturbed
    with closing(open_store(config.store)) as store:
        report = store.consumption(job)
        assert report.conserved
        assert report.trained == report.stored
        assert store.reclaim(job, 1.0) is None
    lines = (Path(config.trainer.output) / job / "metrics.jsonl").read_text().splitlines()
    assert [msgspec.json.decode(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_ray_learns_what_one_process_learns(setting: tuple[Config, Path], undisturbed: list[tuple[int, str]]) -> None:
    """The first step by groups in this process, from the same plan: the actors add nothing."""
    from tracegrad.tracestore.records import BatchPlan
    from tracegrad.tracestore.rules import lease_rule
    from tracegrad.trainer.controller import step_seed
    from tracegrad.trainer.samples import build_batch
    from tracegrad.trainer.shares import share

    config, folder = setting
    alone = InProcess(config)
    assert alone.create(str(folder / "alone")).checkpoint.hash == undisturbed[0][1]
    with closing(open_store(config.store)) as store:
        run_ids = [f"run-s0-g{group:03d}-{member}" for group in range(2) for member in range(4)]
        rule = lease_rule(config)
        shares = share(store.traces(run_ids), rule.models, lambda traces, model: build_batch(traces, rule.of(model)))
    plan = BatchPlan(step=1, epoch=0, seed=step_seed(0, 1), run_ids=tuple(run_ids))
    alone.step(plan, shares, version_ids={recorded.MODEL: None})
    assert alone.save(str(folder / "alone"), 1).checkpoint.hash == undisturbed[1][1]


def test_killed_at_two_points_and_continued(setting: tuple[Config, Path], undisturbed: list[tuple[int, str]]) -> None:
    config, folder = setting
    for kill_at in KILLS:
        process = start(config, folder, "killed", kill_at)
        code, out, err = finish(process)
        assert code == -signal.SIGKILL, f"{kill_at}: exit {code}\n{out}{err}"
    code, out, err = finish(start(config, folder, "killed"))
    assert code == 0, out + err
    check(config, "killed", undisturbed)


def test_ctrl_c_finishes_the_step_and_twice_drops_it(
    setting: tuple[Config, Path], undisturbed: list[tuple[int, str]]
) -> None:
    config, folder = setting
    process = start(config, folder, "interrupted")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    code, out, err = finish(process)
    assert code == 130, out + err
    assert "interrupted after step" in out
    process = start(config, folder, "interrupted")
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step "))
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    code, out, err = finish(process)
    assert (code, err) == (130, ""), out + err
    assert finish(start(config, folder, "interrupted"))[0] == 0
    check(config, "interrupted", undisturbed)


@pytest.mark.long
@pytest.mark.skipif(not LONG, reason="TRACEGRAD_LONG=1 runs it")
def test_killed_at_random_moments(setting: tuple[Config, Path], undisturbed: list[tuple[int, str]]) -> None:
    config, folder = setting
    seed = int(os.environ.get("TRACEGRAD_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}: TRACEGRAD_SEED={seed} repeats it")
    rng = random.Random(seed)
    began = time.monotonic()
    assert finish(start(config, folder, "timed"))[0] == 0
    life_s = time.monotonic() - began  # so long is a life on this machine now: moments are drawn from all of it
    number = killed = 0
    while killed < 20:
        number += 1
        job = f"random-{number}"
        while killed < 20:
            process = start(config, folder, job)
            try:
                process.communicate(timeout=rng.uniform(0.0, 1.1 * life_s))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
        code, out, err = finish(start(config, folder, job))
        assert code == 0, f"seed {seed}: {job}: {out}{err}"
        check(config, job, undisturbed)
        shutil.rmtree(Path(config.trainer.output) / job)
