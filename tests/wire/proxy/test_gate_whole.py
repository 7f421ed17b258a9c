"""The gate as a whole over real HTTP: publisher, proxy, evaluator and engines, with users who go on asking meanwhile.

Each checkpoint says one thing to everything, so that every stored call shows which weights really answered it: it must
be those of the version that the call is stored with (law 8), whatever the gate did.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_swaps import save_answers
from versions import add_version
from waits import wait_for

from tracegrad.adapters.app_session import AppSession
from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.control import Control
from tracegrad.adapters.execution import Graph, RunExecutor
from tracegrad.adapters.gate import GateEvaluator
from tracegrad.tracestore.config import GateConfig, GateRule, PublishConfig
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.records import PolicyVersion, Task
from tracegrad.tracestore.store import Store
from tracegrad.trainer import gate as gate_module
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishRejected
from tracegrad.trainer.publish import Publisher
from tracegrad.trainer.publish_report import PublishReport

TASKS = [Task(task_id=f"t{i}", input={"question": f"q{i}"}) for i in range(6)]
APP = '''
import json, os, urllib.request

class App:
    """One model call; `os.environ` names the proxy, as for any app."""

    def invoke(self, given, config):
        body = {"model": "main", "messages": [{"role": "user", "content": given["question"]}]}
        request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode())
        request.add_header("x-tracegrad-run", config["configurable"]["thread_id"])
        with urllib.request.urlopen(request) as response:
            said = json.load(response)["choices"][0]["message"]["content"]
        if "crash" in said:
            raise ValueError("the answer cannot be read")
        return {"answer": said}

graph = App()

def reward(task, output):
    return {"good": float("good" in output["answer"])}
'''


class Whole:
    """Engines, a proxy in front of them, a live version that says "good 0", and a publisher."""

    def __init__(self, start_proxy: Any, store: Store, stack: ExitStack, fake: ModuleType, folder: Path) -> None:
        self.start_proxy, self.store, self.stack, self.fake, self.folder = start_proxy, store, stack, fake, folder
        self.pool = ThreadPoolExecutor(12)
        stack.callback(self.pool.shutdown, wait=False, cancel_futures=True)
        self.says: dict[int, str] = {}
        self.steps = 0

    def start(self, n_engines: int = 1, **gate: Any) -> None:
        rule = GateRule(max_drop=0.1, confidence=0.5)
        settings = {"app": "a:g", "tasks": "t", "reward": "r:f", "score": "good", "rule": rule, "timeout_s": 20.0}
        self.gate = GateConfig(**{**settings, **gate})
        self.publish_config = PublishConfig(drain_timeout_s=10, swap_timeout_s=5, gate=self.gate)
        engines = [
            self.stack.enter_context(self.fake.ServerThread(self.fake.FakeEngine("main"))) for _ in range(n_engines)
        ]
        self.engines = [engine.app for engine in engines]
        for engine in self.engines:
            engine.version = "default"
        self.urls = [engine.url for engine in engines]
        model = {"checkpoint": "none", "engine": {"url": self.urls[0]}, "replicas": self.urls[1:]}
        self.proxy = self.start_proxy(models={"main": model})
        self.live = self.version("good 0")
        self.publisher().publish(self.live.version_id)

    def version(self, answer: str) -> PolicyVersion:
        path = save_answers(self.folder / answer.replace(" ", "-"), answer)
        made = add_version(self.store, path, self.steps, model="main", kind="step")
        self.says[made.version_id] = answer
        self.steps += 1
        return made

    def publisher(self) -> Publisher:
        clients = [EngineClient(url, "main", timeout_s=5) for url in self.urls]
        return Publisher(self.store, "main", clients, self.publish_config)

    def publish(self, answer: str) -> "Future[PublishReport]":
        version = self.version(answer)
        return self.pool.submit(self.publisher().publish, version.version_id)

    @contextmanager
    def evaluator(self, app: Callable[[str], None] = lambda run_id: None) -> Iterator[None]:
        """One in a thread of this process; `app` is called at the start of each run."""
        root = self.proxy.url

        class App:
            def invoke(self, given: dict[str, str], config: Any) -> dict[str, str]:
                run_id = config["configurable"]["thread_id"]
                app(run_id)
                said = ask(f"{root}/run/{run_id}/v1", given["question"])
                if "crash" in said:
                    raise ValueError("the answer cannot be read")
                return {"answer": said}

        control = Control(ProxyClient(root), source="gate", pause_s=0.05)
        executor = RunExecutor(Graph(App(), name="app"), reward, control, proxy=root)
        me = Evaluator(evaluator_id="e", model="main", tasks_hash="t", score="good")
        session = AppSession(executor=executor, control=control)
        made = GateEvaluator(self.store, me, self.gate, TASKS, session, models=["main"], expires_s=10.0)
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def serve() -> None:
            self.task = asyncio.current_task()
            ready.set()
            await made.run()

        def work() -> None:
            try:
                loop.run_until_complete(serve())
            except asyncio.CancelledError:
                return

        thread = threading.Thread(target=work)
        thread.start()
        ready.wait()
        yield
        loop.call_soon_threadsafe(self.task.cancel)  # type: ignore[union-attr]
        thread.join(20)
        self.store.remove_evaluator("e")

    @contextmanager
    def users(self, n: int = 3) -> Iterator[list[str]]:
        """Some who ask one question after the other, each in a run of its own; yields what they were told."""
        over, told = threading.Event(), list[str]()

        def one(who: int) -> None:
            turn = 0
            while not over.is_set():
                told.append(ask(f"{self.proxy.url}/run/user-{who}-{turn // 2}/v1", "hello"))
                turn += 1
                time.sleep(0.01)

        asking = [self.pool.submit(one, who) for who in range(n)]
        yield told
        over.set()
        for each in asking:
            each.result(20)

    def check_calls(self) -> None:
        """Every call was answered by the weights of the version that is stored with it."""
        assert [engine.swapped_under_calls for engine in self.engines] == [0] * len(self.engines)
        runs = [summary.run.run_id for summary in self.store.list_runs(limit=5_000)]
        found = [call for run_id in runs for call in self.store.trace(run_id).calls if call.status == "complete"]
        assert found
        for call in found:
            assert call.quarantine is None, call.call_id
            assert call.version_dispatched == call.version_completed is not None
            content = call.choices[0].message["content"]
            assert content == self.says[call.version_dispatched], (call.attribution.run_id, content)

    def answer(self) -> str:
        return ask(f"{self.proxy.url}/run/last-{time.monotonic_ns()}/v1", "hello")


def ask(base: str, text: str) -> str:
    body = {"model": "main", "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        said: str = json.load(response)["choices"][0]["message"]["content"]
    return said


def reward(task: Task, output: Any) -> dict[str, float]:
    return {"good": float("good" in output["answer"])}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "POLL_S", 0.02)


@pytest.fixture
def whole(start_proxy: Any, store: Store, stack: ExitStack, fake: ModuleType, tmp_path: Path) -> Whole:
    return Whole(start_proxy, store, stack, fake, tmp_path)


def test_one_engine_what_passes_serves_and_what_does_not_never_reaches_a_user(whole: Whole) -> None:
    whole.start()
    with whole.evaluator(), whole.users() as told:
        good = whole.publish("good 1").result(30)
        with pytest.raises(PublishRejected, match="good differs by -1 from the live version's over 6 tasks"):
            whole.publish("bad 2").result(30)
        broken = whole.publish("crash 3")
        with pytest.raises(PublishRejected, match="none of its 6 runs has the score 'good'"):
            broken.result(30)
        assert whole.answer() == "good 1"
    assert good.decision is not None and good.decision.passed
    assert set(told) <= {"good 0", "good 1"}, "users never met what was being judged, or was judged badly"
    assert [p.state for p in whole.store.list_publishes("main")] == ["live", "live", "rejected", "rejected"]
    assert [engine.swapped_in for engine in whole.engines] == [
        ["good-0", "good-1", "bad-2", "good-1", "crash-3", "good-1"]
    ]
    found = whole.store.list_evaluations("main")
    assert [(whole.says[e.version_id], e.mean, e.n_failed, e.publish_id) for e in found] == [
        ("good 0", 1.0, 0, None),
        ("good 1", 1.0, 0, 2),
        ("bad 2", 0.0, 0, 3),
        ("crash 3", None, 6, 4),
    ]
    assert {s.run.purpose for s in whole.store.list_runs(limit=500) if s.run.run_id.startswith("gate")} == {"eval"}
    whole.check_calls()


def test_with_a_share_of_one_users_get_the_candidate_and_lose_it_again(whole: Whole) -> None:
    whole.start(share=1.0)
    with whole.evaluator(lambda run_id: time.sleep(0.05)), whole.users() as told:
        with pytest.raises(PublishRejected):
            whole.publish("bad 1").result(30)
        assert whole.answer() == "good 0"
    assert set(told) == {"good 0", "bad 1"}
    whole.check_calls()


def test_two_replicas_serve_while_one_is_judged(whole: Whole) -> None:
    whole.start(n_engines=2, share=0.5)
    with whole.evaluator(lambda run_id: time.sleep(0.05)), whole.users(4) as told:
        with pytest.raises(PublishRejected):
            whole.publish("bad 1").result(30)
        met = set(told)
        report = whole.publish("good 2").result(30)
        assert whole.answer() == "good 2"
    assert met == {"good 0", "bad 1"}, "a share of the runs met the candidate"
    assert report.decision is not None and report.decision.passed
    assert [engine.swapped_in for engine in whole.engines] == [
        ["good-0", "good-2"],
        ["good-0", "bad-1", "good-0", "good-2"],
    ]
    whole.check_calls()


def test_a_judgement_that_does_not_come_in_time_fails_closed(whole: Whole) -> None:
    whole.start(timeout_s=4.0)  # in which what is live must be evaluated, on a busy machine too
    let_go = threading.Event()

    def hangs(run_id: str) -> None:
        if run_id.startswith("gate"):
            let_go.wait(20)

    with whole.evaluator(hangs), whole.users() as told:
        with pytest.raises(PublishRejected, match="it was not evaluated within 4 s") as caught:
            whole.publish("good 1").result(30)
        assert whole.answer() == "good 0"
        let_go.set()
    assert not caught.value.decision.judged
    assert set(told) == {"good 0"}
    assert [e.publish_id for e in whole.store.list_evaluations("main")] == [None], "what came too late is dropped"
    whole.check_calls()


def test_a_killed_evaluator_rejects_what_it_had_in_hand_and_the_next_one_goes_on(
    whole: Whole, tmp_path: Path, store_url: str
) -> None:
    """`tracegrad gate` as a process of its own, killed with -9 in the middle of an evaluation."""
    whole.start(timeout_s=6.0)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"id": t.task_id, "input": t.input}) + "\n" for t in TASKS))
    config = {
        "store": store_url,
        "models": {"main": {"checkpoint": "none", "engine": {"url": whole.urls[0]}}},
        "trainer": {
            "publish": {
                "gate": {
                    "app": "app.py:graph",
                    "tasks": "held.jsonl",
                    "reward": "app.py:reward",
                    "score": "good",
                    "rule": {"max_drop": 0.1, "confidence": 0.5},
                }
            }
        },
    }
    (tmp_path / "tracegrad.yaml").write_text(json.dumps(config))
    code = "from tracegrad.adapters.gate_command import gate; gate()"
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "tracegrad.yaml"), "--proxy", whole.proxy.url]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)

    first = start()
    assert first.stdout is not None
    assert json.loads(first.stdout.readline())["mean"] == 1.0, "the live version's"
    engine = whole.engines[0]
    engine.gate = threading.Event()
    publishing = whole.publish("good 1")
    wait_for(lambda: engine.in_flight > 0, "the evaluation asks", 20)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    engine.gate.set()
    engine.gate = None
    with pytest.raises(PublishRejected, match="it was not evaluated within 6 s"):
        publishing.result(30)
    assert whole.answer() == "good 0"
    assert whole.store.open_gate_runs(), "what it was at is left open"
    whole.store.remove_evaluator(whole.store.living_evaluators("main", 100)[0].evaluator_id)
    second = start()
    assert second.stdout is not None
    wait_for(lambda: not whole.store.open_gate_runs(), "what the first was at is ended", 20)
    assert whole.publish("good 2").result(30).decision.passed  # type: ignore[union-attr]
    second.send_signal(signal.SIGTERM)
    assert second.wait(20) == 0
    second.stdout.close()
    assert whole.store.living_evaluators("main", 100) == []
    whole.check_calls()


def test_a_pin_and_its_end_by_command(whole: Whole, tmp_path: Path, store_url: str) -> None:
    """The pinned version answers whatever is published; taking the pin off publishes the newest, through the gate."""
    from click.testing import CliRunner

    from tracegrad.trainer.pin_command import pin
    from tracegrad.trainer.versions_command import rollback

    whole.start()
    path = tmp_path / "tracegrad.yaml"
    gate = {"app": "a:g", "tasks": "t", "reward": "r:f", "score": "good", "rule": {"max_drop": 0.1, "confidence": 0.5}}
    model = {"checkpoint": "none", "engine": {"url": whole.urls[0]}}
    raw = {"store": store_url, "models": {"main": model}, "trainer": {"output": "out", "publish": {"gate": gate}}}
    path.write_text(json.dumps(raw))

    def run(command: Any, *arguments: str) -> SimpleNamespace:
        done = CliRunner().invoke(command, [*arguments, "--config", str(path)])
        return SimpleNamespace(code=done.exit_code, said=done.output)

    with whole.evaluator():
        whole.publish("good 1").result(30)
        done = run(pin, str(whole.live.version_id))
        assert (done.code, "is held at version 1" in done.said) == (0, True)
        assert whole.answer() == "good 0"
        with pytest.raises(Exception, match="pinned at version 1"):
            whole.publish("good 2").result(30)
        assert run(rollback, "1").said == "error: version 1 is live already\n"
        done = run(pin, "--off", "--json")
        assert json.loads(done.said)["published"] == 3
        assert whole.answer() == "good 2"
        assert run(pin, "--off").said == "error: model 'main' is not pinned\n"
        bad = whole.version("bad 3")
        refused = run(pin, str(bad.version_id))
        assert (refused.code, "was rejected by the gate" in refused.said) == (1, True)
        assert whole.store.pinned("main") is None
        assert run(pin, "2").code == 0
        done = run(rollback, "1")
        assert (done.code, whole.store.pinned("main")) == (0, 1), "the pin moves along"
        assert whole.answer() == "good 0"
    assert run(pin).code == 2
    whole.check_calls()
