"""A PostgreSQL of a test's own, which it may crash: the functions of scripts/postgres.sh, in a shell that stays."""

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

SCRIPT = Path(__file__).parents[2] / "scripts" / "postgres.sh"


def is_installed() -> bool:
    """Whether Debian's packages are there."""
    return bool(list(Path("/usr/lib/postgresql").glob("*/bin/initdb")))


class OwnPostgres:
    """A context manager; `url` is that of an empty database."""

    def __enter__(self) -> Self:
        self._shell = subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._do(f"source {SCRIPT}")
        self._do("start_postgres")
        self.url = self._do("echo $TRACEGRAD_TEST_POSTGRES")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do("stop_postgres")
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait()

    def crash(self) -> None:
        """End it as a power cut does."""
        self._do("crash_postgres")

    def revive(self) -> None:
        """Start it again; it recovers from its log."""
        self._do("revive_postgres")

    def _do(self, command: str) -> str:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command}; echo; echo done $?\n")
        self._shell.stdin.flush()
        said = []
        while not (line := self._shell.stdout.readline().strip()).startswith("done "):
            said.append(line)
        assert line == "done 0", f"{command}: {line}"
        return "".join(said)
