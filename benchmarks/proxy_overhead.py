"""What the proxy costs: against direct calls, 11 KB in, 35 KB out, every call recorded durably.

Client (wrk where it is installed, otherwise an asyncio client, and the result says which), proxy, and an in-memory
engine are three processes on one machine; direct and proxied rounds alternate and medians are taken. At the end every
call that was answered must be in the store, exact. Writes out/bench/proxy.json and prints a table.
Run it with nothing else on the machine: `python benchmarks/proxy_overhead.py`.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy_upstream import answer_body
from rich.console import Console
from rich.table import Table

from tracegrad.tracestore.store import open_store

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "bench"
RUN = "bench"
PATH = f"/run/{RUN}/role/writer/v1/chat/completions"
GOAL_ADDED_P50_MS, GOAL_RSS_MB = 2.0, 200.0
BODY = json.dumps(
    {
        "model": "main",
        "temperature": 0.8,
        "messages": [
            {"role": "system", "content": "Answer from the passages. " * 20},
            {"role": "user", "content": "A passage about something, of which there are many. " * 200},
        ],
    }
)
_LUA = """
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.body = [==[%s]==]
done = function(summary, latency)
  local bad = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
  io.write(string.format("RESULT %%d %%d %%d %%d\\n", latency:percentile(50), summary.requests, summary.duration, bad))
end
"""


@dataclass(frozen=True)
class Round:
    """One timed round: latency of the median call, calls answered, seconds, and the proxy's CPU seconds in it."""

    p50_ms: float
    calls: int
    seconds: float
    cpu_s: float = 0.0


class WrkClient:
    """The compiled client."""

    name = "wrk"

    def __init__(self, folder: Path) -> None:
        self._script = folder / "load.lua"
        self._script.write_text(_LUA % BODY)

    def load(self, url: str, connections: int, seconds: float) -> Round:
        """Keep `connections` busy for `seconds`. Raises RuntimeError where a call failed."""
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "-s", str(self._script), url + PATH]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        words = next(line for line in output.splitlines() if line.startswith("RESULT")).split()[1:]
        p50_us, calls, duration_us, bad = map(int, words)
        if bad:
            raise RuntimeError(f"{bad} calls failed:\n{output}")
        return Round(p50_us / 1000, calls, duration_us / 1e6)


class AsyncioClient:
    """Many connections in one Python process, for machines without wrk: it costs more than the calls it measures."""

    name = "asyncio (wrk is not installed: apt-get install wrk for comparable figures)"

    def load(self, url: str, connections: int, seconds: float) -> Round:
        """As `WrkClient.load`."""
        return asyncio.run(self._load(url, connections, seconds))

    async def _load(self, url: str, connections: int, seconds: float) -> Round:
        host, port = url.removeprefix("http://").split(":")
        request = (
            f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(BODY.encode())}\r\n\r\n{BODY}"
        ).encode()
        took: list[float] = []
        began = time.perf_counter()

        async def connection() -> None:
            reader, writer = await asyncio.open_connection(host, int(port))
            while (start := time.perf_counter()) < began + seconds:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if not head.startswith(b"http/1.1 200"):
                    raise RuntimeError(f"a call failed: {head.decode()}")
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                took.append(time.perf_counter() - start)
            writer.close()

        await asyncio.gather(*(connection() for _ in range(connections)))
        return Round(1000 * statistics.median(took), len(took), time.perf_counter() - began)


