"""`tracegrad proxy`: read the configuration, open the store, serve until interrupted.

The one place where the proxy reads its command line. Refuses a host that is not loopback without `--allow-remote`:
there is no authentication yet. Port 0 takes a free one; the URL is printed once requests are taken.
"""

import asyncio
import ipaddress
import json
import logging
import socket
import sys
from pathlib import Path

import click
import msgspec
import uvicorn

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import Config, dump_config, load_config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.store import open_store

KEEP_ALIVE_S = 75
"""Longer than the 5 s for which HTTP clients of the OpenAI SDK keep idle connections: they never find one dead."""
SHUTDOWN_S = 10


@click.command("proxy")
@click.option("--config", "config_path", required=True, type=click.Path(path_type=Path), help="The YAML file.")
@click.option("--host", default=None, help="Address to listen on (default: proxy.host).")
@click.option("--port", default=None, type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option("--allow-remote", is_flag=True, help="Allow an address that other machines can reach.")
@click.option("--show-config", is_flag=True, help="Print what was resolved, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable lines.")
def proxy(
    *, config_path: Path, host: str | None, port: int | None, allow_remote: bool, show_config: bool, as_json: bool
) -> None:
    """Serve an OpenAI-compatible endpoint that records every call."""
    try:
        config = _with_address(load_config(config_path), host, port)
        if show_config:
            click.echo(json.dumps(msgspec.to_builtins(config)) if as_json else dump_config(config), nl=as_json)
            return
        _check_address(config.proxy.host, allow_remote)
        sys.exit(run(config, as_json=as_json))
    except TraceStoreError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(0)


def run(config: Config, *, as_json: bool) -> int:
    """Serve until interrupted; return the exit status (1 where starting failed)."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        listener = _listen(config.proxy.host, config.proxy.port)
    except OSError as error:
        where = f"{config.proxy.host}:{config.proxy.port}"
        raise click.ClickException(f"cannot listen on {where}: {error.strerror}; choose another --port") from error
    url = _url_of(listener)
    store = open_store(config.store)
    try:
        server = make_server(ProxyApp(config, store, url=url))
        asyncio.run(_serve(server, listener, url, as_json))
    finally:
        store.close()
        listener.close()
    return 0 if server.started else 1


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


async def _serve(server: uvicorn.Server, listener: socket.socket, url: str, as_json: bool) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.wait([serving], timeout=0.01)
    if server.started:
        click.echo(json.dumps({"url": url}) if as_json else f"proxy: {url}/v1")
        sys.stdout.flush()
    await serving


def _with_address(config: Config, host: str | None, port: int | None) -> Config:
    proxy = config.proxy
    changed = msgspec.structs.replace(
        proxy, host=proxy.host if host is None else host, port=proxy.port if port is None else port
    )
    return msgspec.structs.replace(config, proxy=changed)


def _check_address(host: str, allow_remote: bool) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not allow_remote:
        raise click.ClickException(
            f"{host} can be reached from other machines and the proxy has no authentication; "
            "listen on 127.0.0.1, or say --allow-remote"
        )


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(2048)
    return listener


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    proxy()
