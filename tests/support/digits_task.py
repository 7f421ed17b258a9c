"""The task that a 0.46M-parameter byte model can learn in seconds: the larger of two digits, as a chat question.

Pure Python: tests, the tiny model's warm-up and tiny LangGraph apps share it. Two roles ask it in their own words:
the solver sees ``max 3 7``, the checker sees ``max 3 7 = 3`` (somebody's answer, right or wrong); both must answer
``7``. The reward is 1.0 for exactly that digit and 0.0 for anything else.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

SOLVER = "solve"
CHECKER = "check"
MAX_ANSWER_TOKENS = 2
"""One digit and the end-of-turn token."""


@dataclass(frozen=True)
class Question:
    """Two digits. `text` is what the user asks, `answer` the digit that is right."""

    left: int
    right: int

    @property
    def task_id(self) -> str:
        return f"max-{self.left}-{self.right}"

    @property
    def text(self) -> str:
        return f"max {self.left} {self.right}"

    @property
    def answer(self) -> str:
        return str(max(self.left, self.right))


def all_questions() -> list[Question]:
    """Return the 100 questions there are, in order."""
    return [Question(left, right) for left in range(10) for right in range(10)]


def questions(n: int, seed: int = 0) -> list[Question]:
    """Return `n` questions drawn without replacement until the 100 are used up, then again; the seed decides."""
    rng = random.Random(seed)
    drawn: list[Question] = []
    while len(drawn) < n:
        drawn += rng.sample(all_questions(), 100)
    return drawn[:n]


def solver_messages(question: str) -> list[dict[str, str]]:
    """Return the chat of the solver for the question's text."""
    return [{"role": "system", "content": SOLVER}, {"role": "user", "content": question}]


def checker_messages(question: str, proposed: str) -> list[dict[str, str]]:
    """Return the chat of the checker: the question and what the solver said."""
    return [{"role": "system", "content": CHECKER}, {"role": "user", "content": f"{question} = {proposed}"}]


def plain_messages(question: str) -> list[dict[str, str]]:
    """Return the question alone, without a system message."""
    return [{"role": "user", "content": question}]


def reward(text: str, answer: str) -> float:
    """Return 1.0 when the answer's text is exactly the digit (white space around it is forgiven), else 0.0."""
    return 1.0 if text.strip() == answer else 0.0


def examples(seed: int = 0) -> list[tuple[list[dict[str, str]], str]]:
    """Return every (messages, answer) of the three shapes, shuffled: what the warm-up learns from."""
    rng = random.Random(seed)
    pairs: list[tuple[list[dict[str, str]], str]] = []
    for q in all_questions():
        wrong = str(rng.randrange(10))
        pairs.append((plain_messages(q.text), q.answer))
        pairs.append((solver_messages(q.text), q.answer))
        pairs += [(checker_messages(q.text, proposed), q.answer) for proposed in (q.answer, wrong)]
    rng.shuffle(pairs)
    return pairs


def mean_reward(texts: Sequence[str], asked: Sequence[Question]) -> float:
    """Return the mean reward of answers to questions, in the same order."""
    return sum(reward(t, q.answer) for t, q in zip(texts, asked, strict=True)) / len(asked)
