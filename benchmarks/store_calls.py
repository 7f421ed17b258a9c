"""The calls that the store is measured with: 2,000 prompt tokens, 200 sampled with logprobs, the messages beside them.

Called by the benchmarks of the store.
"""

import random

from tracegrad.tracestore.records import Call, Choice
from tracegrad.tracestore.testing.rows import make_call

PROMPT, SAMPLED, VOCABULARY = 2_000, 200, 50_000


def sample(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCABULARY), k=count))


def choice_of(ids: tuple[int, ...], text_: str, seed: int) -> Choice:
    generator = random.Random(seed)
    return Choice(
        index=0,
        token_ids=ids,
        logprobs=tuple(-generator.random() for _ in ids),
        finish_reason="stop",
        message={"role": "assistant", "content": text_},
    )


def large_calls(count: int, run: str, seed: int) -> list[Call]:
    """Different prompts and answers, as long as the goals say."""
    said = "A passage about something, of which there are many. " * 150
    return [
        make_call(
            f"{run}-{number}",
            run,
            prompt_ids=sample(PROMPT, seed + number),
            choices=(choice_of(sample(SAMPLED, -seed - number), "x" * 4 * SAMPLED, number),),
            request={"messages": [{"role": "user", "content": f"{number} {said}"}]},
        )
        for number in range(count)
    ]
