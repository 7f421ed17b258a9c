"""How much of the time an engine stands still for publishing, and how much of it a trainer waits for fresh runs.

Both over whole cycles, from one publish (or step) to a later one, so that the share does not depend on when one asks.
None where there is no whole cycle yet (law 6). A trainer that was away lies in the cycle; nothing then stood still and
nobody waited. Called by the trainer for a step, by `tracegrad status` over the newest, by the trainer's benchmark.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tracegrad.tracestore.diagnosis_records import StepFacts
from tracegrad.tracestore.records import Publish

CYCLES = 20
"""So many of the newest are looked at."""


def paused_share(publishes: Sequence[Publish]) -> float | None:
    """Return the share of time in which engines of a model were drained or paused for publishes; newest first."""
    drained = [publish for publish in publishes if "draining" in publish.entered]
    if len(drained) < 2:
        return None
    period_s = drained[0].entered["draining"] - drained[-1].entered["draining"]
    return None if period_s <= 0 else min(sum(publish.paused_s for publish in drained[1:]) / period_s, 1.0)


def wait_share(steps: Sequence[StepFacts]) -> float | None:
    """Return the share of time in which a job waited for runs that it may lease; `steps` newest first."""
    if len(steps) < 2:
        return None
    period_s = steps[0].created_at - steps[-1].created_at
    waits: list[float | None] = [step.metrics.get("seconds", {}).get("wait") for step in steps[:-1]]
    if period_s <= 0 or None in waits:
        return None
    return min(sum(wait or 0.0 for wait in waits) / period_s, 1.0)


def shares_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return both shares over lines of metrics, each as long as its wait and what came after.

    Of several models the one that stood still longest counts.
    """
    wait_s = period_s = 0.0
    paused_s: float | None = 0.0
    for line in lines:
        wait_s += line["seconds"]["wait"]
        period_s += line["seconds"]["wait"] + line["seconds"]["total"]
        held = _held_s(line.get("publish"))
        paused_s = None if held is None or paused_s is None else paused_s + held
    if period_s <= 0:
        return {"engine_paused_share": None, "fresh_wait_share": None}
    return {
        "engine_paused_share": None if paused_s is None else min(paused_s / period_s, 1.0),
        "fresh_wait_share": min(wait_s / period_s, 1.0),
    }


def _held_s(publish: Mapping[str, Any] | None) -> float | None:
    """Seconds in which the engine stood still; None where nothing was published, or a publish failed unmeasured."""
    if publish is None or "error" in publish:
        return None
    if "paused_s" in publish:
        return float(publish["paused_s"])
    each = [_held_s(one) for one in publish.values() if isinstance(one, Mapping)]
    return max((one for one in each if one is not None), default=None)
