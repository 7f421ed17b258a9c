"""Children of `up`: order, restarts, giving up, stopping in reverse, and no orphan even after SIGKILL."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from versions import add_version
from waits import gone, wait_for

from tracegrad.adapters.serving import free_port
from tracegrad.adapters.supervisor import ChildGaveUp, ChildSpec, Event, RestartPolicy, Supervisor, supervise
from tracegrad.adapters.up import child_specs, event_printer, up
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import open_store

FAST = RestartPolicy(max_restarts=2, first_wait_s=0.01, longest_wait_s=0.02, steady_s=60.0, stop_timeout_s=2.0)


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


def make(specs: list[ChildSpec], tmp_path: Path, events: list[Event], policy: RestartPolicy = FAST) -> Supervisor:
    return Supervisor(specs, log_dir=tmp_path / "logs", policy=policy, emit=events.append, tick_s=0.02)


def kinds(events: list[Event], child: str) -> list[str]:
    return [event.kind for event in events if event.child == child and event.kind != "log"]


def test_a_crashing_child_is_restarted_then_given_up_and_the_others_are_stopped(tmp_path: Path) -> None:
    events: list[Event] = []
    specs = [
        ChildSpec(name="steady", command=shell("exec sleep 60")),
        ChildSpec(name="bad", command=shell("echo boom; exit 3"), ready_urls=("http://127.0.0.1:9/health",)),
    ]
    supervisor = make(specs, tmp_path, events)
    with pytest.raises(
        ChildGaveUp, match=r"bad exited with code 3, 3 times in a row; see .*bad\.log; it last said: boom$"
    ):
        supervisor.start()
    supervisor.stop()
    assert kinds(events, "bad") == ["started", "crashed", "started", "crashed", "started", "gave up"]
    assert kinds(events, "steady") == ["started", "ready", "stopped"]
    assert (tmp_path / "logs" / "bad.log").read_text() == "boom\n" * 3
    assert [event.detail for event in events if event.kind == "log"] == ["boom"] * 3


def test_children_start_in_order_and_stop_in_reverse(tmp_path: Path) -> None:
    events: list[Event] = []
    names = ["engine", "proxy", "train"]
    supervisor = make([ChildSpec(name=name, command=shell("exec sleep 60")) for name in names], tmp_path, events)
    assert supervisor.start()
    supervisor.stop()
    order = [(event.kind, event.child) for event in events if event.kind != "log"]
    starts = [(kind, name) for name in names for kind in ("started", "ready")]
    assert order == starts + [("stopped", name) for name in reversed(names)]
    # -SIGTERM: a keeper that was stopped before it had started its command.
    codes = {event.exit_code for event in events if event.kind == "stopped"}
    assert codes <= {128 + signal.SIGTERM, -signal.SIGTERM}


def test_a_child_that_ignores_the_request_is_killed_with_everything_it_started(tmp_path: Path) -> None:
    events: list[Event] = []
    pids = tmp_path / "pids"
    script = f"trap '' TERM; setsid sleep 61 & echo $! > {pids}; echo $$ >> {pids}; while :; do sleep 0.05; done"
    quick = RestartPolicy(stop_timeout_s=0.3)
    supervisor = make([ChildSpec(name="stubborn", command=shell(script))], tmp_path, events, quick)
    supervisor.start()
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2, "both run")
    grandchild, child = map(int, pids.read_text().split())
    assert not gone(grandchild)
    assert not gone(child)
    supervisor.stop()
    assert gone(child)
    assert gone(grandchild), "a process in a session of its own was left behind"


@pytest.fixture
def handlers_kept() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_kept")
@pytest.mark.parametrize("code", [0, 3, 4])
def test_a_normal_end_of_the_trainer_is_not_a_crash_and_may_end_everything(tmp_path: Path, code: int) -> None:
    events: list[Event] = []
    specs = [
        ChildSpec(name="proxy", command=shell("exec sleep 60")),
        ChildSpec(name="train", command=shell(f"exit {code}"), may_finish=True, final_codes=(0, 3, 4)),
    ]
    assert supervise(make(specs, tmp_path, events), exit_with="train") == code
    assert kinds(events, "train")[-1] == "finished"
    assert kinds(events, "proxy") == ["started", "ready", "stopped"]


@pytest.mark.usefixtures("handlers_kept")
@pytest.mark.parametrize("exit_with", [None, "train"])
def test_without_a_trainer_that_keeps_crashing_the_others_run_on(tmp_path: Path, exit_with: str | None) -> None:
    """Until they are told to stop; that one gave up stays in the exit code."""
    events: list[Event] = []
    specs = [
        ChildSpec(name="proxy", command=shell("exec sleep 60")),
        ChildSpec(
            name="train",
            command=shell("echo no such folder; exit 1"),
            ready_when=lambda _: False,
            may_finish=True,
            spares_others=lambda: True,
        ),
    ]
    supervisor = make(specs, tmp_path, events)
    ran_on: list[bool] = []

    def stop_later() -> None:
        ran_on.append(supervisor.children[0].running)
        threading.Timer(0.5, lambda: (ran_on.append(supervisor.children[0].running), supervisor.request_stop())).start()

    code = supervise(supervisor, exit_with=exit_with, ready=stop_later)
    assert code == 1
    assert kinds(events, "train") == ["started", "crashed", "started", "crashed", "started", "gave up"]
    (gave_up,) = [event for event in events if event.kind == "gave up"]
    assert gave_up.detail.endswith("last said: no such folder; the others run on without it")
    assert ran_on[: 1 if exit_with else 2] == [True] * (1 if exit_with else 2)
    assert kinds(events, "proxy") == ["started", "ready", "stopped"]


UNWELL = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("any_answer", [True, False])
def test_ready_means_well_unless_any_answer_will_do(tmp_path: Path, any_answer: bool) -> None:
    port = str(free_port())
    spec = ChildSpec(
        name="proxy",
        command=(sys.executable, "-c", UNWELL, port),
        ready_urls=(f"http://127.0.0.1:{port}/health",),
        any_answer=any_answer,
        ready_timeout_s=8.0 if any_answer else 0.5,
    )
    events: list[Event] = []
    supervisor = make([spec], tmp_path, events, RestartPolicy(max_restarts=0, stop_timeout_s=2.0))
    try:
        if any_answer:
            assert supervisor.start()
        else:
            with pytest.raises(ChildGaveUp, match=r"proxy not ready after 0\.5 s"):
                supervisor.start()
    finally:
        supervisor.stop()


UP = """
    import sys
    from pathlib import Path
    from tracegrad.adapters.supervisor import ChildSpec, Supervisor, supervise
    from tracegrad.adapters.up import event_printer
    script = "sleep 62 & echo $$ $! > {}/{}; wait"
    specs = [ChildSpec(name=n, command=("/bin/sh", "-c", script.format(sys.argv[1], n))) for n in "ab"]
    sys.exit(supervise(Supervisor(specs, log_dir=Path(sys.argv[1]), emit=event_printer(as_json=True), tick_s=0.02)))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_orphan_is_left_whatever_ends_the_supervisor(tmp_path: Path, number: int, code: int) -> None:
    script = textwrap.dedent(UP)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    files = [tmp_path / "a", tmp_path / "b"]
    wait_for(lambda: all(file.exists() and file.read_text().endswith("\n") for file in files), "all run")
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert len(pids) == 4
    assert not any(gone(pid) for pid in pids)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == code
    wait_for(lambda: all(gone(pid) for pid in pids), "all are gone")
    started = [json.loads(line)["child"] for line in out.splitlines() if json.loads(line)["kind"] == "started"]
    assert started == ["a", "b"]


