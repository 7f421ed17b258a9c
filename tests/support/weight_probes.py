"""Probes of the fake engine, whose weights are one number, as a trainer scores them: for tests of publishing."""

import fake_engine

from tracegrad.trainer.probe import ProbeSequence, ProbeSet

SEQUENCES = tuple(
    ProbeSequence(ids=tuple((start + step * i) % 11 for i in range(40)), n_prompt=5)
    for start in range(3)
    for step in (2, 3)
)


def probe(new: float, previous: float | None = None) -> ProbeSet:
    """Score `SEQUENCES` under the new weight, and under the previous one where there is one."""

    def series(weight: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(fake_engine.logprobs(weight, s.ids, s.n_prompt)) for s in SEQUENCES)

    return ProbeSet(
        sequences=SEQUENCES, new_logprobs=series(new), previous_logprobs=None if previous is None else series(previous)
    )