class Process:
    """A child that prints its URL; CPU time and peak memory, its own children's included, are read from /proc."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        self.url = str(json.loads(line)["url"]) if line.startswith("{") else line

    def cpu_s(self) -> float:
        """Return user + system seconds so far, all threads."""
        stats = (Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self._pids())
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")

    def peak_rss_mb(self) -> float:
        """Return the peak resident memory."""
        statuses = (Path(f"/proc/{pid}/status").read_text() for pid in self._pids())
        return sum(int(status.split("VmHWM:")[1].split()[0]) for status in statuses) / 1024

    def _pids(self) -> list[int]:
        pids = [self._process.pid]
        for pid in pids:  # grows while it is walked: children of children follow
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        return pids

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self._process.terminate()
        self._process.wait(20)


def measure(
    client: Any, upstream: Process, proxies: list[Process], *, connections: int, rounds: int, seconds: float
) -> Any:
    """Alternate direct and proxied rounds; return direct rounds, and those of each proxy."""
    direct: list[Round] = []
    proxied: list[list[Round]] = [[] for _ in proxies]
    for _ in range(rounds):
        direct.append(client.load(upstream.url, connections, seconds))
        for proxy, seen_before in zip(proxies, proxied, strict=True):
            before = proxy.cpu_s()
            seen = client.load(proxy.url, connections, seconds)
            seen_before.append(Round(seen.p50_ms, seen.calls, seen.seconds, proxy.cpu_s() - before))
    return direct, proxied


def summarise(direct: list[Round], proxied: list[Round]) -> dict[str, float]:
    """Return medians over the rounds."""
    median = statistics.median
    return {
        "direct_p50_ms": median(r.p50_ms for r in direct),
        "proxy_p50_ms": median(r.p50_ms for r in proxied),
        "added_p50_ms": median(p.p50_ms - d.p50_ms for p, d in zip(proxied, direct, strict=True)),
        "direct_requests_per_s": median(r.calls / r.seconds for r in direct),
        "proxy_requests_per_s": median(r.calls / r.seconds for r in proxied),
        "proxy_cpu_ms_per_call": median(1000 * r.cpu_s / r.calls for r in proxied),
    }


def check_store(url: str, answered: int) -> int:
    """Every answered call is stored; the first ones are looked at closely. Return how many are stored."""
    store = open_store(url)
    try:
        (summary,) = [run for run in store.list_runs(limit=10) if run.run.run_id == RUN]
    finally:
        store.close()
    if summary.n_calls < answered:
        raise RuntimeError(f"{answered} calls were answered, {summary.n_calls} are stored")
    return int(summary.n_calls)


def check_one(proxy: Process, store_url: str) -> None:
    """One call before the rounds: answered without what was injected, and stored as exact."""
    request = urllib.request.Request(proxy.url + "/run/first/v1/chat/completions", data=BODY.encode())
    with urllib.request.urlopen(request) as answer:
        body = json.loads(answer.read())
    store = open_store(store_url)
    (call,) = store.trace("first").calls
    store.close()
    if body["choices"][0]["token_ids"] is not None or call.quarantine is not None or len(call.prompt_ids or ()) != 2000:
        raise RuntimeError(f"the benchmark's call is not recorded as it should be: {call.quarantine} {call.error}")


def start_proxy(folder: Path, config: dict[str, Any], workers: int) -> Process:
    """Start a proxy of so many worker processes on a free port."""
    path = folder / f"proxy-{workers}.yaml"
    path.write_text(json.dumps({**config, "proxy": {"workers": workers}}))
    module = "tracegrad.adapters.proxy.command"
    return Process([sys.executable, "-m", module, "--config", str(path), "--port", "0", "--json"])


def run(rounds: int, seconds: float) -> dict[str, Any]:
    """Measure everything and return the report."""
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT) as name:
        folder = Path(name)
        store_url = f"sqlite:///{folder / 'store.db'}"
        client = WrkClient(folder) if shutil.which("wrk") else AsyncioClient()
        upstream = Process([sys.executable, str(HERE / "proxy_upstream.py")])
        models = {"main": {"checkpoint": "none", "engine": {"url": upstream.url}}}
        config = {"store": store_url, "models": models, "roles": {"*": "main"}}
        one, two = (start_proxy(folder, config, workers) for workers in (1, 2))
        try:
            check_one(one, store_url)
            for proxy in (one, two):
                client.load(proxy.url, 4, 1)  # warm up
            alone, (by_one,) = measure(client, upstream, [one], connections=1, rounds=rounds, seconds=seconds)
            crowd, (many_by_one, many_by_two) = measure(
                client, upstream, [one, two], connections=16, rounds=rounds, seconds=seconds
            )
            peak = one.peak_rss_mb()
        finally:
            for process in (one, two, upstream):
                process.stop()
        answered = sum(r.calls for r in (*by_one, *many_by_one, *many_by_two))
        stored = check_store(store_url, answered)
    return {
        "client": client.name,
        "request_bytes": len(BODY.encode()),
        "answer_bytes": len(answer_body()),
        "rounds": rounds,
        "seconds_per_round": seconds,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "at_1": summarise(alone, by_one),
        "at_16": summarise(crowd, many_by_one),
        "at_16_two_workers": summarise(crowd, many_by_two),
        "proxy_peak_rss_mb": peak,
        "calls_answered": answered,
        "calls_stored": stored,
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    title = f"proxy against direct: {report['request_bytes']} B in, {report['answer_bytes']} B out, {report['client']}"
    table = Table("", "1 concurrent", "16 concurrent", "16, two workers", title=title)
    for key, label in (
        ("direct_p50_ms", "direct p50 (ms)"),
        ("proxy_p50_ms", "proxy p50, durable (ms)"),
        ("added_p50_ms", "added p50 (ms)"),
        ("direct_requests_per_s", "direct requests/s"),
        ("proxy_requests_per_s", "proxy requests/s"),
        ("proxy_cpu_ms_per_call", "proxy CPU per call (ms)"),
    ):
        table.add_row(label, *(f"{report[when][key]:.2f}" for when in ("at_1", "at_16", "at_16_two_workers")))
    console = Console()
    console.print(table)
    added, peak = report["at_1"]["added_p50_ms"], report["proxy_peak_rss_mb"]
    console.print(f"peak memory of the proxy: {peak:.0f} MB (goal < {GOAL_RSS_MB:.0f})")
    console.print(f"added p50 at 1 concurrent: {added:.2f} ms (goal <= {GOAL_ADDED_P50_MS})")
    console.print(f"answered {report['calls_answered']} calls in the timed rounds; {report['calls_stored']} are stored")


def main() -> None:
    """Read the command line, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    asked = parser.parse_args()
    report = run(asked.rounds, asked.seconds)
    (OUT / "proxy.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
