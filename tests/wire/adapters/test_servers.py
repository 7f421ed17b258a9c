"""`tracegrad run` around servers: one graph and one base_url for all, each request's invocation a run of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from tracegrad.adapters.serving import free_port

GRAPH = """
    import asyncio
    from typing import TypedDict
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, StateGraph

    class State(TypedDict, total=False):
        question: str
        plan: str
        answer: str

    model = ChatOpenAI(model="main")
    MEETING = 4
    waiting, everybody = [], asyncio.Event()

    async def planner(state):
        waiting.append(1)  # the first requests meet here: they are on their way at the same time
        if len(waiting) >= MEETING:
            everybody.set()
        await asyncio.wait_for(everybody.wait(), 20)
        return {"plan": (await model.ainvoke("plan " + state["question"])).content}

    def answerer(state):
        if state["question"] == "bad":
            raise LookupError("nothing found")
        return {"answer": "".join(chunk.content for chunk in model.stream("answer " + state["question"]))}

    builder = StateGraph(State).add_node("planner", planner).add_node("answerer", answerer)
    graph = builder.add_edge(START, "planner").add_edge("planner", "answerer").compile()
"""
ASGI = """
    async def api(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive(); await send({"type": "lifespan.startup.complete"})
            await receive(); await send({"type": "lifespan.shutdown.complete"})
            return
        question = scope["query_string"].decode()
        try:
            said = (await graph.ainvoke({"question": question}))["answer"] if question else "well"
            status = 200
        except LookupError as error:
            said, status = str(error), 500
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": said.encode()})
"""
STARLETTE = """
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def ask(request):
        question = str(request.url.query)
        try:
            said = (await graph.ainvoke({"question": question}))["answer"] if question else "well"
            return PlainTextResponse(said)
        except LookupError as error:
            return PlainTextResponse(str(error), status_code=500)

    api = Starlette(routes=[Route("/", ask)])
"""


@contextmanager
def _server(served: Any, folder: Path, app: str) -> Iterator[str]:
    (folder / "service.py").write_text(textwrap.dedent(GRAPH) + textwrap.dedent(app))
    port = free_port()
    command = [sys.executable, "-m", "tracegrad.adapters.cli", "run", "--proxy", served.root, "--"]
    command += [sys.executable, "-m", "uvicorn", "service:api", "--port", str(port), "--log-level", "warning"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACEGRAD_", "OPENAI_"))}
    server = subprocess.Popen(command, cwd=folder, env=clean, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}/"
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < give_up, server.stderr and server.stderr.read()
                time.sleep(0.05)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=30)
    assert "Traceback" not in said, said


def test_each_request_of_a_service_is_a_run(served: Any, tmp_path: Path) -> None:
    app = STARLETTE if find_spec("starlette") is not None else ASGI
    words = [f"w{number}x" for number in range(8)]

    async def ask_all(url: str) -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            answers = await asyncio.gather(*(client.get(url + "?" + word) for word in words))
        return [answer.text for answer in answers]

    with _server(served, tmp_path, app) as url:
        assert asyncio.run(ask_all(url)) == [f"0: answer {word}" for word in words]
        assert httpx.get(url + "?bad", timeout=60).status_code == 500
    failed, *runs = [served.store.trace(summary.run.run_id) for summary in served.store.list_runs(limit=9)]
    assert (failed.run.status, failed.run.error) == ("failed", "LookupError: nothing found")
    for trace in runs:
        assert (trace.run.status, trace.run.ended_by) == ("closed", "hook")
        assert [call.attribution.role for call in trace.calls] == ["planner", "answerer"]
        asked = [call.request["messages"][0]["content"].split()[1] for call in trace.calls]
        assert len(set(asked)) == 1, "a run holds the calls of one request"
        words.remove(asked[0])
        assert [f"{span.kind} {span.name}" for span in trace.spans] == [
            "graph LangGraph",
            "node planner",
            "node answerer",
        ]
        assert trace.spans[0].input == {"question": asked[0]}
    assert words == []


def test_a_kernel_that_a_program_starts_is_attached_as_well(served: Any, tmp_path: Path) -> None:
    """As a notebook server does it: the kernel is another Python, told what to run through a pipe."""
    (tmp_path / "service.py").write_text(textwrap.dedent(GRAPH).replace("MEETING = 4", "MEETING = 1"))
    (tmp_path / "notebook.py").write_text(
        textwrap.dedent("""
        import subprocess, sys
        cells = ["import service, asyncio", "print(asyncio.run(service.graph.ainvoke({'question': 'cell'}))['answer'])"]
        kernel = subprocess.run([sys.executable, "-i", "-q"], input="\\n".join(cells) + "\\n", text=True,
                                capture_output=True, check=True)
        print(kernel.stdout, end="")
        """)
    )
    command = [
        sys.executable,
        "-m",
        "tracegrad.adapters.cli",
        "run",
        "--proxy",
        served.root,
        "--purpose",
        "train",
        "--",
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACEGRAD_", "OPENAI_"))}
    done = subprocess.run(
        [*command, sys.executable, "notebook.py"], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "0: answer cell\n"), done.stderr
    trace = served.store.trace(served.store.list_runs(limit=1)[0].run.run_id)
    assert (trace.run.status, trace.run.purpose) == ("closed", "train")
    assert [call.attribution.role for call in trace.calls] == ["planner", "answerer"]
