"""Disks that really run full: the kernel refuses what is written, not a fake.

Where nobody may mount, `SmallFiles` still makes it refuse, by another number: EFBIG where a full disk says ENOSPC.
"""

import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
from waits import gone


class SmallDisk:
    """A disk of a few megabytes (tmpfs) at `folder`, where every user may write, and what fills it."""

    def __init__(self, stack: ExitStack, *, size_mb: int) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tracegrad-disk.")))
        self.folder.chmod(0o755)  # PostgreSQL runs as a user of its own
        options = ["-t", "tmpfs", "-o", f"size={size_mb}m,mode=0777", "tmpfs", str(self.folder)]
        mounting = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if mounting.returncode:
            # files that may not grow any more stand in, on both databases
            pytest.skip(f"a disk that runs full needs the right to mount a tmpfs: {mounting.stderr.strip()}")
        stack.callback(subprocess.run, ["umount", "--lazy", str(self.folder)], check=True)
        self._filler = self.folder / "filler"

    def fill(self) -> None:
        """Leave no room."""
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65_536))
            except OSError:
                return

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink()


class SmallFiles:
    """What some processes write to may not become longer than a limit, which is asked for when it is to begin."""

    def __init__(self, limit_bytes: Callable[[], int], *, user: str | None = None) -> None:
        """`user`: whose the processes are, if not ours. Not even root may bound those of others everywhere."""
        self._limit_bytes = limit_bytes
        self._as = ["runuser", "-u", user, "--"] if user is not None else []

    def fill(self, pids: Iterable[int]) -> None:
        """Let these processes, and those that they start, write nothing beyond the limit."""
        self._bound(pids, str(self._limit_bytes()))

    def free(self, pids: Iterable[int]) -> None:
        """Let them."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        self._bound(pids, "unlimited" if hard == resource.RLIM_INFINITY else str(hard))

    def _bound(self, pids: Iterable[int], limit: str) -> None:
        for pid in pids:
            bounding = subprocess.run([*self._as, "prlimit", f"--pid={pid}", f"--fsize={limit}:"], check=False)
            assert bounding.returncode == 0 or gone(pid)
