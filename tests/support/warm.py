"""A process that has imported what is slow to import and forks whenever it is told to: this module is the telling end.

Its program is the module of whoever subclasses `Warm`: `forked_trainer` and `ranked`.
"""

import os
import subprocess
import sys
from types import TracebackType
from typing import Self


class Warm:
    """Owns the process. A context manager."""

    def __init__(self, program: str) -> None:
        self._program = program

    def __enter__(self) -> Self:
        self._warm = subprocess.Popen(
            [sys.executable, self._program],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._warm.kill()
        self._warm.wait()

    def tell(self, line: str) -> None:
        assert self._warm.stdin is not None
        self._warm.stdin.write(f"{line}\n")
        self._warm.stdin.flush()

    def hear(self) -> str:
        assert self._warm.stdout is not None
        line = self._warm.stdout.readline()
        assert line, f"the warm process ended with status {self._warm.wait()}"
        return line.strip()
