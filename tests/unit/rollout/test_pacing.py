"""The pacer alone: what it waits for, and what it does not."""

import asyncio
from typing import Any

import pytest

from tracegrad.adapters.pacing import Pacer

IDLE = {"ready_groups": 0, "leased_groups": 0, "publishing": False, "live": {"main": {"version": 1, "step": 0}}}


class Backlogs:
    """Stands for `Control`: answers with the given backlogs in turn, the last one for ever."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = [IDLE | answer for answer in answers]
        self.asked = 0

    async def backlog(self) -> dict[str, Any]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([{"live": {"main": None}}, {}], ["no weights are live yet", None]),
        ([{"publishing": True}, {}], ["new weights are being published", None]),
        ([{"ready_groups": 1, "leased_groups": 1}, {"ready_groups": 1}], ["the trainer has 1 groups waiting", None]),
        ([{"ready_groups": 1}], []),
    ],
)
def test_it_waits_for_a_version_for_publishing_and_for_the_trainer(
    answers: list[dict[str, Any]], says: list[str | None]
) -> None:
    said: list[str | None] = []
    control: Any = Backlogs(*answers)
    pacer = Pacer(control, ahead=2, needs_version=True, say=said.append, poll_s=0.0)
    asyncio.run(pacer.hold(lambda: 0))
    assert [text and text[: len(expected or "")] for text, expected in zip(said, says, strict=True)] == says
    assert control.asked == len(answers)


def test_without_a_bound_it_waits_for_the_first_version_only() -> None:
    control: Any = Backlogs({"live": {"main": None}}, {"ready_groups": 99})
    pacer = Pacer(control, ahead=None, needs_version=True, say=lambda _: None, poll_s=0.0)
    asyncio.run(pacer.hold(lambda: 0))
    asyncio.run(pacer.hold(lambda: 0))
    assert control.asked == 2


def test_live_runs_without_a_bound_ask_nothing() -> None:
    control: Any = Backlogs({"live": {"main": None}})
    asyncio.run(Pacer(control, ahead=None, needs_version=False, say=lambda _: None).hold(lambda: 0))
    assert control.asked == 0
