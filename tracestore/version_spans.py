"""Which versions sampled which tokens of a choice, and whether that can be: one rule for who writes, trains, checks.

Spans are (first token, policy version): each goes on to the next one's first token, the last to the end of the choice.
They cover it exactly where they begin with 0, go up and stay inside, and they can be trained on where each version is
one of the call's model. Pure. Called by `calls`, `diagnosis_spans` and the trainer's samples.
"""

from collections.abc import Mapping, Sequence

Spans = Sequence[tuple[int, int]]


def cover(spans: Spans, n_tokens: int) -> bool:
    """Return whether spans cover exactly so many tokens."""
    firsts = [first for first, _ in spans]
    return bool(firsts) and firsts[0] == 0 and firsts == sorted(set(firsts)) and firsts[-1] < n_tokens


def are_of(spans: Spans, model: str, models: Mapping[int, str]) -> bool:
    """Return whether every version of the spans is one of `model`. `models`: version -> its model."""
    return all(models.get(version) == model for _, version in spans)
