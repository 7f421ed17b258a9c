"""Load on a proxy that is killed: clients that note every answer they finished reading, and the comparison after.

Used by the wire tier (10 moments of one proxy and of one of two, fewer on PostgreSQL; 50 in `make test-long`).
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tracegrad.tracestore.store import open_store

SUPPORT = Path(__file__).parent
WARM = 10
"""Answers that are read before the clock of a kill starts: a loaded machine must not make the test empty."""


@dataclass
class Finished:
    """Completion ids of the answers that clients read to their end, and how many they did not."""

    completion_ids: list[str] = field(default_factory=list)
    broken: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)
    """Of those that they did not, the status and the body of each that was answered with an error."""


def write_config(folder: Path, engine_url: str, store_url: str) -> Path:
    path = folder / "tracegrad.yaml"
    config = {
        "store": store_url,
        "models": {"main": {"checkpoint": "none", "engine": {"url": engine_url}}},
        "roles": {"*": "main"},
    }
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def start_engine(token_delay_s: float) -> tuple["subprocess.Popen[str]", str]:
    command = [sys.executable, str(SUPPORT / "fake_vllm.py"), "--name", "main", "--token-delay-s", str(token_delay_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def start_proxy(config: Path, *arguments: str) -> tuple["subprocess.Popen[str]", str]:
    command = [
        sys.executable,
        "-m",
        "tracegrad.adapters.proxy.command",
        "--config",
        str(config),
        "--port",
        "0",
        "--json",
        *arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the proxy ended with status {process.wait()}"
    return process, str(json.loads(line)["url"])


def worker_pids(url: str) -> dict[str, int]:
    """The processes behind a port, by their numbers; none where we reached one that is being killed."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            page = answer.read().decode()
    except OSError:
        return {}
    found = re.findall(r'tracegrad_proxy_info{pid="(\d+)",proxy_id="[^"]+",worker="(\d+)"} 1', page)
    return {worker: int(pid) for pid, worker in found}


async def _one_call(session: aiohttp.ClientSession, url: str, number: int, finished: Finished) -> None:
    stream, chat = bool(number % 2), bool(number % 5)
    body: dict[str, Any] = {"stream": stream, "n": 1 + number % 3 // 2}
    if chat:
        body["messages"] = [{"role": "user", "content": f"call {number}"}]
    else:
        body |= {"prompt": f"call {number}", "max_tokens": 8}
    path = "chat/completions" if chat else "completions"
    try:
        async with session.post(f"{url}/run/run-{number % 7}/role/a/v1/{path}", json=body) as answer:
            text = await answer.text()
    except (aiohttp.ClientError, OSError):
        finished.broken += 1
        return
    if answer.status != 200 or (stream and "data: [DONE]" not in text):
        finished.broken += 1
        if answer.status != 200 or '"error"' in text:
            finished.refused.append((answer.status, text))
    elif stream:
        finished.completion_ids.append(str(json.loads(text.split("\n\n", 1)[0].removeprefix("data: "))["id"]))
    else:
        finished.completion_ids.append(str(json.loads(text)["id"]))


async def load(url: str, finished: Finished, stop: asyncio.Event, *, clients: int) -> None:
    """Keep `clients` connections busy until `stop`: chat and text completions, plain and streamed, n of 1 and 2."""

    async def client(first: int, session: aiohttp.ClientSession) -> None:
        number = first
        while not stop.is_set():
            await _one_call(session, url, number, finished)
            number += clients

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(first, session) for first in range(clients)))


async def _kill_under_load(config: Path, after_s: float, clients: int) -> Finished:
    process, url = await asyncio.to_thread(start_proxy, config)
    finished, stop = Finished(), asyncio.Event()
    try:
        loading = asyncio.create_task(load(url, finished, stop, clients=clients))
        while len(finished.completion_ids) < WARM and not loading.done():
            await asyncio.sleep(0.01)
        await asyncio.sleep(after_s)
        os.kill(process.pid, signal.SIGKILL)
        stop.set()
        await asyncio.wait_for(loading, 30)
    finally:
        process.kill()
        process.wait()
    return finished


async def _kill_workers_under_load(url: str, rng: random.Random, moments: int, clients: int) -> Finished:
    """Kill one of two workers, `moments` times, at random moments under load that never stops."""
    finished, stop = Finished(), asyncio.Event()
    loading = asyncio.create_task(load(url, finished, stop, clients=clients))
    killed = -1
    for _ in range(moments):
        read = len(finished.completion_ids)
        while len(pids := await asyncio.to_thread(worker_pids, url)) < 2 or killed in pids.values():
            assert not loading.done()
            await asyncio.sleep(0.05)
        while len(finished.completion_ids) < read + WARM and not loading.done():
            await asyncio.sleep(0.01)
        await asyncio.sleep(rng.uniform(0.0, 0.6))
        killed = rng.choice(sorted(pids.values()))
        os.kill(killed, signal.SIGKILL)
    stop.set()
    await asyncio.wait_for(loading, 30)
    return finished


def kill_one_of_two_at_random_moments(
    folder: Path, store_url: str, *, seed: int, moments: int, clients: int = 16
) -> None:
    """One store, one port, two proxies: whichever is killed, every finished answer is in the store exactly once."""
    open_store(store_url).close()
    engine, engine_url = start_engine(0.002)
    try:
        process, url = start_proxy(write_config(folder, engine_url, store_url), "--workers", "2")
        try:
            seen = asyncio.run(_kill_workers_under_load(url, random.Random(seed), moments, clients))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
    finally:
        engine.kill()
        engine.wait()
    compare(store_url, seen.completion_ids, seen.broken, seed=seed, moments=moments)


def kill_at_random_moments(folder: Path, store_url: str, *, seed: int, moments: int, clients: int = 16) -> None:
    """Start and kill a proxy `moments` times under load; then every finished answer is in the store exactly once."""
    rng = random.Random(seed)
    open_store(store_url).close()
    engine, engine_url = start_engine(0.002)
    finished: list[str] = []
    broken = 0
    try:
        config = write_config(folder, engine_url, store_url)
        for _ in range(moments):
            seen = asyncio.run(_kill_under_load(config, rng.uniform(0.0, 0.6), clients))
            finished += seen.completion_ids
            broken += seen.broken
    finally:
        engine.kill()
        engine.wait()
    compare(store_url, finished, broken, seed=seed, moments=moments)


def compare(store_url: str, finished: list[str], broken: int, *, seed: int, moments: int) -> None:
    """Every answer that a client read to its end is in the store, once; and there was load to prove it."""
    began = time.monotonic()
    store = open_store(store_url)
    try:
        stored: dict[str, int] = {}
        for run in range(7):
            for call in store.trace(f"run-{run}").calls:
                if call.status == "complete" and call.completion_id is not None:
                    stored[call.completion_id] = stored.get(call.completion_id, 0) + 1
    finally:
        store.close()
    lost = [completion_id for completion_id in finished if stored.get(completion_id) != 1]
    said = f"seed {seed}: {len(finished)} finished, {broken} broken off, {len(stored)} stored"
    print(f"{said}, read back in {time.monotonic() - began:.1f} s")
    assert len(finished) >= WARM * moments, f"{said}: too little load to prove anything"
    assert broken >= moments, f"{said}: the kills interrupted nothing"
    assert len(set(finished)) == len(finished)
    assert lost == [], f"{said}: finished by a client but not stored exactly once"
