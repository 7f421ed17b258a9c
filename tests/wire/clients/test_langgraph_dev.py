"""LangGraph's development server under `tracegrad run`: each request of its HTTP API is a run of its own."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import other_clients
from client_programs import Served, check_graph, under_tracegrad, words

from tracegrad.adapters.serving import free_port

APP = {"assistant_id": "towns"}


@contextmanager
def _dev_server(served: Served, folder: Path) -> Iterator[str]:
    """`langgraph dev`, as its documentation starts it: with its watcher, which runs the server in a child."""
    shutil.copy(other_clients.CLIENTS / "graph_app.py", folder)
    (folder / "langgraph.json").write_text(
        json.dumps({"dependencies": ["."], "graphs": {"towns": "./graph_app.py:graph"}})
    )
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        str(Path(other_clients.python()).parent / "langgraph"),
        "dev",
        "--no-browser",
        "--port",
        url.split(":")[2],
    ]
    asked = under_tracegrad(served, "--", *command, "--n-jobs-per-worker", "4")
    environ = other_clients.environ(LANGGRAPH_CLI_NO_ANALYTICS="1")
    log = folder / "dev.log"
    with log.open("w") as out:
        server = subprocess.Popen(asked, cwd=folder, env=environ, stdout=out, stderr=out, start_new_session=True)
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/ok")
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < give_up, log.read_text()[-4000:]
                time.sleep(0.05)
        yield url
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    complaints = [line for line in log.read_text().splitlines() if re.search(r"\btracegrad(\.\w+|:)", line)]
    assert complaints == []


async def _ask(url: str) -> dict[str, Any]:
    """The ways that its API has to run a graph: four at once, then one that fails. Returns what each answered."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def without_thread(town: str) -> Any:
            return (await client.post("/runs/wait", json={**APP, "input": {"question": town}})).json()

        async def in_a_thread(town: str) -> Any:
            thread = (await client.post("/threads", json={})).json()["thread_id"]
            asked = {**APP, "input": {"question": town}}
            return (await client.post(f"/threads/{thread}/runs/wait", json=asked)).json()

        async def in_the_background(town: str) -> Any:
            thread = (await client.post("/threads", json={})).json()["thread_id"]
            asked = {**APP, "input": {"question": town}}
            started = (await client.post(f"/threads/{thread}/runs", json=asked)).json()
            return (await client.get(f"/threads/{thread}/runs/{started['run_id']}/join")).json()

        async def streamed(town: str) -> Any:
            asked = {**APP, "input": {"question": town}, "stream_mode": ["values", "messages-tuple"]}
            text = (await client.post("/runs/stream", json=asked)).text
            events = [event.splitlines() for event in text.replace("\r", "").split("\n\n")]
            values = [lines[1].removeprefix("data: ") for lines in events if lines and lines[0] == "event: values"]
            return json.loads(values[-1])

        ways = {"Oslo": without_thread, "Rome": in_a_thread, "Bonn": in_the_background, "Kiel": streamed}
        answers = await asyncio.gather(*(way(town) for town, way in ways.items()))
        return {**dict(zip(ways, answers, strict=True)), "Nowhere": await without_thread("Nowhere")}


def test_each_request_of_the_development_server_is_a_run(served: Served, tmp_path: Path) -> None:
    with _dev_server(served, tmp_path) as url:
        answers = asyncio.run(_ask(url))
    assert answers.pop("Nowhere")["__error__"]["error"] == "LookupError"
    failed, *traces = served.newest(5)
    assert (failed.run.status, failed.run.error) == ("failed", "LookupError: there is no such town")
    by_town = {words(trace.calls[0]).split()[1]: trace for trace in traces}
    assert set(by_town) == set(answers)
    for town, answer in answers.items():
        assert (answer["question"], answer["found"]) == (town, "it is rain in x")
        check_graph(by_town[town], town)
        (graph,) = [span for span in by_town[town].spans if span.kind == "graph" and span.parent_span_id is None]
        assert (graph.name, graph.input) == ("towns", {"question": town})
    assert len({trace.run.run_id for trace in traces}) == 4
    assert served.store.attribution_conflicts() == []
