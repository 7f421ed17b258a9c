"""Where the processes of one `tracegrad proxy --workers N` find each other: a Unix socket each, in a folder of theirs.

The folder belongs to the user who started them and to nobody else (mode 700); no port is opened. `/metrics` asked there
is answered with that worker's own numbers; everything else is answered as on the port, keys included. Made by `workers`
(the parent) and by each worker; asked by `metrics_page`, `first_worker`, and by the parent for readiness.
"""

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class WorkerSockets:
    """The sockets of `count` workers; this process is number `own`."""

    folder: Path
    own: int
    count: int

    def path(self, worker: int) -> Path:
        """Return the socket of a worker."""
        return self.folder / f"{worker}.sock"

    @property
    def others(self) -> dict[str, Path]:
        """Return the sockets of the other workers by their number."""
        return {str(worker): self.path(worker) for worker in range(self.count) if worker != self.own}

    def asks_for_ours(self, scope: Mapping[str, Any]) -> bool:
        """Whether another worker asks, over our own socket, for our numbers."""
        server = scope.get("server")
        return server is not None and server[0] == str(self.path(self.own)) and scope["path"] == "/metrics"

    def bound(self) -> socket.socket:
        """Return our own socket, in place of one that a dead predecessor left; nobody is heard before it listens."""
        path = self.path(self.own)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        return listener
