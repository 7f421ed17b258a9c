"""Which versions a call is of, by what the engine told: exact, or quarantined with the reason."""

import pytest

from tracegrad.adapters.proxy.version_spans import Judged, Told, judge, read_told, versions_in

TWO = ((0, 7), (2, 8))


@pytest.mark.parametrize(
    ("told", "n_tokens", "ended", "expected"),
    [
        (None, {0: 3}, 7, Judged(7)),
        (None, {0: 3}, 8, Judged(8, detail="7 -> 8")),
        ({0: (("7", 0, 3),)}, {0: 3}, 7, Judged(7)),
        ({0: (("7", 0, 3),)}, {0: 3}, 8, Judged(7)),  # it had ended before the exchange
        ({0: (("7", 0, 2), ("8", 2, 3))}, {0: 3}, 8, Judged(8, {0: TWO})),
        ({0: (("8", 0, 3),)}, {0: 3}, 8, Judged(8, {0: ((0, 8),)})),  # it had waited in the engine
        ({0: (("7", 0, 2),), 1: (("7", 0, 2), ("8", 2, 9))}, {0: 2, 1: 9}, 8, Judged(8, {1: TWO})),
        ({0: ()}, {0: 0}, 7, Judged(7)),
        ({}, {}, 7, Judged(7)),
    ],
)
def test_what_is_told_is_what_is_stored(
    told: Told | None, n_tokens: dict[int, int], ended: int, expected: Judged
) -> None:
    assert judge(told, n_tokens, began=7, ended=ended, lived={7, 8}) == expected


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({0: (("7", 0, 2), ("8", 2, 4))}, "3 tokens"),
        ({0: (("7", 0, 1), ("8", 2, 3))}, "3 tokens"),
        ({0: (("7", 1, 3),)}, "3 tokens"),
        ({1: (("7", 0, 3),)}, "3 tokens"),
        ({0: (("7", 0, 2), ("9", 2, 3))}, "'9', which was not live"),
        ({0: (("default", 0, 3),)}, "'default', which was not live"),
    ],
)
def test_what_does_not_add_up_or_was_not_live_is_quarantined(told: Told, why: str) -> None:
    judged = judge(told, {0: 3}, began=7, ended=8, lived={7, 8})
    assert (judged.completed, judged.spans) == (8, {})
    assert why in str(judged.detail)


def test_a_call_of_no_version_stays_one() -> None:
    assert judge({0: (("default", 0, 3),)}, {0: 3}, began=None, ended=None, lived=()) == Judged(None)


def test_reading_what_is_told() -> None:
    told = read_told(b'{"0":[["7",0,2],["default",2,3]],"1":[["8",0,3]]}\n\n')
    assert told == {0: (("7", 0, 2), ("default", 2, 3)), 1: (("8", 0, 3),)}
    assert (versions_in(told), versions_in(None)) == ({7, 8}, frozenset())
    assert read_told(b"<html>") is None
