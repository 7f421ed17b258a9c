"""The whole loop, for real: `make demo`. Real processes, a real model, real questions; at most 20 minutes after set-up.

    set-up      fetch model, corpus and questions; start engine, proxy and trainer (`tracegrad up`)
    before      `tracegrad eval` on the held-out questions
    training    `tracegrad rollout` feeds the trainer until it has done its steps (or the time is up)
    after       `tracegrad eval` again: the last weights, greedily, the same questions
    report      the brevity control, out/demo/{summary.json,curve.png}, a table

Interrupt it at any point and start it again: finished phases are kept as files in out/demo/, training resumes from the
store. Nothing is chosen on the held-out questions. Refuses to report when a part of it failed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from examples.rag_qa import demo_report
from examples.rag_qa.demo_memory import tree_memory_bytes
from examples.rag_qa.demo_processes import (
    ROOT,
    DemoError,
    Ticker,
    check,
    interrupt_on_sigterm,
    run,
    running,
    start,
    stop,
    tail,
)
from examples.rag_qa.fetch import MODEL_FOLDER, cache_root
from examples.rag_qa.questions import write_tasks
from tracegrad.adapters.serving import free_port
from tracegrad.tracestore.config import Config, dump_config, load_config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.store import Store, open_store

RECIPE = Path(__file__).with_name("tracegrad.yaml")
ROLLOUT = "demo"
GROUP_SIZE = 8
CONCURRENCY = 48
AHEAD = 1.5
"""Groups sampled ahead of the trainer, in steps: generation goes on while the trainer works, one step stale at most."""
MAX_EXTRA = 5
"""So many steps' worth of groups are sampled again where failed runs made some too small."""
HELD_OUT = 256
BUDGET_S = 1200.0
"""From the end of set-up to the table. Training stops early if it would not leave time for the last evaluation."""
START_S = 900.0
MEMORY_EVERY_S = 10.0
_FETCH = (sys.executable, "-m", "examples.rag_qa.fetch")
_APP = ["--app", "examples.rag_qa.app:graph", "--reward", "examples.rag_qa.reward:reward"]


class Files:
    """Everything the demo writes."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.base = out / "base"
        self.config = out / "tracegrad.yaml"
        self.store = out / "store.db"
        self.clock = out / "clock.json"
        self.held_out = out / "heldout.jsonl"
        self.before = out / "heldout_before.json"
        self.before_s = out / "heldout_before_s.json"
        self.after = out / "heldout_after.json"
        self.trained = out / "trained.json"
        self.memory = out / "memory.json"
        self.rollouts = out / "rollouts.jsonl"
        self.summary = out / "summary.json"
        self.curve = out / "curve.png"

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"


class Clock:
    """Seconds of the demo over all its starts, kept in a file: `setup` and `work` (everything after set-up)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spent = {"setup": 0.0, "work": 0.0} | (json.loads(path.read_text()) if path.exists() else {})
        self._phase, self._since = "setup", time.monotonic()

    def enter(self, phase: str) -> None:
        self.save()
        self._phase = phase

    def spent(self, phase: str) -> float:
        running_s = time.monotonic() - self._since if phase == self._phase else 0.0
        return float(self._spent[phase]) + running_s

    def save(self) -> None:
        now = time.monotonic()
        self._spent[self._phase] += now - self._since
        self._since = now
        _write(self._path, self._spent)


def live_step(backlog: Mapping[str, Any]) -> int | None:
    """The step of the weights that serve, by what `/tracegrad/v1/backlog` says of the one model; None: none do."""
    (live,) = backlog["live"].values()
    return None if live is None else int(live["step"])


