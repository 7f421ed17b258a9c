"""A PostgreSQL of a test's own, which it may kill: the functions of scripts/postgres.sh, in a shell that stays."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from waits import gone, wait_for

SCRIPT = Path(__file__).parents[2] / "scripts" / "postgres.sh"
PATIENCE_S = 60.0


def is_installed() -> bool:
    """Whether Debian's packages are there."""
    return bool(list(Path("/usr/lib/postgresql").glob("*/bin/initdb")))


def user() -> str | None:
    """Whose its processes are; None: ours."""
    return "postgres" if os.getuid() == 0 else None


class OwnPostgres:
    """A context manager; `url` is that of an empty database.

    `data` and `log` are folders that are made for the tables and for the write-ahead log. Segments of the log have a
    megabyte, so that a new one is soon needed.
    """

    def __init__(self, data: Path | None = None, log: Path | None = None) -> None:
        self._places = f"'{data or ''}' '{log or ''}'"

    def __enter__(self) -> Self:
        self._shell = subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._do(f"source {SCRIPT}")
        self._do(f"start_postgres {self._places} --wal-segsize=1")
        self.url = self._do("echo $TRACEGRAD_TEST_POSTGRES")
        self._pid_file = Path(self._do("echo $PG_DATA")) / "postmaster.pid"
        self._words = Path(self._do("echo $PG_DIR")) / "log"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do("stop_postgres")
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait()

    def processes(self) -> Iterator[int]:
        """The server's process, and then those that it has forked by the time that they are asked for."""
        try:
            server = int(self._pid_file.read_text().split()[0])
        except FileNotFoundError:  # it has ended
            return
        yield server
        yield from _children(server)

    def crash(self) -> None:
        """Kill all of it (-9), as the kernel does that runs out of memory."""
        server = next(self.processes())
        os.kill(server, signal.SIGSTOP)  # it must not fork, nor see that a child is dead and begin anew
        pids = list(self.processes())
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: all(map(gone, pids)), "PostgreSQL's processes are gone", PATIENCE_S)
        for lock in (self._pid_file, *self._words.parent.glob(".s.PGSQL.*.lock")):
            lock.unlink()  # they name a zombie, until somebody reaps it: a server that runs

    def revive(self) -> None:
        """Wait until it serves: by itself, or, where it has ended, started again. It recovers from its log."""

        def serves() -> bool:
            if not self._pid_file.exists():
                self._do("revive_postgres")
            try:
                psycopg.connect(self._place(), connect_timeout=5).close()
            except psycopg.OperationalError:
                return False
            return True

        wait_for(serves, "PostgreSQL serves", PATIENCE_S)

    def use_up_log(self) -> None:
        """Begin new segments of the log until there is no room for one, and the server ends. Somebody must write."""
        with suppress(psycopg.OperationalError), psycopg.connect(self._place(), autocommit=True) as connection:
            for _ in range(10_000):
                connection.execute("SELECT pg_switch_wal()")

    def words(self) -> str:
        """What the server has written of itself."""
        return self._words.read_text()

    def _place(self) -> str:
        return self.url.replace("+psycopg", "")

    def _do(self, command: str) -> str:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command}; status=$?; echo; echo done $status\n")
        self._shell.stdin.flush()
        said = []
        while not (line := self._shell.stdout.readline().strip()).startswith("done "):
            said.append(line)
        assert line == "done 0", f"{command}: {line}"
        return "".join(said)


def _children(parent: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                yield int(stat.parent.name)
