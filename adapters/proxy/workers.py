"""Several proxy processes on one port: the parent, which serves nothing itself.

It takes the port, starts `proxy.workers` processes that each listen on it (SO_REUSEPORT: the kernel spreads the
connections), starts the dead again with a growing pause, and stops all of them at once; each finishes the calls it
has. Each is a proxy of its own to the store, with a heartbeat of its own. All read one resolved configuration, which
the parent writes into a folder that only its user can enter. Gives up, with status 1, when one keeps dying before it
serves. Called by `command`.
"""

import logging
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from tracegrad.adapters.proxy.log_lines import facts
from tracegrad.adapters.proxy.worker_sockets import WorkerSockets
from tracegrad.adapters.supervisor import ChildSpec, Event, RestartPolicy, Supervisor, supervise
from tracegrad.tracestore.config import Config, dump_config
from tracegrad.tracestore.store import open_store

log = logging.getLogger("tracegrad.proxy")
_LONGEST_TMPDIR = 60
_MODULE = "tracegrad.adapters.proxy.command"
# One that served and died is started again at once and for ever, since the others serve on; what counts as crashes in a
# row is dying before it serves.
POLICY = RestartPolicy(max_restarts=10, first_wait_s=0.2, longest_wait_s=10.0, steady_s=0.0, stop_timeout_s=20.0)


def listen(host: str, port: int, *, shared: bool = False, backlog: int | None = None) -> socket.socket:
    """Return a socket on the address; with `shared`, one of several. It listens where a `backlog` is given.

    Raises:
        OSError: somebody else listens there.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
        if backlog is not None:
            listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def reserve(host: str, port: int) -> socket.socket:
    """Take a port for our workers: bound, shared, and not listening, so that no connection ever comes to us.

    Raises:
        OSError: somebody else listens there. Asked without sharing first: workers of another proxy would share.
    """
    with listen(host, port) as probe:
        free = probe.getsockname()[1]
    return listen(host, free, shared=True)


def run_workers(config: Config, arguments: tuple[str, ...], *, ready: Callable[[], None]) -> int:
    """Serve with `proxy.workers` processes until told to stop; `config.proxy.port` is reserved. Returns the status.

    `arguments` go to each of them. Raises what `open_store` raises: the schema is made before the first starts.
    """
    open_store(config.store).close()
    with tempfile.TemporaryDirectory(prefix="tracegrad-proxy-", dir=_folder_for_sockets()) as name:
        folder, count = Path(name), config.proxy.workers
        path = folder / "tracegrad.yaml"
        path.write_text(dump_config(config))
        supervisor = Supervisor(
            [_spec(folder, path, number, count, arguments) for number in range(count)],
            log_dir=None,
            together=True,
            policy=POLICY,
            emit=_say,
        )
        return supervise(supervisor, ready=ready)


def _folder_for_sockets() -> str | None:
    """A Unix socket's path has room for some 100 characters: a long TMPDIR is passed over."""
    return None if len(tempfile.gettempdir()) < _LONGEST_TMPDIR else "/tmp"


def _spec(folder: Path, config: Path, number: int, count: int, arguments: tuple[str, ...]) -> ChildSpec:
    own = ("--config", str(config), "--worker", str(number))
    return ChildSpec(
        name=f"worker {number}",
        command=(sys.executable, "-m", _MODULE, *own, *arguments),
        ready_urls=(f"unix:{WorkerSockets(folder, number, count).path(number)}",),
    )


def _say(event: Event) -> None:
    about = facts(worker=event.child.removeprefix("worker "))
    if event.kind in ("crashed", "gave up"):
        log.error("%s %s: %s", event.child, event.kind, event.detail, extra=about)
    elif event.kind in ("started", "ready", "stopped"):
        log.info("%s %s", event.child, event.kind, extra=about)


def with_port(config: Config, port: int) -> Config:
    """Return `config` with the port that was taken."""
    return msgspec.structs.replace(config, proxy=msgspec.structs.replace(config.proxy, port=port))
