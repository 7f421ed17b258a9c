"""How long each engine stands still for a publish that calls go on through: from the request to pause until it resumes.

An engine whose swap failed stands still until the old weights are back, and that counts as one pause. Refuses nothing.
Called by `fleet`, each engine in a thread of its own; `publish` makes one for each publish.
"""

import time
from collections import defaultdict

from tracegrad.trainer.engine_client import EngineClient


class Pauses:
    """The pauses of some engines."""

    def __init__(self) -> None:
        self._since: dict[EngineClient, float] = {}
        self._stood_s: defaultdict[EngineClient, float] = defaultdict(float)

    def pause(self, engine: EngineClient) -> None:
        """Have it stand still; the time counts from here, until it goes on."""
        self._since.setdefault(engine, time.monotonic())
        engine.pause()

    def resume(self, engine: EngineClient) -> None:
        """Let it go on."""
        engine.resume()
        self._stood_s[engine] += time.monotonic() - self._since.pop(engine)

    @property
    def longest_s(self) -> float:
        """Seconds that the engine which stood still longest did, of pauses that have ended."""
        return round(max(self._stood_s.values(), default=0.0), 4)
