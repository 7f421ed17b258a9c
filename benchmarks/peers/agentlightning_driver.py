"""Agent Lightning 1.0.2 records calls: what its store does in a second. Run by `store_peers` in a venv of its own.

Its store is a dictionary of lists in the memory of one server process; nothing is written anywhere. Two ways in are
timed. *In process* is what its own proxy does with a finished call: `record_event`, which makes a checked object and
appends it to a list. *HTTP* is the only way in for another process: its client posts the event, which is answered once
it is in the list. Reading is what its trainer does: the events of each run over HTTP, as triplets. An event holds the
request and vLLM's answer, because that is where its triplets are made from.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from agentlightning import __version__
from agentlightning.client import AgentLightningSyncClient
from agentlightning.schemas import RolloutCreate
from agentlightning.server.routes.events import record_event
from agentlightning.server.routes.rollouts import enqueue_rollouts
from driving import CALLS_PER_RUN, drive, folder_and_calls, per_second

READ_RUNS = 64


def event_of(call: dict[str, Any]) -> dict[str, Any]:
    """What its proxy records of a call: the request, and the answer as vLLM sends it."""
    content = [{"token": "word", "logprob": x, "bytes": [119], "top_logprobs": []} for x in call["logprobs"]]
    choice = {"index": 0, "message": call["message"], "logprobs": {"content": content}, "finish_reason": "stop"}
    answer = {"choices": [{**choice, "token_ids": call["token_ids"]}], "prompt_token_ids": call["prompt_ids"]}
    return {"model": "main", "request": call["request"], "response": answer, "http_status": 200, "status": "ok"}


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked = [f"port={port}", "host=127.0.0.1", "key=k", "default_proxy.model_name=main", f"hydra.run.dir={folder}"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "agentlightning.server", *asked], stdout=log, stderr=log, env=os.environ
        )
    return server, f"http://127.0.0.1:{port}"


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError("its server did not start: see server.log")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Rounds:
    """The rounds, against one server and this process's own copy of its store."""

    def __init__(self, url: str, events: list[dict[str, Any]]) -> None:
        self.events = events
        wait_for(url)
        self.client = AgentLightningSyncClient(base_url=url, key="k", timeout=60)

    def play(self, name: str) -> dict[str, float]:
        """Time one round; its runs begin with `name`."""
        alone = f"{name}-alone"
        asyncio.run(enqueue_rollouts([RolloutCreate(input={}, rollout_id=alone)]))
        copies = [json.loads(json.dumps(event)) for event in self.events]
        figures = {
            "append_in_process_per_s": per_second(lambda e: record_event(alone, "0", "model_request", e), copies)
        }
        self.enqueue([alone])
        figures["append_http_per_s"] = per_second(lambda event: self.post(alone, event), self.events)
        return {**figures, "read_64_runs_ms": self.read(name)}

    def read(self, name: str) -> float:
        """Milliseconds in which a client has 64 runs of four calls each."""
        runs = [f"{name}-run{number}" for number in range(READ_RUNS)]
        self.enqueue(runs)
        for number, run in enumerate(run for run in runs for _ in range(CALLS_PER_RUN)):
            event = self.events[number % len(self.events)]
            ids = [number, *event["response"]["prompt_token_ids"][1:]]  # of equal prompts its reader keeps one
            self.post(run, {**event, "response": {**event["response"], "prompt_token_ids": ids}})
        began = time.perf_counter()
        found = [
            self.client.get(f"/api/rollouts/{run}/events?event_type=model_request&format=triplet").json()
            for run in runs
        ]
        took = 1000 * (time.perf_counter() - began)
        if [len(events) for events in found] != [CALLS_PER_RUN] * READ_RUNS:
            raise RuntimeError(f"it gave back {sum(map(len, found))} calls")
        return took

    def enqueue(self, runs: list[str]) -> None:
        body = [{"input": {}, "rollout_id": run} for run in runs]
        self.client.post("/api/rollouts", json=body).raise_for_status()

    def post(self, run: str, event: dict[str, Any]) -> None:
        url = f"/api/rollouts/{run}/attempt/0/events"
        self.client.post(url, json={"event_type": "model_request", "data": event}).raise_for_status()


def bytes_per_call(events: list[dict[str, Any]]) -> float:
    """Memory that one recorded call takes, as the parsed JSON that its proxy holds."""
    texts = [json.dumps(event) for event in events] * 4
    asyncio.run(enqueue_rollouts([RolloutCreate(input={}, rollout_id="size")]))
    before = rss_bytes()
    for text in texts:
        record_event("size", "0", "model_request", json.loads(text))
    return (rss_bytes() - before) / len(texts)


def main() -> None:
    """Serve rounds until the input ends."""
    folder, calls = folder_and_calls()
    events = [event_of(call) for call in calls]
    server, url = start_server(folder)
    try:
        rounds = Rounds(url, events)
        about = {
            "version": __version__,
            "durability": "none: lists in the memory of one process, gone when it ends",
            "bytes_per_call_in_memory": bytes_per_call(events),
        }
        drive(about, rounds.play)
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main()
