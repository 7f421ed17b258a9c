"""The calls that the store is measured with: 2,000 prompt tokens, 200 sampled with logprobs, the messages beside them.

Called by the benchmarks of the store.
"""

import random
from pathlib import Path

from tracegrad.tracestore.records import Call, Choice
from tracegrad.tracestore.testing.rows import make_call

PROMPT, SAMPLED, VOCABULARY = 2_000, 200, 50_000
DOCS = Path(__file__).parent.parent / "docs"
SENTENCES = [one for path in sorted(DOCS.glob("*.md")) for one in path.read_text().replace("\n", " ").split(". ")]


def sample(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCABULARY), k=count))


def prose(length: int, seed: int) -> str:
    """So many characters of English, others for each seed: sentences of our own documents in another order."""
    generator = random.Random(seed)
    said = ""
    while len(said) < length:
        said += generator.choice(SENTENCES) + " "
    return said[:length]


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
    return [
        make_call(
            f"{run}-{number}",
            run,
            prompt_ids=sample(PROMPT, seed + number),
            choices=(choice_of(sample(SAMPLED, -seed - number), prose(4 * SAMPLED, -seed - number), number),),
            request={"messages": [{"role": "user", "content": prose(4 * PROMPT, seed + number)}]},
        )
        for number in range(count)
    ]
