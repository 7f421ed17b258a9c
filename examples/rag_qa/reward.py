"""How an answer is scored: SQuAD-normalised token F1 and exact match, the best over the gold answers.

Normalisation and F1 are those of the SQuAD evaluation (Rajpurkar et al. 2016): lower case, no punctuation, no
articles, white space folded; F1 over the multiset of words. `format` (one short line) is reported apart and is no part
of the reward. Pure functions: nothing here knows of tracegrad.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

MAX_ANSWER_WORDS = 8
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """Lower, drop punctuation and articles, fold white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of word precision and recall; 1.0 where both are empty."""
    given, wanted = normalise(answer).split(), normalise(gold).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


def best_f1(answer: str, golds: Sequence[str]) -> float:
    return max((token_f1(answer, gold) for gold in golds), default=0.0)


def exact_match(answer: str, golds: Sequence[str]) -> float:
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def well_formed(answer: str) -> float:
    """1.0 for one non-empty line of at most `MAX_ANSWER_WORDS` words."""
    return float("\n" not in answer.strip() and 1 <= len(answer.split()) <= MAX_ANSWER_WORDS)


def mentions(passages: Sequence[str], golds: Sequence[str]) -> bool:
    """Tell whether a gold answer stands in one of the passages, word for word after normalisation."""
    texts = [f" {normalise(p)} " for p in passages]
    wanted = [normalise(g) for g in golds]
    return any(f" {g} " in text for g in wanted if g for text in texts)


def reward(task: Any, output: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Score one run of the graph: `task.reference["answers"]` against `output["answer"]`.

    Each role is paid for its own work (`tracegrad.yaml` trains on these two): `answer_f1` reaches the answerer,
    `recall` (do the passages that its keywords found hold a gold answer?) the rewriter. `f1`, `em` and `format` are the
    run's and are reported only. A missing answer is an error, not a 0.
    """
    answers = task.reference["answers"]
    answer = output["answer"]
    f1 = best_f1(answer, answers)
    return [
        {"name": "f1", "value": f1},
        {"name": "em", "value": exact_match(answer, answers)},
        {"name": "format", "value": well_formed(answer)},
        {"name": "answer_f1", "value": f1, "role": "answerer"},
        {"name": "recall", "value": float(mentions([output["passages"]], answers)), "role": "rewriter"},
    ]
