"""The death of a publisher inside this process, at a state of its publish. Called by the tests of publishing."""

from collections.abc import Callable


class Died(BaseException):
    """The publisher's process is gone: no code of its own runs any more."""


def dies_at(at: str, which: int = 0) -> Callable[[str], None]:
    """Return what hears of the states that publishes enter, and dies when the `which`-th of them enters `at`."""
    entered: list[str] = []

    def dies(state: str) -> None:
        entered.append(state)
        if state == at and entered.count(state) == which + 1:
            raise Died

    return dies
