"""The traces that the trainer is measured with, frozen: token ids from fixed seeds, and the counts that follow.

    agent_8_turns     2 runs of one task, 8 turns each; a turn reads 48 tokens (the first: the task) and answers 32
    workflow_3_roles  2 runs of one task, 3 roles with 3 turns each; a role keeps its own conversation: a system prompt
                      of 64, the task of 48, an answer of 32, and then twice 64 read and 32 answered
    fan_out_8         2 runs of one task: a plan of 32 on a prompt of 160; 8 branches that read 16 more and answer 32
                      each; a join that reads plan and branches (256) and answers 48
    group_of_8        one prompt of 640, 8 answers of 32
    nothing_shared    8 prompts of 224 that differ from their first token on, an answer of 32 each: all rows are equally
                      long, so that whoever pads has nothing to pad

All roles are played by one model. A context is what a call's tokens are sampled in: its prompt and its answer but for
the last token, from which nothing is predicted. *Unique* counts every distinct prefix once, *per call* every context
whole. `chains` is the least that a trainer without trees can compute where it takes masks: one row per context that
no other continues. Imports nothing but Python: also the peers' drivers get these traces. Called by `trainer_speed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Ids = tuple[int, ...]
_IDS = range(3, 49000)
"""Ids that every tokenizer of the size of SmolLM2's has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedCall:
    """One model call: who made it, what it read, what it answered."""

    run: str
    role: str
    prompt_ids: Ids
    token_ids: Ids

    @property
    def context(self) -> Ids:
        return self.prompt_ids + self.token_ids[:-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainRow:
    """One row of a trainer without trees: `trained` says of each completion token whether it counts."""

    prompt_ids: Ids
    completion_ids: Ids
    trained: tuple[bool, ...]


class _Dice:
    """Draws token ids."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def ids(self, n: int) -> Ids:
        return tuple(self._random.choices(_IDS, k=n))


def agent_8_turns() -> list[TracedCall]:
    dice = _Dice(1)
    task = dice.ids(48)
    return [call for run in range(2) for call in _conversation(dice, f"run{run}", "agent", task, turns=8, read=48)]


def workflow_3_roles() -> list[TracedCall]:
    dice = _Dice(2)
    roles = {role: dice.ids(64) for role in ("planner", "searcher", "answerer")}
    task = dice.ids(48)
    return [
        call
        for run in range(2)
        for role, system in roles.items()
        for call in _conversation(dice, f"run{run}", role, system + task, turns=3, read=64)
    ]


def fan_out_8() -> list[TracedCall]:
    dice = _Dice(3)
    task = dice.ids(160)
    calls = []
    for run in ("run0", "run1"):
        plan = TracedCall(run=run, role="planner", prompt_ids=task, token_ids=dice.ids(32))
        planned = plan.prompt_ids + plan.token_ids
        branches = [
            TracedCall(run=run, role="branch", prompt_ids=planned + dice.ids(16), token_ids=dice.ids(32))
            for _ in range(8)
        ]
        read = sum((branch.token_ids for branch in branches), ())
        join = TracedCall(run=run, role="join", prompt_ids=planned + read, token_ids=dice.ids(48))
        calls += [plan, *branches, join]
    return calls


def group_of_8() -> list[TracedCall]:
    dice = _Dice(4)
    prompt = dice.ids(640)
    return [TracedCall(run=f"run{run}", role="answerer", prompt_ids=prompt, token_ids=dice.ids(32)) for run in range(8)]


def nothing_shared() -> list[TracedCall]:
    dice = _Dice(5)
    return [
        TracedCall(run=f"run{run}", role="answerer", prompt_ids=(run + 3, *dice.ids(223)), token_ids=dice.ids(32))
        for run in range(8)
    ]


SHAPES: dict[str, Callable[[], list[TracedCall]]] = {
    "agent_8_turns": agent_8_turns,
    "workflow_3_roles": workflow_3_roles,
    "fan_out_8": fan_out_8,
    "group_of_8": group_of_8,
    "nothing_shared": nothing_shared,
}


def trained_tokens(calls: list[TracedCall]) -> int:
    return sum(len(call.token_ids) for call in calls)


def per_call_tokens(calls: list[TracedCall]) -> int:
    """What one row per call computes."""
    return sum(len(call.context) for call in calls)


def unique_tokens(calls: list[TracedCall]) -> int:
    """What has to be computed at least: the distinct prefixes of all contexts."""
    contexts = sorted(call.context for call in calls)
    pairs = zip(contexts, [(), *contexts], strict=False)
    return sum(len(context) - _common(context, before) for context, before in pairs)


def chains(calls: list[TracedCall]) -> list[ChainRow]:
    """Lay the calls into rows: each into the first whose tokens begin with all of its own."""
    whole = [call.prompt_ids + call.token_ids for call in calls]
    leaves = [ids for ids in whole if not any(len(o) > len(ids) and o[: len(ids)] == ids for o in whole)]
    laid: dict[int, list[TracedCall]] = {number: [] for number in range(len(leaves))}
    for call, ids in zip(calls, whole, strict=True):
        free = (
            n for n, leaf in enumerate(leaves) if leaf[: len(ids)] == ids and call.prompt_ids not in _prompts(laid[n])
        )
        laid[next(free)].append(call)
    return [_chain(leaf, laid[number]) for number, leaf in enumerate(leaves)]


def one_by_one(calls: list[TracedCall]) -> list[ChainRow]:
    """One row per call."""
    return [_chain(call.prompt_ids + call.token_ids, [call]) for call in calls]


def rows_as_json(rows: list[ChainRow]) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids, "trained": list(map(int, row.trained))}
        for row in rows
    ]


def _chain(ids: Ids, calls: list[TracedCall]) -> ChainRow:
    first = min(len(call.prompt_ids) for call in calls)
    trained = [False] * len(ids)
    for call in calls:
        start = len(call.prompt_ids)
        trained[start : start + len(call.token_ids)] = [True] * len(call.token_ids)
    return ChainRow(prompt_ids=ids[:first], completion_ids=ids[first:], trained=tuple(trained[first:]))


def _prompts(calls: list[TracedCall]) -> set[Ids]:
    return {call.prompt_ids for call in calls}


def _conversation(dice: _Dice, run: str, role: str, prompt: Ids, *, turns: int, read: int) -> list[TracedCall]:
    calls = []
    for _ in range(turns):
        call = TracedCall(run=run, role=role, prompt_ids=prompt, token_ids=dice.ids(32))
        calls.append(call)
        prompt += call.token_ids + dice.ids(read)
    return calls


def _common(left: Ids, right: Ids) -> int:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
