"""`tracegrad run -- CMD`: an unmodified program in a process of its own, from outside."""

import ast
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tracegrad.adapters.launch import INJECT, environment, proxy_root

APP = """
    import sys
    from typing import TypedDict
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, StateGraph

    assert "tracegrad.adapters.client" not in sys.modules or "langgraph.pregel.main" in sys.modules

    class State(TypedDict):
        question: str
        answer: str

    model = ChatOpenAI(model="m")

    def answerer(state):
        if state["question"] == "bad":
            raise LookupError("nothing found")
        return {"answer": model.invoke(state["question"]).content}

    inner = StateGraph(State).add_node("inner", answerer).add_edge(START, "inner").compile()
    graph = StateGraph(State).add_node("answerer", inner).add_edge(START, "answerer").compile()

    if __name__ == "__main__":
        print(graph.invoke({"question": "one"})["answer"])
        print([part["answer"] for part in graph.batch([{"question": "two"}, {"question": "three"}])])
        print(model.invoke("outside").content)
        try:
            graph.invoke({"question": "bad"})
        except LookupError as error:
            print(error)
"""


def _script(folder: Path, text: str) -> str:
    path = folder / "app.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def _run(proxy: Any, *arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tracegrad.adapters.cli", "run", "--proxy", proxy.root, *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACEGRAD_", "OPENAI_"))}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean | (env or {}), check=False)


def test_an_unmodified_program_end_to_end(proxy: Any, tmp_path: Path) -> None:
    done = _run(proxy, "--purpose", "train", "--", sys.executable, _script(tmp_path, APP))
    assert done.stderr == ""
    said = ["echo: one", "['echo: two', 'echo: three']", "echo: outside", "nothing found"]
    assert (done.returncode, done.stdout.splitlines()) == (0, said)
    by_question = {call.said: call for call in proxy.calls}
    outside = by_question.pop("outside")
    assert (outside.run_id, outside.role, outside.source) == (None, None, None)
    assert {(call.role, call.source, call.span["name"]) for call in by_question.values()} == {
        ("answerer", "hook", "inner")
    }
    assert len({call.run_id for call in by_question.values()}) == 3
    assert {run["purpose"] for run in proxy.runs.values()} == {"train"}
    ends = [(run["status"], run["ended_by"], run["error"]) for run in proxy.runs.values()]
    assert sorted(ends, key=str) == [("closed", "hook", None)] * 3 + [("failed", "hook", "LookupError: nothing found")]


def test_one_run_spans_the_program(proxy: Any, tmp_path: Path) -> None:
    text = """
        import os, threading, httpx

        def call():
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            httpx.post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json=body)

        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    """
    done = _run(proxy, "--one-run", "--role", "solo", "--", sys.executable, _script(tmp_path, text))
    assert done.returncode == 0, done.stderr
    run = proxy.only_run()
    assert (run["status"], run["ended_by"]) == ("closed", "explicit")
    assert [call.path for call in proxy.calls] == [f"/run/{run['run_id']}/role/solo/v1/chat/completions"] * 2
    assert [(call.run_id, call.role) for call in proxy.calls] == [(None, None)] * 2, "the path says it"


