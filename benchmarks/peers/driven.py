"""A driver as the benchmark sees it: a process that is asked for rounds through a pipe, and what it answered.

The other end is `driving`. Refuses to go on with a driver that ended (its log is in the message). Called by
`store_peers` and `trainer_speed`.
"""

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Driven:
    """Starts `command` with a scratch folder of its own under `folder`, and hears what it says it is."""

    def __init__(
        self, name: str, command: Sequence[str | Path], folder: Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
            env=env,
        )
        self.rounds: list[dict[str, float]] = []
        self.about = self._hear()

    def play(self, name: str) -> None:
        """Let it do one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        self.rounds.append(self._hear())

    def end(self) -> None:
        """Let it go."""
        self._process.communicate(timeout=60)
        self._log.close()

    def report(self) -> dict[str, Any]:
        """Return what it is, and the medians of what it measured."""
        return {**self.about, **medians(self.rounds)}

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(60)
            self._log.seek(0)
            raise RuntimeError(f"the driver ended with {self._process.returncode}: {self._log.read()[-2000:]}")
        return json.loads(line)


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {what: statistics.median(one[what] for one in rounds) for what in rounds[0]}
