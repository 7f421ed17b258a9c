"""What a proxy remembers of its runs, and what it reads again."""

import asyncio
from collections.abc import Collection
from typing import Any, cast

import pytest

from tracegrad.adapters.proxy import continuing
from tracegrad.adapters.proxy.continuing import Continuing
from tracegrad.adapters.proxy.lineage import origin_of
from tracegrad.tracestore.records import Call, EarlierCall
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import make_call

SHOTS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


class Committed:
    """A store that has only the earlier calls of one run, and counts how many it gave."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.given = 0

    def earlier_calls(
        self, run_id: str, model: str, *, after: int = 0, known: Collection[str] = ()
    ) -> tuple[list[EarlierCall], int]:
        found = [
            EarlierCall(
                call_id=call.call_id,
                role="a",
                request=call.request,
                prompt_ids=call.prompt_ids or (),
                choices=call.choices,
            )
            for call in self.calls[after:]
            if call.call_id not in known
        ]
        self.given += len(found)
        return found, len(self.calls)


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Committed:
    monkeypatch.setattr(continuing, "CAPACITY_TOKENS", 500)
    return Committed()


def asking(text: str) -> list[dict[str, Any]]:
    return [*SHOTS, {"role": "user", "content": text}]


def going_on(text: str) -> dict[str, Any]:
    return {"messages": [*asking(text), {"role": "assistant", "content": text}, {"role": "user", "content": "more"}]}


def with_calls(committed: Committed, n: int) -> Continuing:
    """A run of calls with examples in their prompts, of which only the last are remembered; each looked for a past."""
    memory = Continuing(cast(Store, committed), cast(Any, None))
    for name in map(str, range(n)):
        asyncio.run(memory.earlier("r", "main", {"messages": asking(name)}))
        call = make_call(name, "r", request={"messages": asking(name)})
        call.choices[0].message.update(content=name)
        memory.remember(call)
        committed.calls.append(call)
    return memory


def test_what_is_forgotten_is_read_again_by_who_goes_on_from_it_only(committed: Committed) -> None:
    """A call with examples never has an origin in memory: it must not read a long run each time."""
    memory = with_calls(committed, 50)
    assert 0 < len(memory.remembered("r", "main")) < 20
    assert committed.given == 0
    found = origin_of(going_on("3"), "a", asyncio.run(memory.earlier("r", "main", going_on("3"))))
    assert found is not None and found.call.call_id == "3"
    assert committed.given > 30


def test_a_run_of_which_too_much_was_forgotten_is_read_as_a_new_one(
    committed: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "CAPACITY_MARKS", 20)
    memory = with_calls(committed, 50)
    assert memory._n_marks <= 20
    known = asyncio.run(memory.earlier("r", "main", going_on("3")))
    assert origin_of(going_on("3"), "a", known) is not None


def test_logprobs_are_not_kept(committed: Committed) -> None:
    """They would nearly double what an answer takes up, and nobody looks at them here."""
    (one,) = with_calls(committed, 1).remembered("r", "main")
    assert one.call.choices[0].token_ids == (4, 5, 6) and one.call.choices[0].logprobs is None
