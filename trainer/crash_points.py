"""Named points at which a trainer kills itself, for the tests that prove resume. A test hook, and the only one.

`TRACEGRAD_KILL_AT=after-checkpoint:3` makes the process SIGKILL itself when step 3 reaches that point. Unset, every
call returns at once. Points: "after-lease", "after-step", "during-checkpoint", "after-checkpoint", "after-ledger",
"during-publish", "after-publish". Refuses a name that is none of these. Called by the controller.
"""

import os
import signal
import threading
from collections.abc import Mapping

from tracegrad.tracestore.errors import ConfigError

ENVIRONMENT = "TRACEGRAD_KILL_AT"
POINTS = (
    "after-lease",
    "after-step",
    "during-checkpoint",
    "after-checkpoint",
    "after-ledger",
    "during-publish",
    "after-publish",
)


class CrashPoints:
    """Knows the one point, if any, at which to die."""

    def __init__(self, point: str | None = None, step: int = -1) -> None:
        self._point, self._step = point, step

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "CrashPoints":
        """Read the variable.

        Raises:
            ConfigError: it is set to something that is not `point:step`.
        """
        text = environment.get(ENVIRONMENT)
        if not text:
            return cls()
        point, _, step = text.partition(":")
        if point not in POINTS or not step.isdigit():
            raise ConfigError(f"{ENVIRONMENT}={text}: want POINT:STEP with a point of {', '.join(POINTS)}")
        return cls(point, int(step))

    def reached(self, point: str, step: int) -> None:
        """Die here, if this is the point."""
        if (point, step) == (self._point, self._step):
            os.kill(os.getpid(), signal.SIGKILL)

    def soon(self, point: str, step: int, delay_s: float) -> None:
        """Die `delay_s` after this moment, if this is the point: inside an operation that another process does."""
        if (point, step) == (self._point, self._step):
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