class Demo:
    """One start of the demo. Each phase does nothing where its file is there already."""

    def __init__(self, out: Path, steps: int | None) -> None:
        self.files = Files(out)
        out.mkdir(parents=True, exist_ok=True)
        self.clock = Clock(self.files.clock)
        self._memory_seen_at = float("-inf")
        self.cache = cache_root()
        self.tasks = self._prepare()
        self.config = self._configure(steps)

    def run(self) -> None:
        """Go through the phases."""
        files = self.files
        if not (files.before.exists() and files.trained.exists() and files.after.exists()):
            up = ["up", "--config", str(files.config)]
            if files.trained.exists():
                up.append("--no-train")
            _say("starting engine, proxy and trainer (the engine loads for about a minute)")
            with running(up, files.log("up")) as process:
                self._wait_until_live(lambda: check(process, "tracegrad up", files.log("up")))
                self.clock.enter("work")
                self._evaluate("before", files.before)
                self._train(lambda: check(process, "tracegrad up", files.log("up")))
                self._evaluate("after", files.after)
        self.clock.enter("work")
        self._report()

    # -- set-up

    def _prepare(self) -> dict[str, Path]:
        _say(f"data (kept in {self.cache})")
        # In a process of its own: turning the model into its format takes 0.6 GB, which would stay with the demo.
        if subprocess.run([*_FETCH, "--cache", str(self.cache)], cwd=ROOT, stdout=sys.stderr, check=False).returncode:
            raise DemoError("the data could not be fetched; the message is above")
        tasks = write_tasks(self.cache / "tasks", self.cache, _say)
        lines = tasks["heldout"].read_text(encoding="utf-8").split("\n")[:HELD_OUT]
        self.files.held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        base = self.files.base
        if not base.exists():
            partial = base.with_name(".base")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.cache / MODEL_FOLDER, partial)
            partial.rename(base)
        return tasks

    def _configure(self, steps: int | None) -> Config:
        """Write the recipe with free ports; a resumed demo keeps its own settings but for the ports."""
        existing = self.files.config
        config = load_config(existing if existing.exists() else RECIPE)
        main = msgspec.structs.replace(
            config.models["main"],
            checkpoint=str(self.files.base),
            engine=msgspec.structs.replace(config.models["main"].engine, url=f"http://127.0.0.1:{free_port()}"),
        )
        trainer = msgspec.structs.replace(config.trainer, output=str(self.files.out))
        if steps is not None:
            trainer = msgspec.structs.replace(trainer, steps=steps)
        config = msgspec.structs.replace(
            config,
            store=f"sqlite:///{self.files.store}",
            models={"main": main},
            proxy=msgspec.structs.replace(config.proxy, port=free_port()),
            trainer=trainer,
        )
        existing.write_text(dump_config(config))
        return config

    def _wait_until_live(self, alive: Callable[[], None]) -> None:
        """Wait until the proxy answers and the weights that should be served are live."""
        ticker, started = Ticker(), time.monotonic()
        while True:
            alive()
            state = self._backlog()
            if state is not None and not state["publishing"] and live_step(state) is not None:
                ticker.show(f"ready after {time.monotonic() - started:.0f} s", now=True)
                return
            if time.monotonic() - started > START_S:
                log = self.files.log("up")
                raise DemoError(f"nothing was live after {START_S:.0f} s; see {log}\n{tail(log)}")
            what = "engine" if state is None else "trainer (it publishes and checks the first weights)"
            ticker.show(f"waiting for the {what}: {time.monotonic() - started:.0f} s")
            time.sleep(0.5)

    def _backlog(self) -> dict[str, Any] | None:
        url = f"http://{self.config.proxy.host}:{self.config.proxy.port}/tracegrad/v1/backlog"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except (OSError, ValueError):
            return None

    # -- phases

    def _evaluate(self, name: str, out: Path) -> None:
        if out.exists():
            return
        began = self.clock.spent("work")
        _say(f"held-out questions, {name} training ({HELD_OUT} questions, two calls each)")
        arguments = ["eval", *_APP, "--config", str(self.files.config), "--tasks", str(self.files.held_out)]
        arguments += ["--concurrency", str(CONCURRENCY), "--out", str(out)]
        run(arguments, f"the evaluation {name} training", self.files.log("eval"))
        self.clock.save()
        report = json.loads(out.read_text())["report"]
        if report["greedy"] is False:
            raise DemoError(f"{out} holds sampled answers: an evaluation must be greedy")
        spent = self.clock.spent("work") - began
        _say(f"    F1 {report['scores']['f1']['mean']:.3f} in {spent:.0f} s")
        if name == "before":
            _write(self.files.before_s, spent)

    def _train(self, alive: Callable[[], None]) -> None:
        if self.files.trained.exists():
            return
        steps = self.config.trainer.steps
        _say(f"training: up to {steps} steps of {self.config.trainer.batch.groups} questions x {GROUP_SIZE} samples")
        ticker, extra = Ticker(), 0
        store = open_store(self.config.store, create=False)
        rollout = self._start_rollout(extra)
        try:
            while not self._finished(store, ticker):
                alive()
                if rollout.poll() == 0 and self._starved():
                    extra += 1
                    if extra > MAX_EXTRA:
                        raise DemoError(
                            f"the trainer finds too few groups ready: {store.consumption(self.config.trainer.job)}"
                        )
                    rollout = self._start_rollout(extra)
                elif rollout.poll() not in (None, 0):
                    check(rollout, "tracegrad rollout", self.files.log("rollout"))
                self.clock.save()
                self._watch_memory()
                time.sleep(1.0)
        finally:
            stop(rollout)
            store.close()
        self._settle(alive)
        _write(self.files.trained, {"step": self._live_step()})

    def _watch_memory(self) -> None:
        """Keep the most memory that was seen, of all starts; a look every 10 s."""
        if time.monotonic() - self._memory_seen_at < MEMORY_EVERY_S:
            return
        self._memory_seen_at = time.monotonic()
        known = json.loads(self.files.memory.read_text()) if self.files.memory.exists() else 0
        _write(self.files.memory, max(known, tree_memory_bytes() or 0))

    def _start_rollout(self, extra: int) -> Any:
        """Sample what the steps take; `extra` more steps' worth where failed runs made groups too small."""
        groups = self.config.trainer.batch.groups
        arguments = ["rollout", *_APP, "--config", str(self.files.config), "--tasks", str(self.tasks["train"])]
        arguments += ["--name", ROLLOUT, "--group", str(GROUP_SIZE), "--concurrency", str(CONCURRENCY), "--json"]
        arguments += [
            "--groups",
            str((self.config.trainer.steps + extra) * groups),
            "--ahead",
            str(int(groups * AHEAD)),
        ]
        return start(arguments, self.files.log("rollout"), stdout=self.files.rollouts)

    def _finished(self, store: Store, ticker: Ticker) -> bool:
        """Show where training is; True when its steps are done, or when the time that is left is the evaluation's."""
        last = store.last_checkpoint(self.config.trainer.job)
        step, steps = (last.step if last else 0), self.config.trainer.steps
        spent = self.clock.spent("work")
        roles = last.metrics.get("roles", {}) if last else {}
        rewards = "  ".join(f"{role} {values['reward']:.3f}" for role, values in sorted(roles.items()))
        left = f"{(steps - step) * (spent - self._before_s()) / step / 60:.1f} min left" if step else "first step"
        ticker.show(f"step {step}/{steps}  {rewards}  {spent / 60:.1f} min, {left}")
        if step >= steps:
            ticker.show(f"step {step}/{steps}  {rewards}  done", now=True)
            return True
        if spent > BUDGET_S - 1.5 * self._before_s() - 45.0 and step > 0:
            ticker.show(f"the time is up after step {step} of {steps}", now=True)
            return True
        return False

    def _before_s(self) -> float:
        return float(json.loads((self.files.before_s).read_text()))

    def _starved(self) -> bool:
        """The rollout has ended and what it left is less than a step takes."""
        state = self._backlog()
        need = self.config.trainer.batch.groups
        return (
            state is not None
            and not state["publishing"]
            and not state["leased_groups"]
            and state["ready_groups"] < need
        )

    def _settle(self, alive: Callable[[], None]) -> None:
        """Wait until the trainer's last step is live and nothing more can start."""
        while True:
            state = self._backlog()
            busy = state is None or state["publishing"] or state["leased_groups"]
            done = state is not None and live_step(state) == self._last_step()
            if not busy and done:
                return
            alive()
            time.sleep(0.5)

    def _last_step(self) -> int:
        store = open_store(self.config.store, create=False)
        try:
            last = store.last_checkpoint(self.config.trainer.job)
            return last.step if last else 0
        finally:
            store.close()

    def _live_step(self) -> int:
        state = self._backlog()
        live = None if state is None else live_step(state)
        return self._last_step() if live is None else live

    def _report(self) -> None:
        files, job = self.files, self.config.trainer.job
        before, after = (demo_report.read_answers(path) for path in (files.before, files.after))
        held_out = demo_report.compare(before, after, demo_report.read_golds(files.held_out))
        metrics = demo_report.read_lines(files.out / job / "metrics.jsonl")
        seconds = {
            "setup": self.clock.spent("setup"),
            "generate": sum(s["seconds"] - s["seconds_waiting"] for s in demo_report.read_lines(files.rollouts)),
            "total": self.clock.spent("setup") + self.clock.spent("work"),
        }
        store = open_store(self.config.store, create=False)
        try:
            peak = json.loads(files.memory.read_text()) if files.memory.exists() else None
            summary = demo_report.summarise(
                store, self.config, metrics, held_out, seconds=seconds, peak_memory_bytes=peak
            )
        finally:
            store.close()
        demo_report.draw(files.curve, metrics, held_out)
        _write(files.summary, summary)
        demo_report.print_table(summary, before, after)
        print(f"\nwrote {files.summary} and {files.curve}")


def _write(path: Path, value: Mapping[str, Any] | float) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the whole loop on a small model and real questions.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    interrupt_on_sigterm()
    demo: Demo | None = None
    try:
        demo = Demo(arguments.out.resolve(), arguments.steps)
        demo.run()
    except KeyboardInterrupt:
        _say("\ninterrupted: start it again to go on where it stopped")
        return 130
    except (DemoError, TraceStoreError) as error:
        _say(f"demo: {error}")
        return 1
    finally:
        if demo is not None:
            demo.clock.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
