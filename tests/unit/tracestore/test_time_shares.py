"""Shares of time: what stood still, what was waited for; the arithmetic stands in the tests."""

from typing import Any

import pytest

from tracegrad.tracestore.diagnosis_records import StepFacts
from tracegrad.tracestore.records import Publish
from tracegrad.tracestore.time_shares import paused_share, shares_of, wait_share


def publish(state: str = "live", probe: dict[str, Any] | None = None, **entered: float) -> Publish:
    return Publish(
        publish_id=1,
        version_id=1,
        model="m",
        state=state,  # type: ignore[arg-type]
        error=None,
        probe=probe,
        entered={"requested": 0.0, **entered},
    )


@pytest.mark.parametrize(
    ("entered", "paused_s"),
    [
        ({"draining": 10.0, "swapping": 12.0, "live": 13.5}, 3.5),
        ({"draining": 10.0, "swapping": 12.0, "failed": 14.0}, 4.0),
        # the gate's evaluation holds nobody for the weights; standing still once more does
        ({"draining": 10.0, "swapping": 11.0, "evaluating": 12.0, "settling": 50.0, "live": 51.0}, 3.0),
        ({"draining": 10.0, "swapping": 11.0, "evaluating": 12.0, "live": 50.0}, 2.0),
        ({"draining": 10.0}, 0.0),
        ({"rejected": 9.0}, 0.0),
    ],
)
def test_what_a_publish_held(entered: dict[str, float], paused_s: float) -> None:
    assert publish(**entered).paused_s == paused_s


def test_a_publish_in_flight_counts_what_the_engine_stood_still() -> None:
    """New calls are held longer: through the probe, too. Where its publisher died, nobody knows better."""
    entered = {"draining": 10.0, "swapping": 10.1, "live": 13.5}
    assert publish(probe={"paused_s": 0.4, "total_s": 3.6}, **entered).paused_s == 0.4
    assert publish(probe={"total_s": 3.6}, **entered).paused_s == 3.5
    assert publish(probe={"paused_s": 0.0}, draining=10.0, failed=40.0).paused_s == 0.0, "it never came to a swap"


def test_the_share_of_publishes_is_of_whole_cycles() -> None:
    first = publish(draining=100.0, swapping=101.0, live=102.0)
    skipped = publish("skipped")
    second = publish(draining=120.0, swapping=121.0, failed=123.0)
    newest = publish(draining=150.0, swapping=199.0, live=200.0)
    assert paused_share([newest, second, skipped, first]) == (2 + 3) / 50
    assert paused_share([newest, skipped]) is None


def test_the_share_waited_for_runs() -> None:
    def step(at: float, wait: float | None) -> StepFacts:
        seconds = {} if wait is None else {"wait": wait}
        return StepFacts(step=1, versions={}, created_at=at, metrics={"seconds": seconds})

    assert wait_share([step(140.0, 4.0), step(120.0, 1.0), step(100.0, 99.0)]) == 5 / 40
    assert wait_share([step(140.0, 4.0)]) is None
    assert wait_share([step(140.0, 4.0), step(120.0, None), step(100.0, 0.0)]) is None


@pytest.mark.parametrize(
    ("published", "share"),
    [
        ({"paused_s": 2.0}, 0.1),
        ({"a": {"paused_s": 1.0}, "b": {"paused_s": 2.0}}, 0.1),
        ({"skipped": "pinned", "paused_s": 0.0}, 0.0),
        ({"error": "out of memory"}, None),
        (None, None),
    ],
)
def test_the_shares_of_a_step(published: dict[str, Any] | None, share: float | None) -> None:
    line = {"seconds": {"wait": 5.0, "total": 15.0}, "publish": published}
    assert shares_of([line]) == {"engine_paused_share": share, "fresh_wait_share": 0.25}
    longer = {"seconds": {"wait": 0.0, "total": 20.0}, "publish": {"paused_s": 0.0}}
    both = shares_of([line, longer])
    assert both == {"engine_paused_share": None if share is None else share / 2, "fresh_wait_share": 0.125}