def test_in_one_run_graphs_open_none_of_their_own(proxy: Any) -> None:
    code = (
        "import sys; from tracegrad.adapters.attach import attach\n"
        f"attach({{'TRACEGRAD_PROXY': {proxy.root!r}, 'TRACEGRAD_RUN': 'r'}})\n"
        "print([finder.name for finder in sys.meta_path if hasattr(finder, 'callback')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = ["concurrent.futures.thread", "httpx", "httpx2", "langchain_core.tracers.context"]
    assert sorted(ast.literal_eval(done.stdout)) == expected


def test_the_spans_of_one_run_are_posted_before_the_program_ends(proxy: Any, tmp_path: Path) -> None:
    done = _run(proxy, "--one-run", "--", sys.executable, _script(tmp_path, APP))
    assert (done.returncode, done.stderr) == (0, "")
    (spans,) = proxy.spans.values()
    told = sorted(f"{span['kind']} {span['name']}" for span in spans.values())
    assert told == ["graph LangGraph"] * 8 + ["node answerer"] * 4 + ["node inner"] * 4
    assert all(span["ended_at"] for span in spans.values())


def test_the_exit_code_is_passed_on_and_fails_the_run(proxy: Any) -> None:
    done = _run(proxy, "--one-run", "--", sys.executable, "-c", "import sys; sys.exit(7)")
    assert (done.returncode, done.stderr) == (7, "")
    assert (proxy.only_run()["status"], proxy.only_run()["error"]) == ("failed", "exit code 7")
    assert _run(proxy, "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").returncode == 128 + 9


@pytest.mark.parametrize(
    ("command", "code", "says"), [("no-such-command", 127, "no command"), ("/", 126, "cannot start")]
)
def test_a_command_that_cannot_start_is_plain(proxy: Any, command: str, code: int, says: str) -> None:
    done = _run(proxy, "--one-run", "--", command)
    assert done.returncode == code
    assert done.stderr.startswith("tracegrad: ") and says in done.stderr and done.stderr.count("\n") == 1
    assert proxy.only_run()["status"] == "failed"


def test_a_proxy_that_is_away_is_said_before_the_program_starts(tmp_path: Path) -> None:
    class Away:
        root = "http://127.0.0.1:1"

    done = _run(Away, "--", sys.executable, "-c", "print('started')")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no proxy answers at http://127.0.0.1:1" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_program(proxy: Any, tmp_path: Path, number: signal.Signals) -> None:
    script = _script(
        tmp_path,
        """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(44))
        print("ready", flush=True)
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            sys.exit(33)
        """,
    )
    command = [
        sys.executable,
        "-m",
        "tracegrad.adapters.cli",
        "run",
        "--proxy",
        proxy.root,
        "--",
        sys.executable,
        script,
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(0.05)
    child.send_signal(number)
    assert child.wait(timeout=20) == {signal.SIGINT: 33, signal.SIGTERM: 44}[number]
    child.stdout.close()


def test_a_sitecustomize_of_the_environment_still_runs(proxy: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.theirs = __file__\n")
    code = (
        "import builtins, sys, httpx\n"
        "print(getattr(builtins, 'theirs', None), getattr(sys.modules.get('sitecustomize'), '__file__', None))\n"
        "print(hasattr(httpx.Client.send, '__tracegrad_hook__'))"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    theirs = str(tmp_path / "sitecustomize.py")
    assert _run(proxy, "--", sys.executable, "-c", code, env=env).stdout.splitlines() == [f"{theirs} {theirs}", "True"]
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('theirs is broken')\n")
    done = _run(proxy, "--", sys.executable, "-c", code, env=env)
    assert "theirs is broken" in done.stderr
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr


def test_a_python_without_tracegrad_says_so_and_runs(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(INJECT), "TRACEGRAD_PROXY": "http://127.0.0.1:1", "PATH": os.environ["PATH"]}
    code = "import sitecustomize; print('ran')"
    python = Path(sys.base_prefix) / "bin" / Path(sys.executable).name
    if not python.exists():
        pytest.skip("no interpreter without tracegrad here")
    done = subprocess.run([str(python), "-S", "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "ran\n"
    assert "has no module 'tracegrad" in done.stderr and done.stderr.count("\n") == 1


def test_start_up_stays_light(proxy: Any) -> None:
    heavy = ["httpx", "httpx2", "http", "asyncio", "msgspec", "sqlalchemy", "aiohttp", "langchain_core", "click"]
    code = f"import sys; print([m for m in sys.modules if m.startswith('tracegrad.') or m in {heavy}])"
    done = _run(proxy, "--", sys.executable, "-c", code)
    rooms = {"attach", "caller", "chain_callers", "errors", "hook", "import_hook", "scope", "thread_scopes"}
    expected = {f"tracegrad.adapters.{name}" for name in rooms} | {"tracegrad.adapters"}
    assert set(ast.literal_eval(done.stdout)) == expected


def test_the_environment_points_at_the_proxy_and_keeps_what_was_set() -> None:
    root = "http://127.0.0.1:9"
    bare = environment({}, root)
    assert bare["OPENAI_BASE_URL"] == bare["OPENAI_API_BASE"] == root + "/v1"
    assert (bare["OPENAI_API_KEY"], bare["TRACEGRAD_PROXY"]) == ("tracegrad", root)
    assert bare["PYTHONPATH"] == str(INJECT) and not {"TRACEGRAD_RUN", "TRACEGRAD_ROLE", "NO_PROXY"} & set(bare)
    given = {"OPENAI_API_KEY": "k", "PYTHONPATH": f"{INJECT}{os.pathsep}/x", "TRACEGRAD_RUN": "old"}
    full = environment(given | {"HTTP_PROXY": "http://p", "NO_PROXY": "a"}, root, run_id="r", role="planner")
    assert full["OPENAI_BASE_URL"] == full["OPENAI_API_BASE"] == root + "/run/r/role/planner/v1"
    assert environment({}, root, role="a/b c")["OPENAI_BASE_URL"] == root + "/role/a%2Fb%20c/v1"
    assert (full["OPENAI_API_KEY"], full["TRACEGRAD_RUN"], full["TRACEGRAD_ROLE"]) == ("k", "r", "planner")
    assert full["PYTHONPATH"] == f"{INJECT}{os.pathsep}/x"
    assert full["NO_PROXY"] == full["no_proxy"] == "a,127.0.0.1"
    assert "TRACEGRAD_RUN" not in environment(given, root)


def test_where_the_proxy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "other.yaml"
    config.write_text("proxy: {host: 0.0.0.0, port: 9999}\n")
    environ = {"TRACEGRAD_PROXY": "http://env:1"}
    assert proxy_root("http://option:1", str(config), environ) == "http://option:1"
    assert proxy_root(None, None, environ) == "http://env:1"
    assert proxy_root(None, str(config), environ) == "http://127.0.0.1:9999"
    assert proxy_root(None, None, {}) == "http://127.0.0.1:8080"
    (tmp_path / "tracegrad.yaml").write_text("proxy: {port: 9998}\n")
    assert proxy_root(None, None, {}) == "http://127.0.0.1:9998"
    assert proxy_root(None, None, environ) == "http://env:1"
    assert proxy_root(None, str(config), environ) == "http://127.0.0.1:9999"
