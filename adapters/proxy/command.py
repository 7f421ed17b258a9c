"""`tracegrad proxy`: read the configuration, open the store, serve until interrupted.

The one place where the proxy reads its command line. Refuses a host that is not loopback where API keys are off,
unless `--allow-remote` is said. Port 0 takes a free one; the URL is printed once requests are taken. With several
workers it becomes their parent (see `workers`).
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
import uvicorn

from tracegrad.adapters.proxy.access import check_address
from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.adapters.proxy.log_lines import LogFormat, set_up
from tracegrad.adapters.proxy.outside import outside_apis
from tracegrad.adapters.proxy.worker_sockets import WorkerSockets
from tracegrad.adapters.proxy.workers import listen, reserve, run_workers, with_port
from tracegrad.tracestore.config import DEFAULT_FILE, Config, ProxyConfig, dump_config, load_config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.store import open_store

KEEP_ALIVE_S = 75
"""Longer than the 5 s for which HTTP clients of the OpenAI SDK keep idle connections: they never find one dead."""
SHUTDOWN_S = 10
BACKLOG = 2048


@click.command("proxy")
@click.option("--config", "config_path", default=DEFAULT_FILE, show_default=True, type=click.Path(path_type=Path))
@click.option("--host", default=None, help="Address to listen on (default: proxy.host).")
@click.option("--port", default=None, type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option("--allow-remote", is_flag=True, help="Let other machines in without API keys.")
@click.option("--workers", default=None, type=click.IntRange(1, 64), help="Processes (default: proxy.workers).")
@click.option("--log-format", default=None, type=click.Choice(["text", "json"]), help="Default: proxy.log.")
@click.option("--verbose", is_flag=True, help="A log line for each call.")
@click.option("--show-config", is_flag=True, help="Print what was resolved, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable lines.")
@click.option("--worker", default=None, type=int, hidden=True, help="Be this one of the workers.")
def proxy(
    *,
    config_path: Path,
    host: str | None,
    port: int | None,
    allow_remote: bool,
    workers: int | None,
    log_format: LogFormat | None,
    verbose: bool,
    show_config: bool,
    as_json: bool,
    worker: int | None,
) -> None:
    """Serve an OpenAI-compatible endpoint that records every call."""
    try:
        config = _with(load_config(config_path), host=host, port=port, workers=workers, log=log_format)
        if show_config:
            click.echo(json.dumps(msgspec.to_builtins(config)) if as_json else dump_config(config), nl=as_json)
            return
        if worker is not None:
            set_up(config.proxy.log, verbose=verbose, worker=str(worker))
            sys.exit(run(config, say=None, sockets=WorkerSockets(config_path.parent, worker, config.proxy.workers)))
        check_address(config.proxy, allow_remote=allow_remote)
        outside_apis(config, os.environ)  # a key that is not set is an error before any worker starts
        set_up(config.proxy.log, verbose=verbose)
        serve = run if config.proxy.workers == 1 else partial(_run_workers, verbose=verbose)
        sys.exit(serve(config, say=partial(_say_url, as_json=as_json)))
    except TraceStoreError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(0)


def run(config: Config, *, say: Callable[[str], None] | None, sockets: WorkerSockets | None = None) -> int:
    """Serve until interrupted; return the exit status (1 where starting failed). `say` hears the URL.

    With `sockets`, be one of several: share the port, and answer on a socket of our own as well.
    """
    listeners = [_listen(config.proxy, shared=sockets is not None)]
    url = _url_of(listeners[0])
    if sockets is not None:
        listeners.append(sockets.bound())
    store = open_store(config.store)
    try:
        server = make_server(ProxyApp(config, store, url=url, sockets=sockets))
        asyncio.run(_serve(server, listeners, None if say is None else partial(say, url)))
    finally:
        store.close()
        for listener in listeners:
            listener.close()
    return 0 if server.started else 1


def _run_workers(config: Config, *, say: Callable[[str], None], verbose: bool) -> int:
    with _listen(config.proxy, reserved=True) as reserved:
        config = with_port(config, reserved.getsockname()[1])
        return run_workers(config, ("--verbose",) if verbose else (), ready=partial(say, _url_of(reserved)))


def make_server(app: ProxyApp) -> uvicorn.Server:
    """Return the HTTP server that serves `app`: plain asyncio, httptools, no headers of its own."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
    )


async def _serve(server: uvicorn.Server, listeners: list[socket.socket], started: Callable[[], None] | None) -> None:
    serving = asyncio.create_task(server.serve(sockets=listeners))
    while not server.started and not serving.done():
        await asyncio.wait([serving], timeout=0.01)
    if server.started and started is not None:
        started()
    await serving


def _say_url(url: str, *, as_json: bool) -> None:
    click.echo(json.dumps({"url": url}) if as_json else f"proxy: {url}/v1")
    sys.stdout.flush()


def _with(config: Config, **said: Any) -> Config:
    """Return `config` with what the command line says of the section `proxy`."""
    known = {name: value for name, value in said.items() if value is not None}
    return msgspec.structs.replace(config, proxy=msgspec.structs.replace(config.proxy, **known))


def _listen(proxy: ProxyConfig, *, shared: bool = False, reserved: bool = False) -> socket.socket:
    try:
        if reserved:
            return reserve(proxy.host, proxy.port)
        return listen(proxy.host, proxy.port, shared=shared, backlog=None if shared else BACKLOG)
    except OSError as error:
        where = f"{proxy.host}:{proxy.port}"
        raise click.ClickException(f"cannot listen on {where}: {error.strerror}; choose another --port") from error


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    proxy()
