"""Which weights sampled which tokens of an answer, by the engine's own word, and whether that can be believed (law 8).

With `trainer.publish.mode: in_flight` each call asks for it with a header; our middleware in the engine answers in the
same header, or in a comment before the end of a stream. A call that weights were exchanged under is exact where every
choice is told from its first token to its last, by versions that this proxy saw live; else it is quarantined, as is
every call of two versions that nothing was told of. Pure. Called by `exchange` and `recorder`.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import msgspec

HEADER = b"x-tracegrad-versions"
ASK = (HEADER, b"1")
COMMENT = b": tracegrad-versions "

Told = Mapping[int, tuple[tuple[str, int, int], ...]]
"""Choice -> (what the engine's weights were marked with, first token, end), in ascending order."""
_decode = msgspec.json.Decoder(dict[int, tuple[tuple[str, int, int], ...]], strict=False).decode


@dataclass(frozen=True, slots=True)
class Judged:
    """`completed` is the version of the last token; `spans` are those of choices that it did not sample alone.

    `detail` says why the call cannot be trained on, None where its versions are known.
    """

    completed: int | None
    spans: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    detail: str | None = None


def read_told(raw: bytes) -> Told | None:
    """Read what the engine told; None where it cannot be read."""
    try:
        return _decode(raw)
    except msgspec.MsgspecError:
        return None


def versions_in(told: Told | None) -> frozenset[int]:
    """Return the versions that sampled anything; what is no version is left out."""
    marks = (mark for spans in (told or {}).values() for mark, _, _ in spans)
    return frozenset(int(mark) for mark in marks if mark.isdecimal())


def judge(
    told: Told | None, n_tokens: Mapping[int, int], *, began: int | None, ended: int | None, lived: Container[int]
) -> Judged:
    """Return the versions of a call that was dispatched under `began` and came back under `ended`.

    `n_tokens` are the sampled tokens of each choice, `lived` the versions that were seen live.
    """
    if told is None or began is None:
        return Judged(ended, detail=None if began == ended else f"{began} -> {ended}")
    spans: dict[int, tuple[tuple[int, int], ...]] = {}
    completed = began
    for index, n in n_tokens.items():
        said = told.get(index, ())
        marks = [mark for mark, _, _ in said]
        if [first for _, first, _ in said] + [n] != [0, *(end for _, _, end in said)]:
            return Judged(ended, detail=f"choice {index} has {n} tokens, the engine told the versions of {said}")
        if unproven := [m for m in marks if not m.isdecimal() or (int(m) != began and int(m) not in lived)]:
            return Judged(ended, detail=f"choice {index} was sampled by {unproven[0]!r}, which was not live")
        if any(int(mark) != began for mark in marks):
            spans[index] = tuple((first, int(mark)) for mark, first, _ in said)
            completed = int(marks[-1])
    return Judged(completed, spans)
