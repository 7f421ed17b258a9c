"""`GET /metrics`: the numbers of every process behind this port, whichever of them was asked.

With several workers, a connection reaches any one of them; it asks the others over the Unix sockets in their common
folder and puts the pages together: each series says its `worker`. One that does not answer is `tracegrad_worker_up` 0
and nothing else; its numbers are not made up. Counts of the store are asked once, by whoever answers.
Called by `app`.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import aiohttp

from tracegrad.adapters.proxy.metrics import ProxyMetrics
from tracegrad.adapters.proxy.worker_sockets import WorkerSockets
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.store import Store

METRICS_HEADERS = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)
SIBLING_TIMEOUT_S = 2.0


class MetricsPage:
    """Puts the page together."""

    def __init__(self, metrics: ProxyMetrics, store: Store, project: str, sockets: WorkerSockets | None) -> None:
        self._metrics = metrics
        self._store = store
        self._project = project
        self._sockets = sockets

    async def render(self) -> bytes:
        """Return the page of all workers."""
        found: dict[str, str | None] = {self._metrics.worker: self._metrics.render()}
        if self._sockets is not None:
            others = self._sockets.others
            answers = await asyncio.gather(*(_ask(path) for path in others.values()))
            found.update(zip(others, answers, strict=True))
        ordered = sorted(found.items())
        pages = [*(page for _, page in ordered if page is not None), _up(ordered), await self._of_store()]
        return joined(pages).encode()

    async def _of_store(self) -> str:
        try:
            runs = await asyncio.to_thread(self._store.open_runs, self._project)
        except TraceStoreError:
            return _gauge("tracegrad_store_up", "1 where the store answers.", [("", 0)])
        return _gauge("tracegrad_store_up", "1 where the store answers.", [("", 1)]) + _gauge(
            "tracegrad_runs_open", "Runs of the project that have not ended.", [("", runs.count)]
        )


async def _ask(path: Path) -> str | None:
    timeout = aiohttp.ClientTimeout(total=SIBLING_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), timeout=timeout) as session,
            session.get("http://worker/metrics") as answer,
        ):
            return await answer.text() if answer.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None


def _up(found: Iterable[tuple[str, str | None]]) -> str:
    values = [(f'{{worker="{worker}"}}', int(page is not None)) for worker, page in found]
    return _gauge("tracegrad_worker_up", "1 for each process that answered.", values)


def _gauge(name: str, says: str, values: Iterable[tuple[str, int]]) -> str:
    lines = [f"# HELP {name} {says}", f"# TYPE {name} gauge", *(f"{name}{labels} {value}" for labels, value in values)]
    return "\n".join(lines) + "\n"


def joined(pages: Iterable[str]) -> str:
    """Return one page with the samples of all: the format wants those of a family together, and its head once."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                heads.setdefault(family, [line])
            elif line.startswith("# "):
                if line not in heads[family]:
                    heads[family].append(line)
            else:
                samples.setdefault(family, []).append(line)
    return "".join(f"{line}\n" for family, head in heads.items() for line in [*head, *samples.get(family, ())])
