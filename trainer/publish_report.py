"""What became of a publish: how long each part took and what the probe saw. Kept in the store as JSON.

Made by `tracegrad.trainer.publish`, read by the trainer's metrics and `tracegrad versions`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tracegrad.tracestore.gating import Decision
from tracegrad.trainer.probe import ProbeResult

PARTS = ("stage_s", "drain_s", "canary_s", "swap_s", "probe_s", "judge_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishReport:
    """A publish that went live: how long each state took, and what was seen. `probe` is None where none was given.

    `stage_s` comes before anybody waits; `swap_s` is loading the weights into all engines; with a canary, `canary_s`
    (loading and probing the perturbed weights) comes before it; `judge_s` is the gate's. `total_s` is from the request
    to `live`. `paused_s` is how long engines stood still, where calls went on through it.
    """

    publish_id: int
    version_id: int
    model: str
    stage_s: float
    drain_s: float
    canary_s: float
    swap_s: float
    probe_s: float
    judge_s: float
    total_s: float
    probe: ProbeResult | None
    canary: ProbeResult | None
    decision: Decision | None = None
    paused_s: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the times and results as a JSON object: what the store keeps of the publish."""
        times = {k: round(getattr(self, k), 4) for k in (*PARTS, "total_s")}
        seen: dict[str, ProbeResult | Decision | None] = {"result": self.probe, "canary": self.canary}
        if self.decision is not None:
            seen["decision"] = self.decision
        if self.paused_s is not None:
            times["paused_s"] = self.paused_s
        return {**times, **{k: None if v is None else v.as_json() for k, v in seen.items()}}


class Stopwatch:
    """Seconds spent in each part of a publish."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.spent = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds inside the block to `part`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[part] += time.monotonic() - start

    def total_s(self) -> float:
        """Return the seconds since the stopwatch was made."""
        return time.monotonic() - self._start
