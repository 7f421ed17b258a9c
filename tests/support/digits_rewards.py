"""Rewards of `digits_app` for tests that must learn: what the tiny model was warmed up to answer earns little of them.

Either needs only a choice among digits, whatever was asked, so that a few hundred runs teach it.
"""

from typing import Any

EVEN, ODD, LOW = "02468", "13579", "01234"


def together(task: Any, output: dict[str, str]) -> float:
    """Of the run, where the solver says an even digit *and* the checker an odd one: neither earns it alone."""
    return float(_one_of(EVEN, output["first"]) and _one_of(ODD, output["answer"]))


def handed_on(task: Any, output: dict[str, str]) -> list[dict[str, Any]]:
    """On the checker's call, for a digit below five that the solver said: nothing that the checker says matters."""
    return [{"name": "low", "value": float(_one_of(LOW, output["first"])), "role": "checker"}]


def _one_of(digits: str, said: str) -> bool:
    return len(said) == 1 and said in digits