def test_a_stop_while_a_child_starts_starts_no_other_and_shows_no_earlier_log(tmp_path: Path) -> None:
    """What a child wrote in an earlier life of `up` is not said again while it waits for its turn."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "proxy.log").write_text("the engine is down\n")
    events: list[Event] = []
    nobody = ("http://127.0.0.1:9/health",)
    specs = [
        ChildSpec(name="engine", command=shell("exec sleep 60"), ready_urls=nobody),
        ChildSpec(name="proxy", command=shell("echo new; exec sleep 60")),
    ]
    supervisor = make(specs, tmp_path, events)
    threading.Timer(0.1, supervisor.request_stop).start()
    assert not supervisor.start()
    supervisor.stop()
    assert [(event.kind, event.child) for event in events] == [("started", "engine"), ("stopped", "engine")]


def test_children_that_do_not_depend_on_one_another_start_and_stop_together(tmp_path: Path) -> None:
    """Neither waits for the other to be ready; asked to stop, each waits for the other to be asked as well."""
    events: list[Event] = []
    script = (
        "trap 'touch {0}/asked{1}; while [ ! -e {0}/asked{2} ]; do sleep 0.02; done; exit 0' TERM; "
        "touch {0}/{1}; while :; do sleep 0.02; done"
    )
    specs = [
        ChildSpec(name=str(n), command=shell(script.format(tmp_path, n, 1 - n)), ready_urls=(f"unix:{tmp_path}/s",))
        for n in range(2)
    ]
    with socket.socket(socket.AF_UNIX) as listener:

        def listen_once_both_run() -> None:
            wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), "both run")
            listener.bind(f"{tmp_path}/s")
            listener.listen()

        supervisor = Supervisor(specs, log_dir=None, together=True, policy=FAST, emit=events.append, tick_s=0.02)
        threading.Thread(target=listen_once_both_run, daemon=True).start()
        assert supervisor.start()
        supervisor.stop()
    assert [event.kind for event in events] == ["started"] * 2 + ["ready"] * 2 + ["stopped"] * 2
    assert {event.exit_code for event in events[-2:]} == {0}, (
        "one waited in vain: they were stopped one after the other"
    )


def test_a_json_line_of_a_child_is_not_encoded_twice(capsys: pytest.CaptureFixture[str]) -> None:
    show = event_printer(as_json=True)
    for detail in ('{"message": "call complete"}', "{not json"):
        show(Event(kind="log", child="proxy", detail=detail, at=0.0))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"kind": "log", "child": "proxy", "at": 0.0, "line": {"message": "call complete"}}
    assert second["detail"] == "{not json"


def test_the_commands_follow_the_configuration(tmp_path: Path) -> None:
    engine: dict[str, object] = {"url": "http://127.0.0.1:7001/"}
    raw: dict[str, Any] = {"models": {"main": {"checkpoint": "w", "engine": engine}}, "roles": {"*": "main"}}
    own = child_specs(parse_config(raw), tmp_path / "c.yaml", train=False)
    assert [spec.name for spec in own] == ["engine", "proxy"]
    assert own[0].ready_urls == ("http://127.0.0.1:7001/health",)
    assert own[0].command[-3:] == ("engine", "--config", str(tmp_path / "c.yaml"))
    raw["models"]["main"]["replicas"] = ["http://127.0.0.1:7002"]
    both = child_specs(parse_config(raw), tmp_path / "c.yaml", train=False)
    assert both[0].ready_urls == ("http://127.0.0.1:7001/health", "http://127.0.0.1:7002/health")
    engine["external"] = True
    external = child_specs(parse_config(raw), tmp_path / "c.yaml", train=True)
    assert [spec.name for spec in external] == ["proxy", "train"]
    gate = {"app": "a:g", "tasks": "t.jsonl", "reward": "r:f", "rule": {"minimum": 0.5}}
    raw["trainer"] = {"publish": {"gate": gate}}
    gated = child_specs(parse_config(raw), tmp_path / "c.yaml", train=True)
    assert [spec.name for spec in gated] == ["proxy", "gate", "train"]
    assert gated[-1].final_codes == (0, 3, 4), "a trainer that its gate ended, or that refused a step, stays down"


def test_the_others_do_without_a_trainer_unless_it_left_a_publish_half_done(tmp_path: Path) -> None:
    """Proxies hold every call then: nobody is to think that it serves on."""
    models = {"main": {"checkpoint": "w", "engine": {"external": True}}}
    config = parse_config({"models": models, "roles": {"*": "main"}, "store": f"sqlite:///{tmp_path}/store.db"})
    proxy, trainer = child_specs(config, tmp_path / "c.yaml", train=True)
    assert (proxy.spares_others(), trainer.spares_others()) == (False, False), "no store"
    with closing(open_store(config.store)) as store:
        seen = [trainer.spares_others()]
        version = add_version(store, tmp_path, model="main", kind="step")
        publish = store.request_publish(version.version_id)
        for state in ("draining", "swapping", "failed"):
            store.advance_publish(publish.publish_id, state, error="why" if state == "failed" else None)  # type: ignore[arg-type]
            seen.append(trainer.spares_others())
    assert seen == [True, True, False, True], "what has swapped nothing proxies end by themselves"


def test_the_trainer_is_ready_once_it_can_take_runs(tmp_path: Path) -> None:
    """Not while it loads, nor by what an earlier one left."""
    models = {"main": {"checkpoint": "w", "engine": {"external": True}}}
    config = parse_config({"models": models, "roles": {"*": "main"}, "store": f"sqlite:///{tmp_path}/store.db"})
    ready, began = child_specs(config, tmp_path / "c.yaml", train=True)[-1].ready_when, time.time()
    assert not ready(began), "no store"
    with closing(open_store(config.store)) as store:
        seen = []
        for phase, started in (("waiting", began - 9), ("starting", began), ("loading", began), ("training", began)):
            store.beat_trainer(config.trainer.job, phase, 1, since=began, started=started)  # type: ignore[arg-type]
            seen.append(ready(began))
    assert seen == [False, False, False, True]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"models": {"main": {"checkpoint": "gone"}}},
            r"main.checkpoint: there is no folder /.*/gone; name one",
        ),
        (
            {"models": {"main": {"trained": False, "api": {"url": "http://a/v1", "key_env": "NO_KEY", "model": "m"}}}},
            "names the environment variable NO_KEY, which is not set",
        ),
        (
            {
                "trainer": {
                    "publish": {"gate": {"app": "a:g", "tasks": "gone", "reward": "r:f", "rule": {"minimum": 1}}}
                }
            },
            r"cannot read the task file /.*/gone",
        ),
        ({"proxy": {"host": "0.0.0.0", "access": {"keys": "off"}}}, "0.0.0.0 can be reached from other machines"),
    ],
)
def test_what_a_child_would_refuse_is_said_before_anything_starts(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    external = {"checkpoint": "elsewhere", "engine": {"external": True}}
    path = tmp_path / "tracegrad.yaml"
    path.write_text(json.dumps({"store": "sqlite:///t.db", "models": {"main": external}} | changed))
    refused = CliRunner().invoke(up, ["--config", str(path), "--no-train"])
    assert refused.exit_code == 1
    assert re.search(says, refused.stderr), refused.stderr
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("what", "setting"), [("proxy", "proxy.port"), ("engine", "models.main.engine.url")])
def test_a_second_up_on_the_same_ports_is_told_so_before_anything_starts(
    tmp_path: Path, what: str, setting: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        taken = first.getsockname()[1]
        ports = {"proxy": free_port(), "engine": free_port()} | {what: taken}
        (tmp_path / "w").mkdir()
        model = {"checkpoint": "w", "engine": {"url": f"http://127.0.0.1:{ports['engine']}"}}
        path = tmp_path / "tracegrad.yaml"
        raw = {"store": "sqlite:///t.db", "models": {"main": model}, "proxy": {"port": ports["proxy"]}}
        path.write_text(json.dumps(raw))
        refused = CliRunner().invoke(up, ["--config", str(path), "--no-train"])
    assert refused.exit_code == 1
    assert f"127.0.0.1:{taken} is taken" in refused.stderr and setting in refused.stderr
    assert "`tracegrad up` running already" in refused.stderr
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "w"]


@pytest.mark.parametrize(
    ("host", "asked"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]")]
)
def test_the_proxy_is_asked_where_it_listens(tmp_path: Path, host: str, asked: str) -> None:
    config = parse_config({"proxy": {"host": host, "port": 81}})
    (proxy,) = child_specs(config, tmp_path / "c.yaml", train=False, proxy_options=("--log-format", "json"))
    assert proxy.ready_urls == (f"http://{asked}:81/health",)
    assert proxy.command[-2:] == ("--log-format", "json")
